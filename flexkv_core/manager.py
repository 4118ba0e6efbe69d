"""KVManager: asynchronous get, put and prefetch of KV blocks by their tokens.

One manager owns the index of all tiers and the memory of the host tier; an :class:`~flexkv_core.transfer.plan.Executor` moves the
bytes. Every method may be called from any thread. Nothing here raises for an expected outcome: what cannot be had is a miss, what
cannot be kept is dropped, and both are counted.

A get is ``get_match`` (find and pin), ``launch`` (copy), ``wait``; a put is ``put_match`` (reserve), ``launch``, ``wait``. A match that
is not wanted must be given back with ``cancel``. The methods that take ``keys`` instead of tokens serve adapters, which know the keys of
a request already; their tasks report to ``on_done``, on any thread and under the manager's lock, and are never waited for.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from flexkv_core.cache.engine import GlobalCacheEngine
from flexkv_core.cache.plans import GetPlan
from flexkv_core.cache.tier_events import TierEvent
from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import CapacityError, ClosedError
from flexkv_core.keys import fingerprint, hash_tokens, namespace_root
from flexkv_core.layout import KVLayout
from flexkv_core.metrics import Counters
from flexkv_core.ssd_link import SsdLink, ssd_spec
from flexkv_core.storage.base import BlockStatus, SsdSpec, Statuses
from flexkv_core.storage.directory import slot_count as ssd_slot_count
from flexkv_core.storage.memory import HostSegment, slots_within
from flexkv_core.tasks import (
    NO_STATUSES,
    KVResponse,
    KVResponseStatus,
    OnDone,
    Purpose,
    Task,
    TaskDone,
    first_true,
    last_true,
    prefix_length,
    token_array,
)
from flexkv_core.transfer.engine import TransferEngine
from flexkv_core.transfer.plan import DeviceCopier, Executor, OpResult, OpStatus, TransferOp
from flexkv_core.types import KEY_BYTES, BlockIds, Direction, Tier, TokenIds
from flexkv_core.verify import settle_check

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
"""What :meth:`KVManager.shutdown` gives the SSD tier to write what waits."""

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


class KVManager:
    """See the module's text.

    Args:
        model_config: what the bytes are.
        cache_config: the tiers and their limits.
        device: a copier of this process's device, or an executor that reaches other processes' devices.
        track_events: collect what comes to each tier and leaves it, for :meth:`take_events`.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        cache_config: FlexKVConfig,
        device: DeviceCopier | Executor,
        track_events: bool = False,
    ) -> None:
        self.layout = model_config.layout
        self.config = cache_config
        self._identity = {**model_config.identity, "namespace": cache_config.namespace}
        self.root = fingerprint({**self._identity, "layout": repr(self.layout)})
        self._executor: Executor = device if _is_executor(device) else _engine_for(device, cache_config)  # type: ignore[arg-type,assignment]
        self._slot_count = _slot_count(cache_config, self.layout)
        self._changed = threading.Condition(threading.RLock())
        self._tasks: OrderedDict[int, Task] = OrderedDict()
        self._next_task_id = 0
        self._counters = Counters()
        self._host: HostSegment | None = None
        self._closed = False
        self._ssd_spec = ssd_spec(cache_config, self.layout, self._identity, model_config.replica)
        capacities = {Tier.HOST: self._slot_count}
        if self._ssd_spec is not None:
            capacities[Tier.SSD] = ssd_slot_count(self._ssd_spec)
        self._cache = GlobalCacheEngine(capacities, eviction=cache_config.eviction, track_events=track_events)
        self._ssd: SsdLink | None = None

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
                raise ClosedError("KVManager was shut down")
            assert self._host is None, "KVManager.start() was called twice"
            self._host = HostSegment.create(self._slot_count, self.layout, self.config.huge_pages)
            if self._ssd_spec is not None:
                self._open_ssd(self._ssd_spec, self._host)
            self._host.populate()
            self._executor.start(self._host, self._on_result)
        logger.info(
            "host tier: %d blocks of %d tokens, %d bytes each",
            self._slot_count,
            self.layout.tokens_per_block,
            self.layout.slot_bytes,
        )

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
            if self._ssd is not None:
                self._ssd.close(CLOSE_TIMEOUT_S)
            self._host.close()
        with self._changed:
            for task in list(self._tasks.values()):
                self._end(task, KVResponseStatus.CANCELLED)
            self._changed.notify_all()

    def reset(self) -> None:
        """Forget everything that is cached. Transfers that run end on their own; what they bring is not found any more."""
        with self._changed:
            self._cache.reset()
            if self._ssd is not None:
                self._ssd.clear()

    @property
    def host(self) -> HostSegment:
        """The host tier's memory; after :meth:`start`."""
        assert self._host is not None
        return self._host

    def counters(self) -> Counters:
        """A consistent copy of the counters."""
        with self._changed:
            stats, ssd = self._cache.stats, self._ssd
            counters = replace(
                self._counters,
                evicted_blocks=stats.blocks_evicted,
                ssd_evicted_blocks=stats.ssd_blocks_evicted,
            )
            if ssd is None:
                return counters
            return replace(
                counters,
                ssd_read_blocks=ssd.read_blocks,
                ssd_written_blocks=ssd.written_blocks,
                ssd_corrupt_blocks=ssd.corrupt_blocks,
                ssd_restarts=ssd.restarts,
            )

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

    # By tokens

    def get_match(
        self,
        token_ids: TokenIds,
        token_mask: npt.NDArray[np.bool_] | None = None,
        namespace: Sequence[str] | None = None,
    ) -> tuple[int, npt.NDArray[np.bool_]]:
        """Find the longest cached prefix and pin it until the task ends.

        Args:
            token_ids: int32 or int64 [tokens]; the tail that fills no block is dropped.
            token_mask: bool [tokens], True from the first token that is wanted on; the block that holds it is the first to be loaded.
            namespace: strings that separate caches: only the same ones share.

        Returns:
            The task, and bool [tokens]: True for the tokens that :meth:`launch` will load.
        """
        tokens = token_array(token_ids)
        start = first_true(token_mask, len(tokens)) // self.layout.tokens_per_block
        task = self._begin_get(self._keys(tokens, namespace), start, len(tokens))
        return task.task_id, task.mask(task.block_count, self.layout.tokens_per_block)

    def put_match(
        self,
        token_ids: TokenIds,
        token_mask: npt.NDArray[np.bool_] | None = None,
        namespace: Sequence[str] | None = None,
    ) -> tuple[int, npt.NDArray[np.bool_]]:
        """Reserve slots for the blocks that are not cached yet, evicting where room is short.

        ``token_mask``: bool [tokens], True for the tokens that may be stored; what follows its last True is not.

        Returns:
            The task, and bool [tokens]: True for the tokens that :meth:`launch` will store. Possibly none: all known, or no room.
        """
        tokens = token_array(token_ids)
        stop = len(tokens) if token_mask is None else last_true(token_mask, len(tokens))
        task = self._begin_put(self._keys(tokens[:stop], namespace), len(tokens))
        if (
            token_mask is not None
            and task.block_count
            and not token_mask[task.start_block * self.layout.tokens_per_block]
        ):
            self.cancel([task.task_id])  # an earlier block is missing that the caller does not hold
        return task.task_id, task.mask(task.block_count, self.layout.tokens_per_block)

    def get_async(
        self,
        token_ids: TokenIds,
        slot_mapping: npt.NDArray[np.int64],
        token_mask: npt.NDArray[np.bool_] | None = None,
        namespace: Sequence[str] | None = None,
    ) -> int:
        """:meth:`get_match` and :meth:`launch` in one; ``slot_mapping`` covers all tokens."""
        task_id, _ = self.get_match(token_ids, token_mask, namespace)
        self.launch([task_id], [slot_mapping])
        return task_id

    def put_async(
        self,
        token_ids: TokenIds,
        slot_mapping: npt.NDArray[np.int64],
        token_mask: npt.NDArray[np.bool_] | None = None,
        namespace: Sequence[str] | None = None,
    ) -> int:
        """:meth:`put_match` and :meth:`launch` in one; ``slot_mapping`` covers all tokens."""
        task_id, _ = self.put_match(token_ids, token_mask, namespace)
        self.launch([task_id], [slot_mapping])
        return task_id

    def prefetch_async(self, token_ids: TokenIds, namespace: Sequence[str] | None = None) -> int:
        """Bring what lies in lower tiers to the host tier, and mark the prefix as recently used; the task's mask tells what is there."""
        tokens = token_array(token_ids)
        task = self._begin_get(self._keys(tokens, namespace), 0, len(tokens), purpose=Purpose.PREFETCH)
        self._read_ahead(task)
        return task.task_id

    def launch(
        self,
        task_ids: Sequence[int],
        slot_mappings: Sequence[npt.NDArray[np.int64]],
        as_batch: bool = False,
        layerwise_transfer: bool = False,
        counter_id: int = 0,
    ) -> None:
        """Start the copies of matched tasks.

        Args:
            slot_mappings: per task int64: the place of each token in the engine's paged cache, for all tokens of the sequence or for
                those of the returned mask. The tokens of one device block have consecutive places.
            as_batch, layerwise_transfer, counter_id: accepted for callers of the reference API. A task is reported when all its
                layers are there.

        Raises:
            ValueError: a mapping has another length, or does not follow blocks; its task is cancelled.
        """
        assert len(task_ids) == len(slot_mappings), (len(task_ids), len(slot_mappings))
        for task_id, slot_mapping in zip(task_ids, slot_mappings, strict=True):
            task = self._tasks.get(task_id)
            if task is None or task.launched or task.ended:
                continue
            try:
                blocks = task.device_blocks(
                    np.asarray(slot_mapping, np.int64),
                    self.layout.tokens_per_block,
                    self.layout.device_block_tokens,
                )
            except ValueError:
                self.cancel([task_id])
                raise
            self.launch_blocks(task_id, blocks)

    def wait(
        self, task_ids: int | Iterable[int], timeout: float = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """Wait at most ``timeout`` seconds until all tasks ended. What ended is forgotten; TIMEOUT marks what did not.

        ``completely``: wait for lower tiers as well (the host tier is the only one that a put waits for today).
        """
        ids = [task_ids] if isinstance(task_ids, int) else list(task_ids)
        with self._changed:
            self._changed.wait_for(lambda: all(self._ended(task_id) for task_id in ids), timeout)
            return {task_id: self._response(task_id, KVResponseStatus.TIMEOUT) for task_id in ids}

    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """The tasks' state now; what ended is forgotten."""
        ids = [task_ids] if isinstance(task_ids, int) else list(task_ids)
        with self._changed:
            return {task_id: self._response(task_id, KVResponseStatus.UNREADY) for task_id in ids}

    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """Give up tasks. A copy that runs already ends first; its slots return then."""
        for task_id in [task_ids] if isinstance(task_ids, int) else list(task_ids):
            with self._changed:
                task = self._tasks.get(task_id)
                if task is None or task.ended:
                    continue
                task.cancelled = True
                if not task.launched:
                    self._end(task, KVResponseStatus.CANCELLED)
                    if task.on_done is not None:
                        del self._tasks[task_id]
                    continue
            self._executor.cancel(task_id)

    # By keys, for adapters

    def match_keys(self, keys: bytes) -> int:
        """Blocks of the longest cached prefix of ``keys``; pins nothing, changes nothing."""
        with self._changed:
            return 0 if self._closed else self._cache.match(keys)

    def get_keys(
        self, keys: bytes, start_block: int, on_done: OnDone, purpose: Purpose = Purpose.GET
    ) -> tuple[int, int]:
        """Pin the cached prefix of ``keys`` from ``start_block`` on, to load it or to CHECK it (the executor then compares instead of
        copying); the task and how many blocks it is for (0: nothing to launch)."""
        task = self._begin_get(keys, start_block, 0, on_done, purpose)
        return task.task_id, task.block_count

    def prefetch_keys(self, keys: bytes, start_block: int, on_done: OnDone) -> tuple[int, int]:
        """Bring blocks ``start_block`` … of the cached prefix of ``keys`` to the host tier; the task and how many are read."""
        task = self._begin_get(keys, start_block, 0, on_done, Purpose.PREFETCH)
        reads = task.read_count
        self._read_ahead(task)
        return task.task_id, reads

    def put_keys(self, keys: bytes, on_done: OnDone) -> tuple[int, int, int]:
        """Reserve slots for what is new in ``keys``; the task, its first block and how many (0: nothing to launch)."""
        task = self._begin_put(keys, 0, on_done)
        return task.task_id, task.start_block, task.block_count

    def launch_blocks(self, task_id: int, blocks: BlockIds) -> None:
        """Start a task's copy. ``blocks``: int64 [blocks of the task * blocks_per_slot], device blocks in order."""
        with self._changed:
            task = self._tasks[task_id]
            assert not task.launched
            assert len(blocks) == task.block_count * self.layout.blocks_per_slot
            task.launched = True
            op = TransferOp(task_id, task.direction, task.keys, task.slots, blocks, task.awaited())
            self._start_reads(task)
        self._executor.submit(op)

    # Inside

    def _keys(self, tokens: TokenIds, namespace: Sequence[str] | None) -> bytes:
        return hash_tokens(namespace_root(self.root, namespace or ()), tokens, self.layout.tokens_per_block)

    def _begin_get(
        self, keys: bytes, start: int, tokens: int, done: OnDone | None = None, purpose: Purpose = Purpose.GET
    ) -> Task:
        with self._changed:
            plan = self._cache.plan_get(keys if not self._closed else b"", start)
            if purpose is Purpose.GET:
                self._counters.lookups += 1
                self._counters.lookup_tokens += len(keys) // KEY_BYTES * self.layout.tokens_per_block
                self._counters.hit_tokens += len(plan.host_slots) * self.layout.tokens_per_block
            elif purpose is Purpose.CHECK:  # what has left the cache since it was chosen
                self._counters.verify_skipped += len(keys) // KEY_BYTES - start - len(plan.host_slots)
            of_plan = (plan, start, plan.keys, plan.host_slots)
            return self._remember(Task(self._new_id(), Direction.LOAD, *of_plan, tokens, done, purpose))

    def _begin_put(self, keys: bytes, tokens: int, on_done: OnDone | None = None) -> Task:
        with self._changed:
            plan = self._cache.plan_put(keys if not self._closed else b"")
            self._counters.dropped_blocks += max(0, len(keys) // KEY_BYTES - plan.start_block - plan.count)
            of_plan = (plan, plan.start_block, plan.keys, plan.slots)
            return self._remember(Task(self._new_id(), Direction.STORE, *of_plan, tokens, on_done))

    def _new_id(self) -> int:
        self._next_task_id += 1
        return self._next_task_id

    def _remember(self, task: Task) -> Task:
        """Enter a new task; one that moves nothing has ended already, and one by keys is then not kept."""
        if task.block_count and len(self._tasks) >= TASKS_MAX:
            self._make_room()
        if task.block_count and len(self._tasks) >= TASKS_MAX:
            self._end(task, KVResponseStatus.FAILED)
        elif not task.block_count:
            self._end(task, KVResponseStatus.SUCCESS)
        if task.on_done is None or task.block_count:
            self._tasks[task.task_id] = task
        return task

    def _make_room(self) -> None:
        """Forget the oldest task that ended or was never launched: its caller is gone."""
        for task_id, task in self._tasks.items():
            if not task.launched or task.ended:
                if not task.ended:
                    logger.warning("task %d was matched and neither launched nor cancelled: dropped", task_id)
                    self._end(task, KVResponseStatus.CANCELLED)
                self._tasks.pop(task_id, None)
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
        )
        ssd.start()
        self._ssd = ssd

    def _read_ahead(self, task: Task) -> None:
        """Start a prefetch: a get without the copy."""
        with self._changed:
            if not task.ended:
                task.launched = task.copied = True
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
                self._count(task, result)
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
        elif task.copy_status is OpStatus.DONE:
            self._drop_corrupt(task)
        self._end(task, KVResponseStatus.CANCELLED if task.cancelled else status)
        self._changed.notify_all()
        if task.on_done is not None:
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
            if self._ssd is not None:
                self._ssd.write_behind()
        elif task.plan is not None:
            self._cache.abort_put(task.plan)
        task.forget_plan()

    def _count(self, task: Task, result: OpResult) -> None:
        counters, blocks = self._counters, int(result.ok.sum())
        size = self.layout.shard_bytes * self.layout.shard_count
        if task.direction is Direction.LOAD:
            counters.loaded_blocks += blocks
            counters.loaded_bytes += blocks * size
            counters.load_seconds += result.seconds
            counters.failed_loads += result.status is OpStatus.FAILED
        else:
            counters.stored_blocks += blocks
            counters.stored_bytes += blocks * size
            counters.store_seconds += result.seconds
            counters.failed_stores += result.status is OpStatus.FAILED

    def _ended(self, task_id: int) -> bool:
        task = self._tasks.get(task_id)
        return task is None or task.ended

    def _response(self, task_id: int, unready: KVResponseStatus) -> KVResponse:
        task = self._tasks.get(task_id)
        if task is None:
            return KVResponse(KVResponseStatus.NOTFOUND, task_id)
        if not task.ended:
            return KVResponse(unready, task_id)
        del self._tasks[task_id]
        return KVResponse(
            task.status, task_id, task.mask(prefix_length(task.ok), self.layout.tokens_per_block)
        )


def _slot_count(config: FlexKVConfig, layout: KVLayout) -> int:
    count = slots_within(int(config.host_bytes), layout)
    if count < 1:
        raise CapacityError(
            f"host_bytes = {int(config.host_bytes)}: too small for one block of {layout.tokens_per_block} tokens,"
            f" which takes {layout.slot_bytes} bytes"
        )
    return count


def _engine_for(copier: DeviceCopier, config: FlexKVConfig) -> TransferEngine:
    return TransferEngine(
        copier,
        queue_ops_max=config.queue_ops_max,
        timeout_s=config.transfer_timeout_s,
        verify=config.verify_checksums,
    )


def _is_executor(device: object) -> bool:
    return hasattr(device, "submit")
