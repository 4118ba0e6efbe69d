"""The scrubber: reads what is recorded again and again, slowly, so that rot is found before a request meets it."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import KVLayout
from flexkv_core.storage.catalog import Table
from flexkv_core.storage.checksum import slot_checksums
from flexkv_core.storage.directory import SlotPlaces
from flexkv_core.types import Slots

logger = logging.getLogger(__name__)

STEP_BYTES = 1 << 20  # checked between two pauses
_ROUND_S_MIN = 60.0  # between the starts of two rounds, so that a small tier is not read without end


class SlotChecker:
    """Reads slots into a buffer of its own, page-aligned, and compares them with their records. One thread uses it."""

    def __init__(self, fds: tuple[int, ...], places: SlotPlaces, layout: KVLayout, table: Table) -> None:
        self._fds = fds
        self._places = places
        self._layout = layout
        self._table = table
        self._buffer = mmap.mmap(-1, layout.slot_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))

    def check(self, slot: int) -> bool | None:
        """Whether the slot's bytes match its record; None when there is no record, or it changed meanwhile.

        Raises:
            OSError: the slot cannot be read.
        """
        record = self._table[slot : slot + 1].copy()
        if not record["generation"][0]:
            return None
        where = np.array([slot], np.int32)
        offset, file = int(self._places.offsets(where)[0]), int(self._places.files(where)[0])
        moved = os.preadv(self._fds[file], [self._buffer], offset)
        found = slot_checksums(self._address, self._layout, np.zeros(1, np.int32), record["key"])
        if self._table["generation"][slot] != record["generation"][0]:
            return None
        return bool(moved == self._layout.slot_bytes and (found == record["checksums"]).all())


@dataclass
class ScrubCounters:
    """What the scrubber did since it was started."""

    rounds: int = 0
    checked_blocks: int = 0
    corrupt_blocks: int = 0
    read_errors: int = 0


class Scrubber:
    """Runs a :class:`SlotChecker` on a thread of its own.

    Args:
        bytes_per_s: bound of what it reads.
        on_corrupt: is told the slots (int32 [n]) whose bytes are wrong, on the scrubber's thread.
    """

    def __init__(
        self,
        checker: SlotChecker,
        table: Table,
        slot_bytes: int,
        bytes_per_s: int,
        on_corrupt: Callable[[Slots], None],
    ) -> None:
        assert bytes_per_s > 0
        self.counters = ScrubCounters()
        self._checker = checker
        self._table = table
        self._step_slots = max(1, STEP_BYTES // slot_bytes)
        self._pause_s = self._step_slots * slot_bytes / bytes_per_s
        self._on_corrupt = on_corrupt
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="flexkv-scrub", daemon=True)

    def start(self) -> None:
        """Begin the first round."""
        self._thread.start()

    def close(self) -> None:
        """End after the slot that is being read."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            held = np.flatnonzero(self._table["generation"])
            for start in range(0, len(held), self._step_slots):
                self._check(held[start : start + self._step_slots])
                if self._stop.wait(self._pause_s):
                    return
            self.counters.rounds += 1
            self._stop.wait(max(0.0, started + _ROUND_S_MIN - time.monotonic()))

    def _check(self, slots: npt.NDArray[np.int64]) -> None:
        for slot in slots.tolist():
            try:
                verdict = self._checker.check(slot)
            except OSError as error:
                self.counters.read_errors += 1
                logger.warning("scrubber: SSD slot %d cannot be read: %s", slot, error.strerror)
                continue
            self.counters.checked_blocks += verdict is not None
            if verdict is False:
                self.counters.corrupt_blocks += 1
                self._on_corrupt(np.array([slot], np.int32))
