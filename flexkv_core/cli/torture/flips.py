"""Damage: single bits that change in files, and who notices."""

from __future__ import annotations

import mmap
import os
import random
import threading
from dataclasses import dataclass
from pathlib import Path

from flexkv_core.cli.torture.device import BLOCK_BYTES
from flexkv_core.cli.torture.observer import Observer
from flexkv_core.io.base import PAGE_BYTES
from flexkv_core.storage.catalog import Table
from flexkv_core.types import Slots


@dataclass(frozen=True)
class Flip:
    """One bit of a slot that held a block: the catalogue's generation says which."""

    slot: int
    generation: int


@dataclass
class Account:
    """What became of flips.

    Attributes:
        occupied: in slots that held a block until somebody looked.
        detected: of those.
        overwritten: in slots that were written anew, or given up, before anybody looked.
        false_alarms: slots that were found corrupt and were not damaged.
    """

    occupied: int = 0
    detected: int = 0
    overwritten: int = 0
    false_alarms: int = 0


class FlipLedger(Observer):
    """Flips bits in the data files of the manager that it observes, and keeps account."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._lock = threading.Lock()
        self._corrupt: set[int] = set()
        self._flips: list[Flip] = []
        self._unsettled: set[int] = (
            set()
        )  # slots that held nothing, or were perhaps being written, when they were hit
        self._places: set[tuple[int, int, int]] = set()  # no bit is flipped back

    def found_corrupt(self, slots: Slots) -> None:
        """See the base."""
        with self._lock:
            self._corrupt.update(slots.tolist())

    def flip_data(self, files: list[Path]) -> None:
        """Flip a bit anywhere in the data files, which are in use."""
        table = self._table()
        while True:
            slot, byte, bit = (
                self._rng.randrange(len(table)),
                self._rng.randrange(BLOCK_BYTES),
                self._rng.randrange(8),
            )
            if (slot, byte, bit) not in self._places:
                break
        self._places.add((slot, byte, bit))
        before = int(table["generation"][slot])
        flip_bit(files[slot % len(files)], slot // len(files) * BLOCK_BYTES + byte, bit)
        after = int(table["generation"][slot])
        if before == after != 0:
            self._flips.append(Flip(slot, before))
        else:
            self._unsettled.add(slot)

    def missing(self) -> int:
        """Flips that nobody has noticed, and that still can be: the block is there."""
        table = self._table()
        with self._lock:
            return sum(
                flip.slot not in self._corrupt and int(table["generation"][flip.slot]) == flip.generation
                for flip in self._flips
            )

    def settle(self, account: Account, at_end: bool) -> None:
        """Enter into ``account`` what is known now of flips, and forget it; ``at_end``: nobody will look any more."""
        table, latest = self._table(), {flip.slot: flip.generation for flip in self._flips}
        left = []
        with self._lock:
            for flip in self._flips:
                if flip.slot in self._corrupt and flip.generation == latest[flip.slot]:
                    account.detected += 1
                    account.occupied += 1
                elif int(table["generation"][flip.slot]) != flip.generation:
                    account.overwritten += 1
                elif at_end:
                    account.occupied += 1
                else:
                    left.append(flip)
            account.false_alarms += len(self._corrupt - set(latest) - self._unsettled)
            self._corrupt.clear()
            self._unsettled.clear()
        self._flips = left

    def _table(self) -> Table:
        assert self.process is not None
        return self.process.table


def flip_bit(path: Path, offset: int, bit: int) -> None:
    """Past the page cache where the file system allows: a page of it, written back later, would take the neighbours' bytes back too."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            start = offset // PAGE_BYTES * PAGE_BYTES
            os.preadv(fd, [page], start)
            page[offset - start] ^= 1 << bit
            os.pwrite(fd, page, start)
    finally:
        os.close(fd)


def flip_anywhere(path: Path, rng: random.Random) -> None:
    """Any bit of a file, through the page cache: SQLite reads through it."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if size := os.fstat(fd).st_size:
            offset = rng.randrange(size)
            byte = os.pread(fd, 1, offset)[0]
            os.pwrite(fd, bytes([byte ^ 1 << rng.randrange(8)]), offset)
    finally:
        os.close(fd)
