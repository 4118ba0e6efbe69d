"""SsdLink: keeps the index and the storage process in step. What a BlockManager does for its SSD tier, apart from the manager's tasks.

Write-behind: blocks that are committed in host memory are written in the order in which they came, a bounded number at a time; a put never
waits for it. When more wait than ``write_queue_bytes``, the oldest are dropped from the queue: they stay in host memory.

Back-fill: what was dropped from the queue, what the disk refused and what a storage process left undone when it died is owed. It is written
when nothing else waits, if host memory still has it. A disk that refuses is asked again after a pause that doubles up to
PAUSE_MAX_S; meanwhile nothing is written to it.

The manager's lock guards every call; the storage process reports on a thread of its own, which takes that lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexkv_core.cache.engine import GlobalCacheEngine
from flexkv_core.cache.plans import GetPlan, WritePlan
from flexkv_core.config import FlexKVConfig
from flexkv_core.layout import KVLayout
from flexkv_core.storage.base import BlockStatus, SsdSpec, Statuses
from flexkv_core.storage.memory import HostSegment, arrival_mark
from flexkv_core.transfer.backoff import Backoff
from flexkv_core.transfer.ring import CommandKind
from flexkv_core.transfer.storage_process import StorageProcess
from flexkv_core.transfer.supervisor import Progress
from flexkv_core.types import Slots, Tier

logger = logging.getLogger(__name__)

WRITE_BYTES = 16 << 20
"""One write: large enough that its two catalogue commits are a few per cent of its time, small enough to pin little host memory."""
WRITES_MAX = 2
"""Writes under way: one on the disk, one waiting."""
PAUSE_FIRST_S = 0.5
PAUSE_MAX_S = 30.0
"""After a write of which nothing could be done. A dead disk so costs one attempt in 30 s."""
FORGET_TIMEOUT_S = 10.0
"""For what a start finds that no chain connects; it may be all that there was. What is left then is found again next time."""
_CLOSE_POLL_S = 0.01


@dataclass
class _Read:
    plan: GetPlan
    statuses: Statuses


@dataclass
class _Write:
    plan: WritePlan
    ok: npt.NDArray[np.bool_]
    is_dropped: bool = False  # some of it
    is_refused: bool = False


class SsdLink:
    """See the module's text.

    Args:
        cache: the index, which has an SSD tier of :attr:`slot_count` slots.
        lock: the manager's.
        new_id: numbers for writes, of the same series as the manager's tasks.
        on_read: called under the lock when all reads of a task have ended, with their statuses.
        cpus: of the storage process; None: of the thread that calls :meth:`start`.
    """

    def __init__(
        self,
        spec: SsdSpec,
        host: HostSegment,
        cache: GlobalCacheEngine,
        lock: threading.Condition,
        new_id: Callable[[], int],
        on_read: Callable[[int, Statuses], None],
        write_queue_bytes: int,
        cpus: Collection[int] | None = None,
    ) -> None:
        self._cache = cache
        self._host = host
        self._lock = lock
        self._new_id = new_id
        self._on_read = on_read
        self._write_blocks = max(1, WRITE_BYTES // host.layout.slot_bytes)
        self._queue_blocks_max = max(self._write_blocks, write_queue_bytes // host.layout.slot_bytes)
        self._reads: dict[int, _Read] = {}
        self._writes: dict[int, _Write] = {}
        self._writing = Backoff(PAUSE_FIRST_S, PAUSE_MAX_S)
        self._filling = Backoff(PAUSE_FIRST_S, PAUSE_MAX_S)
        self._process = StorageProcess(spec, host, self._on_progress, self._on_corrupt, self._on_tick, cpus)
        self._found_bad: list[Slots] = []
        self.written_blocks = 0
        self.read_blocks = 0
        self.corrupt_blocks = 0

    @property
    def restarts(self) -> int:
        """How often the storage process was started again."""
        return self._process.restarts

    @property
    def pid(self) -> int:
        """Of the storage process; -1 while there is none."""
        return self._process.pid

    def start(self) -> int:
        """Start the storage process and bring the index back to what it holds; how many blocks.

        Raises:
            ConfigError, CapacityError, StorageError: the directories cannot be used.
        """
        started = time.monotonic()
        records = self._process.start()
        ages = records.generations.astype(np.int64)
        with self._lock:
            orphans = self._cache.load(records.slots, records.keys, records.parents, ages)
            if len(orphans) and not self._process.forget(orphans, FORGET_TIMEOUT_S):
                logger.warning(
                    "SSD tier: not all of %d blocks without a beginning were forgotten", len(orphans)
                )
        loaded = len(records) - len(orphans)
        logger.info("SSD tier: %d blocks are warm after %.2f s", loaded, time.monotonic() - started)
        return loaded

    def read(self, task_id: int, plan: GetPlan) -> None:
        """Fill the plan's host slots that only the SSD has; each is marked in the segment's ``arrivals`` with ``task_id``."""
        reads = plan.reads
        slots = plan.host_slots[reads.index]
        keys = np.frombuffer(plan.keys, "V16")[reads.index].tobytes()
        self._reads[task_id] = _Read(plan, np.full(len(reads), BlockStatus.DROPPED, np.uint32))
        if not self._process.read(task_id, keys, reads.ssd_slots, slots):
            self._host.arrivals[slots] = arrival_mark(task_id, ok=False)
            self._on_read(task_id, self._reads.pop(task_id).statuses)

    def write_behind(self) -> None:
        """Start writes while there are blocks that wait and room for one."""
        over = self._cache.waiting_writes - self._queue_blocks_max
        if over > 0:
            self._cache.drop_oldest_writes(over)
        while self._process.is_up and self._writing.is_over and len(self._writes) < WRITES_MAX:
            plan = self._cache.plan_write(self._write_blocks)
            if plan is None:
                if self._may_fill() and self._cache.queue_owed_writes(self._write_blocks):
                    continue
                return
            op = self._new_id()
            self._writes[op] = _Write(plan, np.zeros(plan.count, np.bool_))
            if not self._process.write(op, plan.keys, plan.parents, plan.ssd_slots, plan.host_slots):
                self._cache.finish_write(plan, self._writes.pop(op).ok, retry=True)
                return

    def forget(self, slots: Slots) -> None:
        """Remove the records of ``slots``, so that no restart finds them."""
        if len(slots):
            self._process.forget(slots)

    def _may_fill(self) -> bool:
        """What is owed comes when nothing waits. While something does and there is no room for it, there is none for more."""
        return self._filling.is_over and not self._cache.waiting_writes

    def clear(self) -> None:
        """Forget what is on the SSD."""
        self._process.clear(self._new_id())

    def close(self, timeout_s: float) -> None:
        """Write what waits, within ``timeout_s``, and end the process. Called without the lock."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self.write_behind()
            while self._writes and self._process.is_up and time.monotonic() < deadline:
                self._lock.wait(_CLOSE_POLL_S)
        self._process.close(max(0.1, deadline - time.monotonic()))

    # On the supervisor's thread

    def _on_tick(self) -> None:
        """A process has come up, or a pause may be over."""
        with self._lock:
            if self._found_bad:
                bad, self._found_bad = np.concatenate(self._found_bad), []
                self._cache.drop_slots(Tier.SSD, bad)
            self.write_behind()

    def _on_progress(self, progress: Progress) -> None:
        with self._lock:
            if progress.kind is CommandKind.READ:
                self._take_reads(progress)
            elif progress.kind is CommandKind.WRITE:
                self._take_writes(progress)
            self._lock.notify_all()

    def _take_reads(self, progress: Progress) -> None:
        read = self._reads[progress.op]
        statuses = progress.statuses
        if not progress.is_lost:
            # Dropped by a living process: its catalogue has no such block. The index must not offer it again.
            statuses = np.where(statuses == BlockStatus.DROPPED, np.uint32(BlockStatus.IO_ERROR), statuses)
        read.statuses[progress.indexes] = statuses
        if not progress.finished:
            return
        del self._reads[progress.op]
        self.read_blocks += int((read.statuses == BlockStatus.OK).sum())
        # Only the rare bad ones: a read of thousands of blocks must not hold the manager's lock for a loop over all.
        bad = (read.statuses == BlockStatus.CORRUPT) | (read.statuses == BlockStatus.IO_ERROR)
        for number in np.flatnonzero(bad):
            corrupt = bool(read.statuses[number] == BlockStatus.CORRUPT)
            self.corrupt_blocks += corrupt
            block = read.plan.start_block + int(read.plan.reads.index[number])
            self._cache.invalidate(read.plan, block, Tier.SSD, quarantine=corrupt)
        self._on_read(progress.op, read.statuses)

    def _take_writes(self, progress: Progress) -> None:
        write = self._writes[progress.op]
        write.ok[progress.indexes] = progress.statuses == BlockStatus.OK
        write.is_dropped |= bool((progress.statuses == BlockStatus.DROPPED).any())
        write.is_refused |= bool((progress.statuses == BlockStatus.IO_ERROR).any())
        for slot in write.plan.ssd_slots[progress.indexes[progress.statuses == BlockStatus.CORRUPT]].tolist():
            self._cache.pools[Tier.SSD].quarantine(
                slot
            )  # the scrubber found it; no other write shall fail there
        if not progress.finished:
            return
        del self._writes[progress.op]
        self.written_blocks += int(write.ok.sum())
        self._judge_disk(write)
        # Dropped: the process died, and the next one shall have them. What the disk refused is owed.
        self.forget(self._cache.finish_write(write.plan, write.ok, retry=write.is_dropped))
        self.write_behind()

    def _judge_disk(self, write: _Write) -> None:
        if not write.is_refused:
            if write.ok.all():
                self._filling.succeeded()
                self._writing.succeeded()
            return
        self._filling.failed()
        if write.ok.any():
            self._writing.succeeded()
        else:
            self._writing.failed()

    def _on_corrupt(self, slots: Slots) -> None:
        """The scrubber found these: the storage process refuses them from now on, and the next tick drops them, all in one go."""
        with self._lock:
            self.corrupt_blocks += len(slots)
            self._found_bad.append(slots)


def ssd_spec(
    config: FlexKVConfig, layout: KVLayout, identity: Mapping[str, object], replica: int
) -> SsdSpec | None:
    """What the configuration says of the SSD tier; None if there is none. ``replica``: see :class:`~flexkv_core.block_manager.ModelConfig`."""
    if not config.ssd_dirs:
        return None
    return SsdSpec(
        directories=tuple(config.ssd_dirs),
        bytes_per_directory=int(config.ssd_bytes),
        identity={**identity, "replica": replica},
        layout=layout,
        engine=config.io_engine,
        depth=config.io_queue_depth,
        scrub_bytes_per_s=int(config.scrub_bytes_per_s),
    )
