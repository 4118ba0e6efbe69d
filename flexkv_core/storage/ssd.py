"""The SSD tier: slots in preallocated files, recorded in a catalogue, every byte verified.

A write is: the record of what the slot held is removed, the bytes are written and synced, the new record is committed. So a record never
stands beside bytes of another block, and a crash at any moment costs the blocks of the batch that was under way. A read compares the
slot's bytes with the checksums of its record before anyone sees them.

Neighbouring slots that go to or come from neighbouring host slots move in one operation.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import StorageError
from flexkv_core.io.base import IoEngine, IoKind, Region, make_ops
from flexkv_core.io.probe import open_engine
from flexkv_core.storage.base import (
    BlockBatch,
    BlockReader,
    BlockStatus,
    BlockWriter,
    Finished,
    SsdSpec,
    Statuses,
)
from flexkv_core.storage.catalog import BATCH_BLOCKS_MAX, Catalog, Table
from flexkv_core.storage.checksum import slot_checksums
from flexkv_core.storage.directory import SlotPlaces, SsdFiles, open_files
from flexkv_core.storage.memory import HostSegment
from flexkv_core.types import Slots

logger = logging.getLogger(__name__)

IO_BYTES_MAX = 1 << 20
"""Neighbours are joined up to this size; larger operations gain nothing and make others wait."""
READ_DEADLINE_S = 10.0
WRITE_DEADLINE_S = 30.0
IN_FLIGHT_MAX = 1 << 16
"""Blocks that a reader has under way; more wait in its queue."""


class SsdStore:
    """Opens the tier's files and its catalogue, and holds what the reader and the writer share.

    Args:
        host: the segment that blocks move to and from.
        table: memory for the catalogue's records, see :class:`~flexkv_core.storage.catalog.Catalog`.
        open_io: makes an engine over files and regions; for tests that inject faults.

    Raises:
        ConfigError, CapacityError: as :func:`~flexkv_core.storage.directory.open_files`; nothing is left open.
        StorageError: the catalogue cannot be made.
    """

    def __init__(
        self,
        spec: SsdSpec,
        host: HostSegment,
        table: Table | None = None,
        open_io: Callable[[SsdFiles, Region], IoEngine] | None = None,
    ) -> None:
        assert host.layout == spec.layout
        self.host = host
        self.layout = spec.layout
        self.files = open_files(spec)
        with contextlib.ExitStack() as undo:
            undo.callback(self.files.close)
            self.catalog = Catalog(
                self.files.catalog_path, self.files.slot_count, spec.layout.shard_count, table
            )
            undo.callback(self.catalog.close)
            self.quarantined = np.zeros(self.files.slot_count, np.bool_)
            self._bad: deque[Slots] = deque()
            region = Region(host.address, host.slot_count * spec.layout.slot_bytes)
            make = open_io or (lambda files, where: open_engine(spec.engine, files.fds, spec.depth, [where]))
            self.reader = SsdReader(self, undo.enter_context(make(self.files, region)))
            self.writer = SsdWriter(self, undo.enter_context(make(self.files, region)))
            undo.pop_all()

    def quarantine(self, slots: Slots) -> None:
        """Use ``slots`` never again. Their records stay until the writer is told to forget them; nothing is read before.
        Any thread."""
        self.quarantined[slots] = True
        self._bad.append(slots)
        logger.error("SSD slots %s hold other bytes than were written; quarantined", slots.tolist()[:16])

    def take_quarantined(self) -> Slots:
        """Slots that went into quarantine since the last call, for the writer to forget. Any thread."""
        found = [self._bad.popleft() for _ in range(len(self._bad))]
        return np.concatenate(found) if found else np.empty(0, np.int32)

    def close(self) -> None:
        """End both sides, the catalogue and the files, in this order."""
        self.reader.close()
        self.writer.close()
        self.catalog.close()
        self.files.close()


class SsdReader(BlockReader):
    """Reads; see the contract. ``_blocks`` is a ring of the blocks under way, by the number in which they were begun."""

    def __init__(self, store: SsdStore, engine: IoEngine) -> None:
        self._store = store
        self._engine = engine
        self._waiting: deque[tuple[npt.NDArray[np.int64], BlockBatch]] = deque()
        self._pending = 0
        self._refused: list[Finished] = []
        self._blocks = np.zeros(IN_FLIGHT_MAX, _IN_FLIGHT)
        self._begun = 0  # blocks ever
        self._oldest = 0  # of those, the first that is still under way

    def begin(self, ids: npt.NDArray[np.int64], batch: BlockBatch) -> None:
        """See the contract."""
        self._waiting.append((ids, batch))
        self._pending += len(ids)
        self._start_waiting()

    def finished(self) -> Finished:
        """See the contract."""
        done = self._engine.wait(0)
        verified = [self._verify(done.tags, done.results)] if len(done.tags) else []
        self._start_waiting()
        parts, self._refused = verified + self._refused, []
        if not parts:
            return _NOTHING
        self._pending -= sum(len(part.ids) for part in parts)
        return Finished(np.concatenate([p.ids for p in parts]), np.concatenate([p.statuses for p in parts]))

    @property
    def pending(self) -> int:
        """See the contract."""
        return self._pending

    def fileno(self) -> int:
        """The engine's."""
        return self._engine.fileno()

    def close(self) -> None:
        """See the contract."""
        self._engine.close()

    def _start_waiting(self) -> None:
        while self._waiting:
            ids, batch = self._waiting[0]
            room = IN_FLIGHT_MAX - (self._begun - self._oldest)
            if room == 0:
                return
            self._waiting.popleft()
            if len(ids) > room:
                self._waiting.appendleft((ids[room:], _part(batch, slice(room, None))))
                ids, batch = ids[:room], _part(batch, slice(room))
            self._start(ids, batch)

    def _start(self, ids: npt.NDArray[np.int64], batch: BlockBatch) -> None:
        catalog, bad = self._store.catalog.table, self._store.quarantined[batch.slots]
        held = catalog[batch.slots]
        known = (held["generation"] > 0) & (held["key"] == batch.keys).all(axis=1) & ~bad
        if not known.all():
            statuses = np.where(bad, BlockStatus.CORRUPT, BlockStatus.DROPPED).astype(np.uint32)
            self._refused.append(Finished(ids[~known], statuses[~known]))
            ids, batch, held = ids[known], _part(batch, known), held[known]
        if not len(ids):
            return
        numbers = np.arange(self._begun, self._begun + len(ids))
        self._begun += len(ids)
        runs = find_runs(self._store.files.places, self._store.layout.slot_bytes, batch)
        rows = np.zeros(len(ids), _IN_FLIGHT)
        rows["id"], rows["slot"], rows["host_slot"] = ids, batch.slots, batch.host_slots
        rows["key"], rows["generation"], rows["busy"] = batch.keys, held["generation"], True
        rows["count"][runs.starts] = runs.counts
        self._blocks[numbers % IN_FLIGHT_MAX] = rows
        submit_runs(self._engine, IoKind.READ, self._store, batch, runs, int(numbers[0]), READ_DEADLINE_S)

    def _verify(self, tags: npt.NDArray[np.int64], results: npt.NDArray[np.int32]) -> Finished:
        counts = self._blocks["count"][tags % IN_FLIGHT_MAX].astype(np.int64)
        numbers = spread(tags, counts)
        rows = self._blocks[numbers % IN_FLIGHT_MAX]
        read = np.repeat(results, counts) > 0
        statuses = np.full(len(rows), BlockStatus.IO_ERROR, np.uint32)
        if not read.all():
            failed = sorted({errno.errorcode.get(-int(r), str(-int(r))) for r in results if r <= 0})
            logger.error("SSD: %d blocks could not be read: %s", int((~read).sum()), ", ".join(failed))
        if read.any():
            statuses[read] = self._compare(rows[read])
        self._blocks["busy"][numbers % IN_FLIGHT_MAX] = False
        self._advance()
        return Finished(rows["id"].copy(), statuses)

    def _compare(self, rows: Table) -> Statuses:
        """The blocks' bytes, which are in host memory, with their records."""
        store, slots, host_slots = self._store, rows["slot"], rows["host_slot"]
        found = slot_checksums(
            store.host.address, store.layout, np.ascontiguousarray(host_slots), rows["key"]
        )
        held = store.catalog.table[slots]
        right = (found == held["checksums"]).all(axis=1)
        same = (
            held["generation"] == rows["generation"]
        )  # not written anew meanwhile: then a difference means nothing
        store.host.checksums[host_slots[right & same]] = found[right & same]
        if (~right & same).any():
            store.quarantine(slots[~right & same])
        statuses = np.where(right, BlockStatus.OK, BlockStatus.CORRUPT)
        return np.where(same, statuses, BlockStatus.DROPPED).astype(np.uint32)

    def _advance(self) -> None:
        span = np.arange(self._oldest, self._begun) % IN_FLIGHT_MAX
        busy = self._blocks["busy"][span]
        self._oldest += int(busy.argmax()) if busy.any() else len(span)


class SsdWriter(BlockWriter):
    """Writes; see the contract."""

    def __init__(self, store: SsdStore, engine: IoEngine) -> None:
        self._store = store
        self._engine = engine

    def write(self, batch: BlockBatch) -> Statuses:
        """See the contract. At most BATCH_BLOCKS_MAX blocks."""
        assert len(batch) <= BATCH_BLOCKS_MAX
        statuses = np.full(len(batch), BlockStatus.IO_ERROR, np.uint32)
        bad = self._store.quarantined[batch.slots]
        statuses[bad] = BlockStatus.CORRUPT
        rows = np.flatnonzero(~bad)
        if not len(rows):
            return statuses
        part = _part(batch, rows)
        try:
            self._store.catalog.remove(part.slots)
            checksums = self._store.host.checksums[part.host_slots]
            written = self._write(part)
            done = _part(part, written)
            if len(done):
                self._store.catalog.put(done, checksums[written])
        except StorageError as error:
            logger.error("SSD: %d blocks were not recorded: %s", len(part), error)
            return statuses
        statuses[rows[written]] = BlockStatus.OK
        return statuses

    def forget(self, slots: Slots) -> None:
        """See the contract."""
        for start in range(0, len(slots), BATCH_BLOCKS_MAX):
            self._store.catalog.remove(slots[start : start + BATCH_BLOCKS_MAX])

    def clear(self) -> None:
        """See the contract."""
        self._store.catalog.clear()

    def close(self) -> None:
        """See the contract: every write is durable when it returns."""
        self._engine.close()

    def _write(self, batch: BlockBatch) -> npt.NDArray[np.bool_]:
        """Which blocks are written and synced."""
        runs = find_runs(self._store.files.places, self._store.layout.slot_bytes, batch)
        submit_runs(self._engine, IoKind.WRITE, self._store, batch, runs, 0, WRITE_DEADLINE_S)
        results = self._results(len(batch))
        ok = np.repeat(results[runs.starts] > 0, runs.counts)
        files = self._store.files.places.files(batch.slots)
        touched = np.unique(files[ok])
        self._engine.submit(IoKind.SYNC, make_ops(touched, 0, 0, touched), deadline_s=WRITE_DEADLINE_S)
        synced = self._results(len(self._store.files.fds)) == 0
        durable: npt.NDArray[np.bool_] = ok & synced[files]
        return durable

    def _results(self, tag_count: int) -> npt.NDArray[np.int32]:
        """Results by tag, once everything has ended; what was not submitted counts as failed."""
        results = np.full(tag_count, -errno.EIO, np.int32)
        while self._engine.pending:
            done = self._engine.wait(self._engine.pending, WRITE_DEADLINE_S)
            results[done.tags] = done.results
            failed = {errno.errorcode.get(-int(r), str(-int(r))) for r in done.results if r < 0}
            if failed:
                logger.error("SSD: writes failed: %s", ", ".join(sorted(failed)))
        return results


@dataclass(frozen=True)
class Runs:
    """Blocks of a batch that move in one operation: ``counts[i]`` of them from position ``starts[i]`` on. int64 [runs]."""

    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


def find_runs(places: SlotPlaces, slot_bytes: int, batch: BlockBatch) -> Runs:
    """Join neighbours: one file, adjacent there, and adjacent in host memory, in the batch's order."""
    limit = max(1, IO_BYTES_MAX // slot_bytes)
    count = len(batch)
    positions = np.arange(count)
    if limit == 1 or count < 2:
        return Runs(positions, np.ones(count, np.int64))
    follows = np.zeros(count, np.bool_)
    follows[1:] = (np.diff(batch.slots) == places.directory_count) & (np.diff(batch.host_slots) == 1)
    first = np.maximum.accumulate(np.where(follows, 0, positions))  # where each block's run begins
    starts = np.flatnonzero(~follows | ((positions - first) % limit == 0))
    return Runs(starts, np.diff(starts, append=count))


def submit_runs(
    engine: IoEngine,
    kind: IoKind,
    store: SsdStore,
    batch: BlockBatch,
    runs: Runs,
    tag_base: int,
    deadline_s: float,
) -> None:
    """One operation a run, its tag ``tag_base`` plus the position of its first block."""
    places, slot_bytes = store.files.places, store.layout.slot_bytes
    slots, host_slots = batch.slots[runs.starts], batch.host_slots[runs.starts].astype(np.int64)
    addresses = store.host.address + host_slots * slot_bytes
    ops = make_ops(places.files(slots), places.offsets(slots), addresses, tag_base + runs.starts)
    for count in np.unique(runs.counts):
        engine.submit(kind, ops[runs.counts == count], int(count) * slot_bytes, deadline_s)


def spread(starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``starts[i], starts[i] + 1, …`` of each run, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    spread_out: npt.NDArray[np.int64] = np.repeat(starts - (ends - counts), counts) + np.arange(total)
    return spread_out


_IN_FLIGHT = np.dtype(
    [
        ("id", "<i8"),
        ("key", "<u8", (2,)),
        ("generation", "<u8"),
        ("slot", "<i4"),
        ("host_slot", "<i4"),
        ("count", "<i4"),
        ("busy", "?"),
    ],
    align=True,
)
_NOTHING = Finished(np.empty(0, np.int64), np.empty(0, np.uint32))


def _part(batch: BlockBatch, which: slice | npt.NDArray[np.generic]) -> BlockBatch:
    return BlockBatch(batch.keys[which], batch.parents[which], batch.slots[which], batch.host_slots[which])
