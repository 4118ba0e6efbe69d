"""Fixed-size records from one process to another: a ring in shared memory, synchronised by two eventfds.

The eventfds carry the counts, so nothing in the shared memory needs an order of stores: ``filled`` counts records that were written and
not yet taken, ``freed`` counts places that were taken and not yet written again. A system call stands between the two sides' accesses to
every record. A side that dies leaves nothing locked.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

COMMAND = np.dtype(
    [
        ("op", "<u8"),
        ("kind", "<u4"),
        ("host_slot", "<i4"),
        ("ssd_slot", "<i4"),
        ("index", "<u4"),
        ("key", "<u8", (2,)),
        ("parent", "<u8", (2,)),
        ("epoch", "<u8"),
    ]
)
"""64 bytes. ``kind``: a CommandKind. ``op``: the batch's number, not 0. ``index``: the block's place in its batch. ``ssd_slot``, ``parent``: of the
SSD only, and ``parent`` of a WRITE only. ``epoch``: of a remote store only, see :func:`~flexkv_core.storage.remote.values.names_of`."""

COMPLETION = np.dtype([("op", "<u8"), ("index", "<u4"), ("status", "<u4")])
"""16 bytes. ``status``: a BlockStatus. ``op`` 0: nobody asked; the SSD slot ``index`` was found corrupt by the scrubber."""


class CommandKind(IntEnum):
    """What a command asks for."""

    READ = 1  # SSD slot or remote value -> host slot
    WRITE = 2  # host slot -> SSD slot or remote value
    FORGET = 3  # the record of the SSD slot, or the remote value; not answered
    FLUSH = 4  # answered when every write and forget before it is durable
    CLEAR = 5  # all records; answered
    STOP = 6  # end within ``index`` milliseconds: what is queued is written, what does not fit in is dropped
    EXISTS = 7  # which of a sequence's blocks a remote store has; answered OK for the longest prefix that was found


Array = npt.NDArray[np.void]


@dataclass(frozen=True)
class RingHandle:
    """Descriptors that the other process inherits."""

    memory_fd: int
    filled_fd: int
    freed_fd: int
    capacity: int

    @property
    def fds(self) -> tuple[int, int, int]:
        """All of them."""
        return self.memory_fd, self.filled_fd, self.freed_fd


class Ring:
    """One direction. One process only pushes, the other only takes; within a process one thread at a time."""

    def __init__(self, handle: RingHandle, dtype: np.dtype[np.void]) -> None:
        self.handle = handle
        self._map = mmap.mmap(handle.memory_fd, handle.capacity * dtype.itemsize)
        self._records: Array = np.frombuffer(self._map, dtype)
        self._capacity = handle.capacity
        self._next = 0  # place of the record that is pushed or taken next
        self._free = handle.capacity  # places that the pushing side may write

    @classmethod
    def create(cls, dtype: np.dtype[np.void], capacity: int) -> Ring:
        """Memory and descriptors for a ring of ``capacity`` records."""
        memory = os.memfd_create("flexkv-ring", os.MFD_CLOEXEC)
        os.ftruncate(memory, capacity * dtype.itemsize)
        filled, freed = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
        return cls(RingHandle(memory, filled, freed, capacity), dtype)

    def push(self, records: Array, timeout_s: float = 0.0) -> bool:
        """Send all of ``records``, or none: False when there was no room for them within ``timeout_s``."""
        count = len(records)
        if count > self._capacity or not self._wait_for_room(count, timeout_s):
            return False
        if not count:
            return True
        first = min(count, self._capacity - self._next)
        self._records[self._next : self._next + first] = records[:first]
        self._records[: count - first] = records[first:]
        self._next = (self._next + count) % self._capacity
        self._free -= count
        os.eventfd_write(self.handle.filled_fd, count)
        return True

    def take(self) -> Array:
        """Everything that was sent since the last call; a batch is never torn."""
        count = _read_count(self.handle.filled_fd)
        first = min(count, self._capacity - self._next)
        records: Array = np.empty(count, self._records.dtype)
        records[:first] = self._records[self._next : self._next + first]
        records[first:] = self._records[: count - first]
        self._next = (self._next + count) % self._capacity
        if count:
            os.eventfd_write(self.handle.freed_fd, count)
        return records

    def fileno(self) -> int:
        """Readable for the taking side when there is something."""
        return self.handle.filled_fd

    def close(self) -> None:
        """Free this process's mapping and descriptors."""
        self._records = np.empty(0, self._records.dtype)
        with contextlib.suppress(BufferError):
            self._map.close()
        for fd in self.handle.fds:
            os.close(fd)

    def _wait_for_room(self, count: int, timeout_s: float) -> bool:
        while True:
            self._free += _read_count(self.handle.freed_fd)
            if self._free >= count:
                return True
            poll = select.poll()
            poll.register(self.handle.freed_fd, select.POLLIN)
            if timeout_s <= 0 or not poll.poll(timeout_s * 1000):
                return False


def _read_count(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
