"""The storage process: owns the SSD tier and serves the manager's commands. Run by the supervisor, never by hand.

Two threads share the work. The main thread takes commands, reads, and never waits for a disk's sync. The writer thread takes writes and
forgets in the order in which they came, in small batches, and lets reads go first. A third scrubs, if that is wanted.

The process ends when it is told to, when it gets SIGTERM, or when the manager's process has ended, however that ended.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import StorageError
from flexkv_core.storage.base import BlockBatch, BlockStatus, Finished, SsdSpec, Statuses
from flexkv_core.storage.catalog import record_dtype
from flexkv_core.storage.directory import slot_count
from flexkv_core.storage.scrub import Scrubber, SlotChecker
from flexkv_core.storage.ssd import SsdStore
from flexkv_core.transfer.child import PARENT_POLL_S, Child, Column, Completer, run_child, watch
from flexkv_core.transfer.ring import COMMAND, Array, CommandKind, Ring
from flexkv_core.types import Slots

logger = logging.getLogger(__name__)

WRITE_BATCH_BYTES = 16 << 20
"""Written between two looks at the reads that wait: 5-30 ms of a disk, and few enough syncs to keep most of its bandwidth."""
WRITE_BATCH_BLOCKS_MAX = 1024
READS_FIRST_S = 0.05
"""A write batch waits at most this long for reads, so that a steady stream of reads does not starve it."""


class StorageWorker:
    """Serves one manager until it is told to stop. ``run`` is the main thread's."""

    def __init__(self, store: SsdStore, commands: Ring, complete: Completer, parent_pid: int) -> None:
        self._store = store
        self._commands = commands
        self._complete = complete
        self._asked = ReadBook(commands.handle.capacity)
        self._parent_pid = parent_pid
        self._stop_at: float | None = None
        self._writer = WriterThread(store, complete)

    def run(self) -> None:
        """Serve until STOP, SIGTERM or the parent's end."""
        self._writer.start()
        poll = select.poll()
        parent = watch(self._parent_pid)
        for fd in (
            self._commands.fileno(),
            self._store.reader.fileno(),
            *([] if parent is None else [parent]),
        ):
            poll.register(fd, select.POLLIN)
        while self._stop_at is None and os.getppid() == self._parent_pid:
            poll.poll(PARENT_POLL_S * 1000)
            self._serve(self._commands.take())
            self._writer.forget(self._store.take_quarantined())
        self._writer.stop(self._stop_at or 0.0)

    def stop(self, deadline: float) -> None:
        """Have :meth:`run` return; ``deadline`` (time.monotonic()) bounds what is still written. For a signal handler."""
        self._stop_at = deadline

    def report_corrupt(self, slots: Slots) -> None:
        """Tell the manager, unasked, of slots that the scrubber found."""
        self._store.quarantine(slots)
        self._complete(
            np.zeros(len(slots), np.uint64), slots.astype(np.uint32), np.full(len(slots), BlockStatus.CORRUPT)
        )
        self._writer.forget(self._store.take_quarantined())

    def _serve(self, commands: Array) -> None:
        reads = commands[commands["kind"] == CommandKind.READ]
        others = commands[commands["kind"] != CommandKind.READ]
        if len(reads):
            self._store.reader.begin(self._asked.enter(reads), _batch(reads))
        for stop in others[others["kind"] == CommandKind.STOP]:
            self.stop(time.monotonic() + int(stop["index"]) / 1000)
        self._writer.put(others[others["kind"] != CommandKind.STOP])
        self._answer(self._store.reader.finished())
        self._writer.reads_wait = self._store.reader.pending > 0

    def _answer(self, done: Finished) -> None:
        if not len(done.ids):
            return
        reads = self._asked.leave(done.ids)
        # The engine's workers watch this table: a block is copied on while the next one is still being read.
        marks = (reads["op"] << np.uint64(2)) | np.where(done.statuses == BlockStatus.OK, 1, 2).astype(
            np.uint64
        )
        self._store.host.arrivals[reads["host_slot"]] = marks
        self._complete(reads["op"], reads["index"], done.statuses)


class ReadBook:
    """Which command each read that is under way came from. The ids are rows of one table."""

    def __init__(self, capacity: int) -> None:
        self._rows = np.zeros(capacity, COMMAND)
        self._free = np.arange(capacity, dtype=np.int64)
        self._free_count = capacity

    def enter(self, commands: Array) -> npt.NDArray[np.int64]:
        """Ids for ``commands``."""
        assert len(commands) <= self._free_count, "the supervisor sent more than it may have under way"
        self._free_count -= len(commands)
        ids: npt.NDArray[np.int64] = self._free[self._free_count : self._free_count + len(commands)].copy()
        self._rows[ids] = commands
        return ids

    def leave(self, ids: npt.NDArray[np.int64]) -> Array:
        """The commands of ``ids``, which may be used again."""
        commands = self._rows[ids]
        self._free[self._free_count : self._free_count + len(ids)] = ids
        self._free_count += len(ids)
        return commands


class WriterThread:
    """Runs what changes the tier, in order. ``reads_wait`` is set by the main thread."""

    def __init__(self, store: SsdStore, complete: Callable[[Column, Column, Column], None]) -> None:
        self.reads_wait = False
        self._store = store
        self._complete = complete
        self._changed = threading.Condition()
        self._queue: deque[Array] = deque()
        self._stop_at: float | None = None
        self._batch_blocks = min(WRITE_BATCH_BLOCKS_MAX, max(1, WRITE_BATCH_BYTES // store.layout.slot_bytes))
        self._thread = threading.Thread(target=self._work, name="flexkv-ssd-writer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def put(self, commands: Array) -> None:
        """Queue commands of any kind but READ and STOP. The manager bounds how many are under way."""
        if len(commands):
            with self._changed:
                self._queue.append(commands)
                self._changed.notify()

    def forget(self, slots: Slots) -> None:
        """Queue the removal of records that nobody asked for."""
        if len(slots):
            commands = np.zeros(len(slots), COMMAND)
            commands["kind"], commands["ssd_slot"] = CommandKind.FORGET, slots
            self.put(commands)

    def stop(self, deadline: float) -> None:
        """Write what is queued until ``deadline`` (time.monotonic()), drop the rest, and end."""
        with self._changed:
            self._stop_at = deadline
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stop_at is not None)
                if not self._queue:
                    return
                commands = self._queue.popleft()
            for part in self._parts(commands):
                self._run(part)

    def _parts(self, commands: Array) -> list[Array]:
        """Pieces of one kind, and of writes at most a batch whose slots are distinct."""
        kinds = commands["kind"]
        cuts = np.flatnonzero(np.diff(kinds)) + 1
        parts = []
        for piece in np.split(commands, cuts):
            step = self._batch_blocks if piece["kind"][0] == CommandKind.WRITE else len(piece)
            for start in range(0, len(piece), step):
                parts += _distinct(piece[start : start + step])
        return parts

    def _run(self, commands: Array) -> None:
        kind = commands["kind"][0]
        late = self._stop_at is not None and time.monotonic() > self._stop_at
        try:
            if kind == CommandKind.WRITE:
                statuses = _all(commands, BlockStatus.DROPPED) if late else self._write(commands)
            elif kind == CommandKind.FORGET:
                self._store.writer.forget(np.ascontiguousarray(commands["ssd_slot"]))
                return
            elif kind == CommandKind.CLEAR:
                self._store.writer.clear()
                statuses = _all(commands, BlockStatus.OK)
            else:
                statuses = _all(commands, BlockStatus.OK)  # FLUSH: everything before it is durable already
        except StorageError as error:
            logger.error("SSD: %s", error)
            if kind == CommandKind.FORGET:
                return  # the records' bytes still match their keys: what is found again is right
            statuses = _all(commands, BlockStatus.IO_ERROR)
        self._complete(commands["op"], commands["index"], statuses)

    def _write(self, commands: Array) -> Statuses:
        waited_until = time.monotonic() + READS_FIRST_S
        while self.reads_wait and self._stop_at is None and time.monotonic() < waited_until:
            time.sleep(0.001)
        return self._store.writer.write(_batch(commands))


def _distinct(commands: Array) -> list[Array]:
    """Split writes where a slot comes again: two writes of one slot must not be under way together."""
    if commands["kind"][0] != CommandKind.WRITE or len(np.unique(commands["ssd_slot"])) == len(commands):
        return [commands]
    return [commands[i : i + 1] for i in range(len(commands))]


def _all(commands: Array, status: BlockStatus) -> Statuses:
    return np.full(len(commands), status, np.uint32)


def _batch(commands: Array) -> BlockBatch:
    columns = (np.ascontiguousarray(commands[name]) for name in ("key", "parent", "ssd_slot", "host_slot"))
    return BlockBatch(*columns)


def main() -> None:
    """Entry point of the process."""
    run_child("flexkv-storage", _serve)


def _serve(child: Child) -> Callable[[], None]:
    ssd = SsdSpec.from_dict(child.spec.settings)
    host = child.attach_host(ssd.layout)
    table = attach_table(child.spec.table_fd, slot_count(ssd), ssd.layout.shard_count)
    store = SsdStore(ssd, host, table)
    worker = StorageWorker(store, child.commands, child.complete, child.spec.parent_pid)
    child.on_terminate(worker.stop)
    scrubber = None
    if ssd.scrub_bytes_per_s:
        checker = SlotChecker(store.files.fds, store.files.places, ssd.layout, table)
        scrubber = Scrubber(
            checker, table, ssd.layout.slot_bytes, ssd.scrub_bytes_per_s, worker.report_corrupt
        )
        scrubber.start()

    def run() -> None:
        worker.run()
        if scrubber is not None:
            scrubber.close()
        store.close()

    return run


def attach_table(fd: int, slots: int, shard_count: int) -> Array:
    """The catalogue's records in shared memory, shape [slots]; mapped as long as the array lives."""
    dtype = record_dtype(shard_count)
    return np.frombuffer(mmap.mmap(fd, slots * dtype.itemsize), dtype)
