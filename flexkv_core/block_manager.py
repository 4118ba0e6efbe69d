"""BlockManager: get, put and prefetch of KV blocks by their keys; the index of all tiers and the memory of the host tier.

It plans and settles; an :class:`~flexkv_core.transfer.plan.Executor` moves the bytes. Every method may be called from any thread. Nothing
here raises for an expected outcome: what cannot be had is a miss, what cannot be kept is dropped, and both are counted.

A get is ``get_keys`` (find and pin), then ``launch_blocks`` (copy); a put is ``put_keys`` (reserve), then ``launch_blocks``. What is not
wanted must be given back with ``cancel``. A task that was launched, or dropped because its caller is gone, reports once to its
``on_done``, on any thread and under the manager's lock. :mod:`flexkv_core.manager` has the same by tokens.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from typing_extensions import Buffer

from flexkv_core import native
from flexkv_core.cache.engine import GlobalCacheEngine
from flexkv_core.cache.plans import GetPlan, PutPlan
from flexkv_core.cache.tier_events import TierEvent
from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import CapacityError, ClosedError
from flexkv_core.keys import fingerprint
from flexkv_core.layout import KVLayout
from flexkv_core.metrics import Counters
from flexkv_core.quantised import check_store_dtype
from flexkv_core.remote_link import RemoteLink, remote_spec
from flexkv_core.remote_policy import ThresholdPolicy
from flexkv_core.ssd_link import SsdLink, ssd_spec
from flexkv_core.storage.base import BlockStatus, SsdSpec, Statuses
from flexkv_core.storage.directory import slot_count as ssd_slot_count
from flexkv_core.storage.memory import HostSegment, slots_within
from flexkv_core.storage.remote.base import RemoteSpec
from flexkv_core.tasks import (
    NO_SLOTS,
    NO_STATUSES,
    KVResponseStatus,
    OnDone,
    Purpose,
    Task,
    TaskDone,
    prefix_length,
)
from flexkv_core.transfer.cpus import EngineCpus
from flexkv_core.transfer.engine import TransferEngine
from flexkv_core.transfer.layers import LayerStatus
from flexkv_core.transfer.plan import (
    Delivery,
    DeviceCopier,
    Executor,
    LayerwiseExecutor,
    OpResult,
    OpStatus,
    TransferOp,
)
from flexkv_core.types import KEY_BYTES, BlockIds, Direction, Slots, Tier
from flexkv_core.verify import settle_check

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
CLOSE_REMOTE_S = 5.0
"""What :meth:`BlockManager.shutdown` gives the SSD tier and the store to write what waits."""

TASKS_MAX = 65536
"""Tasks that are remembered. Beyond it the oldest that was never launched is cancelled, then new ones are refused as misses."""


@dataclass(frozen=True)
class ModelConfig:
    """What the cached bytes are.

    ``identity``: everything that must agree before two deployments may share bytes (model, revision, dtype, packing, …), as
    JSON-serialisable values; it enters the root of every key. ``layout``: the shape of a slot. ``replica``: of several engines that run
    the model side by side with the same settings (data parallelism); each has files of its own on the SSD.
    """

    identity: Mapping[str, object]
    layout: KVLayout
    replica: int = 0


def root_key(model_config: ModelConfig, namespace: str) -> bytes:
    """The parent of every sequence's first key, 16 bytes. ``namespace``: the configuration's."""
    layout = model_config.layout
    identity = {**model_config.identity, "namespace": namespace, "layout": repr(layout)}
    if layout.scales:  # only there where bytes are rounded: all others keep the keys they have
        identity["store_dtype"] = ["fp8", layout.scales]
    return fingerprint(identity)


class BlockManager:
    """See the module's text.

    Args:
        model_config: what the bytes are.
        cache_config: the tiers and their limits.
        device: a copier of this process's device, or an executor that reaches other processes' devices.
        track_events: collect what comes to each tier and leaves it, for :meth:`take_events`.
        first_task: numbers of tasks begin above it. Where other processes outlive a manager, no later one may use its numbers again.
        cpus: those of an engine that computes on CPUs: the storage process keeps to what it may use, the remote process to what it leaves.
            None: both keep to those of the thread that calls :meth:`start`.

    Raises:
        ConfigError: ``store_dtype`` and the layout do not agree.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        cache_config: FlexKVConfig,
        device: DeviceCopier | Executor,
        track_events: bool = False,
        first_task: int = 0,
        cpus: EngineCpus | None = None,
    ) -> None:
        self.layout = model_config.layout
        check_store_dtype(cache_config.store_dtype, self.layout)
        self.config = cache_config
        self._cpus = cpus
        self._identity = {**model_config.identity, "namespace": cache_config.namespace}
        self.root = root_key(model_config, cache_config.namespace)
        self._executor = executor_for(device, cache_config)
        self._slot_count = _slot_count(cache_config, self.layout)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._tasks: OrderedDict[int, Task] = OrderedDict()
        self._next_task_id = first_task
        self._counters = Counters()
        self._host: HostSegment | None = None
        self._closed = False
        self._ssd_spec = ssd_spec(cache_config, self.layout, self._identity, model_config.replica)
        capacities = {Tier.HOST: self._slot_count}
        if self._ssd_spec is not None:
            capacities[Tier.SSD] = ssd_slot_count(self._ssd_spec)
        self._remote_spec = remote_spec(cache_config, self.layout, self.root)
        self._cache = GlobalCacheEngine(capacities, eviction=cache_config.eviction, track_events=track_events)
        self._ssd: SsdLink | None = None
        self._remote: RemoteLink | None = None

    # Life

    def start(self) -> None:
        """Take the memory, open the SSD tier and start the executor. Call once.

        Raises:
            CapacityError: the machine cannot give the host tier's memory, or a disk the SSD tier's space.
            ConfigError: a directory of the SSD tier cannot be used, or is in use.
            StorageError: the storage process cannot be started.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the manager was shut down")
            assert self._host is None, "BlockManager.start() was called twice"
            self._host = HostSegment.create(self._slot_count, self.layout, self.config.huge_pages)
            if self._ssd_spec is not None:
                self._open_ssd(self._ssd_spec, self._host)
            if self._remote_spec is not None:
                self._open_remote(self._remote_spec, self._host)
            self._host.populate()
            self._executor.start(self._host, self._on_result)
        logger.info(
            "host tier: %d blocks of %d tokens, %d bytes each",
            self._slot_count,
            self.layout.tokens_per_block,
            self.layout.slot_bytes,
        )

    def wait_remote(self, timeout_s: float) -> bool:
        """Wait until the store can be asked, which nothing else does; whether it can, or there is none. After :meth:`start`."""
        return self._remote is None or self._remote.wait_up(timeout_s)

    def is_ready(self) -> bool:
        """Whether tasks are taken."""
        return self._host is not None and not self._closed

    def shutdown(self) -> None:
        """End the executor, write what waits for the SSD within ten seconds, and give the memory back. Tasks that still run are
        cancelled. A second call does nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        if self._host is not None:
            self._executor.close()
            if self._remote is not None:
                self._remote.close(CLOSE_REMOTE_S)
            if self._ssd is not None:
                self._ssd.close(CLOSE_TIMEOUT_S)
            self._host.close()
        with self._changed:
            for task in list(self._tasks.values()):
                self._end(task, KVResponseStatus.CANCELLED)
                self._report(task)
            self._changed.notify_all()

    def reset(self) -> None:
        """Forget everything that is cached. Transfers that run end on their own; what they bring is not found any more."""
        with self._changed:
            self._cache.reset()
            if self._ssd is not None:
                self._ssd.clear()
            if self._remote is not None:
                self._remote.clear()

    @property
    def host(self) -> HostSegment:
        """The host tier's memory; after :meth:`start`."""
        assert self._host is not None
        return self._host

    def counters(self) -> Counters:
        """A consistent copy of the counters."""
        with self._changed:
            stats, ssd, remote = self._cache.stats, self._ssd, self._remote
            counters = replace(
                self._counters,
                evicted_blocks=stats.blocks_evicted,
                ssd_evicted_blocks=stats.ssd_blocks_evicted,
            )
            if ssd is not None:
                counters = replace(
                    counters,
                    ssd_read_blocks=ssd.read_blocks,
                    ssd_written_blocks=ssd.written_blocks,
                    ssd_corrupt_blocks=ssd.corrupt_blocks,
                    ssd_restarts=ssd.restarts,
                )
            return counters if remote is None else replace(counters, **remote.counters())

    def usage(self) -> tuple[int, int]:
        """Slots of the host tier that are taken, and all."""
        with self._changed:
            return self._cache.used(Tier.HOST), self._slot_count

    def take_events(self, blocks_max: int = 16384) -> list[TierEvent]:
        """What came to each tier and left it, :meth:`reset` aside, oldest first, about ``blocks_max`` blocks a call; empty unless tracked."""
        with self._changed:
            return self._cache.take_events(blocks_max)

    def check_integrity(self) -> None:
        """Recount the index and the pools; AssertionError says what differs. For tests; takes time."""
        with self._changed:
            self._cache.check_integrity()

    # By keys

    def match_keys(self, keys: bytes | memoryview) -> int:
        """Blocks of the longest cached prefix of ``keys``; pins nothing, changes nothing. A view is read-only; what it shows may change
        meanwhile."""
        with self._lock:
            return 0 if self._closed else self._cache.match(keys)

    def answer_match(self, fd: int, kind: int, memory: Buffer) -> bool:
        """:meth:`match_keys` for who asks through a socket, see :func:`~flexkv_core.native.answer_match`."""
        with self._lock:
            return not self._closed and native.answer_match(self._cache.index, fd, kind, memory)

    def is_in_host(self, keys: bytes, start_block: int) -> bool:
        """Whether all blocks of ``keys`` from ``start_block`` on could be loaded without a lower tier; pins nothing, changes nothing."""
        with self._changed:
            return not self._closed and self._cache.holds(keys, start_block)

    def get_keys(
        self, keys: bytes, start_block: int, on_done: OnDone, purpose: Purpose = Purpose.GET
    ) -> tuple[int, int]:
        """Pin the cached prefix of ``keys`` from ``start_block`` on, to load it or to CHECK it (the executor then compares instead of
        copying); the task and how many blocks it is for (0: nothing to launch)."""
        task = self._begin_get(keys, start_block, on_done, purpose)
        return task.task_id, task.block_count

    def prefetch_keys(self, keys: bytes, start_block: int, on_done: OnDone) -> tuple[int, int]:
        """Bring blocks ``start_block`` … of the longest prefix of ``keys`` that any tier has to the host tier; the task and how many are
        read, at most where the remote tier is asked."""
        with self._changed:
            task = Task(self._new_id(), Direction.LOAD, None, start_block, b"", NO_SLOTS, on_done)
            task.purpose, task.launched = Purpose.PREFETCH, True
            if self.fetch_keys(keys, lambda: self._read_fetched(task, keys)):
                self._tasks[task.task_id] = task
                return task.task_id, len(keys) // KEY_BYTES - start_block
        task = self._begin_get(keys, start_block, on_done, Purpose.PREFETCH)
        reads = task.read_count
        self._read_ahead(task)
        return task.task_id, reads

    def fetch_keys(self, keys: bytes, on_end: Callable[[], None]) -> bool:
        """Bring what only the remote tier has of ``keys`` to the host tier, where the next match finds it.

        True: something may come; ``on_end`` is called once, on any thread and under the manager's lock, when it has come or when it was
        waited for as long as the configuration allows. False: there is nothing to wait for.
        """
        with self._changed:
            return self._remote is not None and not self._closed and self._remote.fetch(keys, on_end)

    def put_keys(self, keys: bytes, on_done: OnDone, first: int = 0) -> tuple[int, int, int]:
        """Reserve slots for what is new in ``keys``, for nothing when a block before ``first`` is; the task, its first block and how
        many (0: nothing to launch)."""
        task = self._begin_put(keys, on_done, first)
        return task.task_id, task.start_block, task.block_count

    def slots_of(self, task_id: int) -> tuple[Slots, Slots]:
        """Of a task that was not launched, for who copies elsewhere: int32 [blocks], its host slots, and int32 [r], the indices of those
        that a lower tier will fill after the launch. Empty when there is no such task."""
        with self._changed:
            task = self._tasks.get(task_id)
            if task is None:
                return NO_SLOTS, NO_SLOTS
            return task.slots, task.plan.reads.index if isinstance(task.plan, GetPlan) else NO_SLOTS

    def disown(self, task_id: int, keys: bytes) -> None:
        """Nothing was heard of a put for long, and somebody is about to put ``keys``: if its blocks are among them they may be put anew. Its
        slots stay its own until it ends, then return."""
        with self._changed:
            task = self._tasks.get(task_id)
            if task is None or not isinstance(task.plan, PutPlan):
                return
            at = KEY_BYTES * task.start_block
            if task.keys[:KEY_BYTES] == keys[at : at + KEY_BYTES]:
                self._cache.disown_put(task.plan)

    def launch_blocks(self, task_id: int, blocks: BlockIds, delivery: Delivery = Delivery.WHOLE) -> None:
        """Start a task's copy. ``blocks``: int64 [blocks of the task * blocks_per_slot], device blocks in order. ``delivery``: of a get; of a
        put LAYERWISE only where somebody tells the executor of each layer."""
        with self._changed:
            task = self._tasks.get(task_id)
            if task is None:
                return  # dropped, and reported, because TASKS_MAX later ones came before its launch
            assert not task.launched
            assert len(blocks) == task.block_count * self.layout.blocks_per_slot
            task.launched = True
            op = TransferOp(task_id, task.direction, task.keys, task.slots, blocks, task.awaited(), delivery)
            self._counters.add_launch(task.direction, delivery)
            self._start_reads(task)
        self._executor.submit(op)

    def wait_layers(self, task_id: int, count: int, timeout_s: float) -> LayerStatus:
        """Wait for the first ``count`` layers of a get that is not delivered WHOLE, see
        :meth:`~flexkv_core.transfer.engine.TransferEngine.wait_layers`. FAILED where the executor reaches other processes: there the layers
        are awaited by those that read them."""
        executor = self._executor
        if not isinstance(executor, LayerwiseExecutor):
            return LayerStatus.FAILED
        return executor.wait_layers(task_id, count, timeout_s)

    def cancel(self, task_id: int) -> None:
        """Give up a task. One that was not launched is forgotten and reports nothing; a copy that runs already ends first, its slots return
        then, and it reports."""
        with self._changed:
            task = self._tasks.get(task_id)
            if task is None or task.ended:
                return
            task.cancelled = True
            if not task.launched:
                self._end(task, KVResponseStatus.CANCELLED)
                del self._tasks[task_id]
                return
        self._executor.cancel(task_id)

    # Inside

    def _begin_get(self, keys: bytes, start: int, on_done: OnDone, purpose: Purpose) -> Task:
        with self._changed:
            plan = self._cache.plan_get(keys if not self._closed else b"", start)
            if purpose is Purpose.GET:
                self._counters.lookups += 1
                self._counters.lookup_tokens += len(keys) // KEY_BYTES * self.layout.tokens_per_block
                self._counters.hit_tokens += len(plan.host_slots) * self.layout.tokens_per_block
                if self._remote is not None and plan.lease is not None:
                    self._remote.used(keys[: KEY_BYTES * plan.blocks])
            elif purpose is Purpose.CHECK:  # what has left the cache since it was chosen
                self._counters.verify_skipped += len(keys) // KEY_BYTES - start - len(plan.host_slots)
            of_plan = (plan, start, plan.keys, plan.host_slots)
            return self._remember(Task(self._new_id(), Direction.LOAD, *of_plan, on_done, purpose))

    def _begin_put(self, keys: bytes, on_done: OnDone, first: int = 0) -> Task:
        with self._changed:
            plan = self._cache.plan_put(keys if not self._closed else b"", first)
            if plan.start_block >= first:
                self._counters.dropped_blocks += max(
                    0, len(keys) // KEY_BYTES - plan.start_block - plan.count
                )
            of_plan = (plan, plan.start_block, plan.keys, plan.slots)
            task = Task(self._new_id(), Direction.STORE, *of_plan, on_done)
            task.sequence_keys = keys if self._remote is not None else b""
            return self._remember(task)

    def _new_id(self) -> int:
        self._next_task_id += 1
        return self._next_task_id

    def _remember(self, task: Task) -> Task:
        """Enter a new task; one that moves nothing has ended already and is not kept."""
        if task.block_count and len(self._tasks) >= TASKS_MAX:
            self._make_room()
        if task.block_count and len(self._tasks) >= TASKS_MAX:
            self._end(task, KVResponseStatus.FAILED)
        elif not task.block_count:
            self._end(task, KVResponseStatus.SUCCESS)
        if task.block_count:
            self._tasks[task.task_id] = task
        return task

    def _make_room(self) -> None:
        """Drop the oldest task that was never launched: its caller is gone."""
        for task in self._tasks.values():
            if not task.launched:
                logger.warning(
                    "task %d was matched and neither launched nor cancelled: dropped", task.task_id
                )
                self._end(task, KVResponseStatus.CANCELLED)
                self._report(task)
                return

    def _open_ssd(self, spec: SsdSpec, host: HostSegment) -> None:
        ssd = SsdLink(
            spec,
            host,
            self._cache,
            self._changed,
            self._new_id,
            self._on_read,
            int(self.config.write_queue_bytes),
            None if self._cpus is None else self._cpus.allowed,
        )
        ssd.start()
        self._ssd = ssd

    def _open_remote(self, spec: RemoteSpec, host: HostSegment) -> None:
        policy = ThresholdPolicy(self.config)
        self._remote = RemoteLink(
            spec,
            self.config,
            policy,
            host,
            self._cache,
            self._changed,
            self._new_id,
            self._write_behind,
            None if self._cpus is None else self._cpus.spare,
        )
        self._remote.start()

    def _read_ahead(self, task: Task) -> None:
        """Start a prefetch: a get without the copy."""
        with self._changed:
            if not task.ended:
                task.launched = task.copied = True
                task.ok = np.ones(task.block_count, np.bool_)
                self._start_reads(task)

    def _read_fetched(self, task: Task, keys: bytes) -> None:
        """What the remote tier had is in host memory; now read from the SSD what only that has. Called under the lock."""
        if task.ended:
            return  # the manager was shut down
        task.plan = self._cache.plan_get(keys if not self._closed else b"", task.start_block)
        task.keys, task.slots, task.copied = task.plan.keys, task.plan.host_slots, True
        task.ok = np.ones(task.block_count, np.bool_)
        self._start_reads(task)

    def _start_reads(self, task: Task) -> None:
        """Have the task's blocks that only the SSD holds read; with none, they have ended."""
        if isinstance(task.plan, GetPlan) and len(task.plan.reads):
            assert self._ssd is not None
            self._ssd.read(task.task_id, task.plan)
        else:
            task.read_statuses = NO_STATUSES
            self._end_if_done(task)

    def _on_read(self, task_id: int, statuses: Statuses) -> None:
        """All reads of a task have ended; called under the lock, on the supervisor's thread."""
        task = self._tasks[task_id]
        task.read_statuses = statuses
        if task.purpose is Purpose.PREFETCH:
            self._counters.prefetched_blocks += int((statuses == BlockStatus.OK).sum())
        self._end_if_done(task)

    def _on_result(self, result: OpResult) -> None:
        """An op ended; called by the executor on any thread."""
        with self._changed:
            task = self._tasks.get(result.op_id)
            if task is None or task.ended:
                return
            task.ok, task.copied, task.copy_status, task.wrong = result.ok, True, result.status, result.wrong
            if task.purpose is Purpose.GET:
                size = self.layout.shard_bytes * self.layout.shard_count
                self._counters.add_copy(task.direction, result, size)
            self._end_if_done(task)

    def _end_if_done(self, task: Task) -> None:
        """End a task whose copy and whose reads have both ended."""
        if not task.copied or task.read_statuses is None or task.ended:
            return
        task.drop_unread()
        if task.copy_status is OpStatus.DONE and task.ok.all():
            status = KVResponseStatus.SUCCESS
        elif task.copy_status is OpStatus.CANCELLED:
            status = KVResponseStatus.CANCELLED
        else:
            status = KVResponseStatus.FAILED
        if task.purpose is Purpose.CHECK:
            task.mismatches = settle_check(task, self._cache, self._counters, self._ssd)
            if self._remote is not None and task.mismatches:
                self._remote.expel(b"".join(mismatch.key for mismatch in task.mismatches))
        elif task.copy_status is OpStatus.DONE:
            self._drop_corrupt(task)
        self._end(task, KVResponseStatus.CANCELLED if task.cancelled else status)
        self._changed.notify_all()
        self._report(task)

    def _report(self, task: Task) -> None:
        """Forget an ended task and tell its caller."""
        self._tasks.pop(task.task_id, None)
        task.on_done(TaskDone(task.task_id, task.status, task.ok, task.mismatches))

    def _drop_corrupt(self, task: Task) -> None:
        """A block that was in host memory and did not match its checksum leaves it, with all below."""
        if not isinstance(task.plan, GetPlan):
            return
        bad = np.flatnonzero(~task.ok & ~task.unread())
        if len(bad):
            self._counters.corrupt_blocks += len(bad)
            self._cache.invalidate(task.plan, task.start_block + int(bad[0]), Tier.HOST)

    def _end(self, task: Task, status: KVResponseStatus) -> None:
        """Settle the plan with the index: publish what arrived, give back what did not."""
        task.status = status
        arrived = prefix_length(task.ok)
        if isinstance(task.plan, GetPlan):
            statuses = task.read_statuses
            read_ok = None if statuses is None or not len(statuses) else statuses == BlockStatus.OK
            self._cache.finish_get(task.plan, read_ok)
        elif arrived and task.plan is not None:
            self._cache.commit_put(task.plan, arrived)
            self._write_behind()
            if self._remote is not None:
                stop = KEY_BYTES * (task.start_block + arrived)
                self._remote.stored(task.sequence_keys[:stop], task.start_block)
        elif task.plan is not None:
            self._cache.abort_put(task.plan)
        task.forget_plan()

    def _write_behind(self) -> None:
        """Blocks have come to the host tier."""
        if self._ssd is not None:
            self._ssd.write_behind()


def _slot_count(config: FlexKVConfig, layout: KVLayout) -> int:
    count = slots_within(int(config.host_bytes), layout)
    if count < 1:
        raise CapacityError(
            f"host_bytes = {int(config.host_bytes)}: too small for one block of {layout.tokens_per_block} tokens,"
            f" which takes {layout.slot_bytes} bytes"
        )
    return count


def executor_for(device: DeviceCopier | Executor, config: FlexKVConfig) -> Executor:
    """``device`` itself where it is an executor, otherwise a new engine that copies with it."""
    if hasattr(device, "submit"):
        return cast(Executor, device)
    return TransferEngine(
        device,
        queue_ops_max=config.queue_ops_max,
        timeout_s=config.transfer_timeout_s,
        verify=config.verify_checksums,
    )
