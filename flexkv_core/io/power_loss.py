"""For tests: what a power loss leaves in data files.

A model of disks with a volatile cache, after the write log of CrashMonkey (Mohan et al., OSDI 2018): what was written before the last
completed flush is there; of every later write each sector is there or not, independently of all others, whatever had been acknowledged.
"""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexkv_core.io.base import IoKind


@dataclass
class _Write:
    number: int
    file: int
    offset: int
    before: bytes
    after: bytes
    is_told: bool = False  # the caller knows that it finished

    def outside(self, start: int, stop: int) -> list[_Write]:
        """What of it lies before byte ``start`` of the file or from ``stop`` on."""
        end = self.offset + len(self.after)
        return [
            replace(
                self,
                offset=first,
                before=self._bytes(self.before, first, last),
                after=self._bytes(self.after, first, last),
            )
            for first, last in ((self.offset, min(end, start)), (max(self.offset, stop), end))
            if first < last
        ]

    def _bytes(self, content: bytes, first: int, last: int) -> bytes:
        return content[first - self.offset : last - self.offset]


class PowerLossLog:
    """Every write to ``files`` (descriptors, in the engine's order) since it became durable.

    Offsets and lengths must be multiples of the unit that :meth:`cut` is called with. Writes that overlap may not be under way together.
    """

    def __init__(self, files: Sequence[int]) -> None:
        # Descriptors of its own, through the page cache: they take any address.
        self._files = [os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC) for fd in files]
        self._writes: list[_Write] = []  # in the order of submission
        self._syncs: dict[int, list[int]] = {}

    @property
    def volatile_bytes(self) -> int:
        """What a power loss may take."""
        return sum(len(write.after) for write in self._writes)

    def started(self, number: int, kind: IoKind, file: int, offset: int, address: int, length: int) -> None:
        """Before operation ``number`` begins; numbers are never used twice. What it will move is read now."""
        if kind is IoKind.WRITE:
            before = os.pread(self._files[file], length, offset).ljust(length, b"\0")
            self._writes.append(_Write(number, file, offset, before, ctypes.string_at(address, length)))
        elif kind is IoKind.SYNC:
            self._syncs[number] = [
                write.number for write in self._writes if write.file == file and write.is_told
            ]

    def told(self, number: int) -> None:
        """The caller has been told that write ``number`` finished: the next sync covers it."""
        for write in self._writes:
            write.is_told |= write.number == number

    def synced(self, number: int) -> None:
        """Sync ``number`` succeeded."""
        for covered in self._syncs.pop(number, ()):
            while (at := next((i for i, w in enumerate(self._writes) if w.number == covered), -1)) >= 0:
                self._forget_up_to(at)

    def _forget_up_to(self, at: int) -> None:
        """Neither the write at position ``at`` nor an earlier one to its place, which may have failed, can change what is there now."""
        durable = self._writes[at]
        stop = durable.offset + len(durable.after)
        earlier: list[_Write] = []
        for write in self._writes[: at + 1]:
            earlier += write.outside(durable.offset, stop) if write.file == durable.file else [write]
        self._writes[: at + 1] = earlier

    def cut(self, unit_bytes: int, rng: random.Random | None = None) -> int:
        """Change the files into what a power loss now would leave. Nobody may be writing.

        Args:
            unit_bytes: what the disk writes as a whole, 512 or 4096.
            rng: chooses, unit by unit, which of its versions survived; None takes everything back that was not durable.

        Returns:
            Units that lost their latest bytes.
        """
        versions: dict[tuple[int, int], list[bytes]] = {}
        for write in self._writes:
            for start in range(0, len(write.after), unit_bytes):
                unit = versions.setdefault(
                    (write.file, write.offset + start), [write.before[start : start + unit_bytes]]
                )
                unit.append(write.after[start : start + unit_bytes])
        lost = 0
        for (file, offset), choices in versions.items():
            kept = choices[0] if rng is None else rng.choice(choices)
            lost += kept != choices[-1]
            os.pwrite(self._files[file], kept, offset)
        for fd in self._files:
            os.fsync(fd)
        self._writes.clear()
        self._syncs.clear()
        return lost

    def close(self) -> None:
        """Close the log's own descriptors."""
        for fd in self._files:
            os.close(fd)
        self._files = []
