"""KVManager: asynchronous get, put and prefetch of KV blocks by their tokens.

It hashes tokens to keys and keeps what its callers ask for later; the blocks are the business of a
:class:`~flexkv_core.block_manager.BlockManager`, or of whatever else has its methods. Every method may be called from any thread. Nothing here
raises for an expected outcome: what cannot be had is a miss, what cannot be kept is dropped, and both are counted.

A get is ``get_match`` (find and pin), ``launch`` (copy), ``wait``; a put is ``put_match`` (reserve), ``launch``, ``wait``. A match that
is not wanted must be given back with ``cancel``. Adapters, which know the keys of a request already, use the blocks' manager itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flexkv_core.block_manager import TASKS_MAX, BlockManager, ModelConfig
from flexkv_core.cache.tier_events import TierEvent
from flexkv_core.config import FlexKVConfig
from flexkv_core.keys import hash_tokens, namespace_root
from flexkv_core.layout import KVLayout
from flexkv_core.metrics import Counters
from flexkv_core.storage.memory import HostSegment
from flexkv_core.tasks import KVResponse, KVResponseStatus, OnDone, Purpose, TaskDone
from flexkv_core.token_tasks import TokenTask, first_true, last_true, token_array
from flexkv_core.transfer.layers import LayerStatus
from flexkv_core.transfer.plan import Delivery, DeviceCopier, Executor
from flexkv_core.types import BlockIds, Direction, TokenIds

__all__ = ["Blocks", "KVManager", "ModelConfig"]

logger = logging.getLogger(__name__)


COUNTERS_MAX = 1024
"""Counters of layers that are remembered; of older ones nothing is awaited."""


class Blocks(Protocol):
    """What a KVManager stands on: the methods of :class:`~flexkv_core.block_manager.BlockManager`, with its promises."""

    layout: KVLayout
    root: bytes

    def start(self) -> None:
        """Begin."""

    def is_ready(self) -> bool:
        """Whether tasks are taken."""

    def shutdown(self) -> None:
        """End; every task that was launched has reported when this returns."""

    def reset(self) -> None:
        """Forget everything that is cached."""

    @property
    def host(self) -> HostSegment:
        """The host tier's memory."""

    def counters(self) -> Counters:
        """A consistent copy of the counters."""

    def usage(self) -> tuple[int, int]:
        """Slots of the host tier that are taken, and all."""

    def take_events(self, blocks_max: int = 16384) -> list[TierEvent]:
        """What came to each tier and left it."""

    def match_keys(self, keys: bytes) -> int:
        """Blocks of the longest cached prefix."""

    def get_keys(
        self, keys: bytes, start_block: int, on_done: OnDone, purpose: Purpose = Purpose.GET
    ) -> tuple[int, int]:
        """Pin; the task and how many blocks."""

    def prefetch_keys(self, keys: bytes, start_block: int, on_done: OnDone) -> tuple[int, int]:
        """Read ahead; the task and how many blocks are read. With blocks but no reads it reports before it returns."""

    def fetch_keys(self, keys: bytes, on_end: Callable[[], None]) -> bool:
        """Bring what only the remote tier has to the host tier; whether ``on_end`` will be called."""

    def put_keys(self, keys: bytes, on_done: OnDone) -> tuple[int, int, int]:
        """Reserve; the task, its first block and how many blocks."""

    def launch_blocks(self, task_id: int, blocks: BlockIds, delivery: Delivery = Delivery.WHOLE) -> None:
        """Start a task's copy."""

    def wait_layers(self, task_id: int, count: int, timeout_s: float) -> LayerStatus:
        """Wait for the first layers of a get that is not delivered WHOLE."""

    def cancel(self, task_id: int) -> None:
        """Give up a task."""


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
        self._stand_on(BlockManager(model_config, cache_config, device, track_events))

    @classmethod
    def over(cls, blocks: Blocks) -> KVManager:
        """A manager of what is kept elsewhere; it owns ``blocks`` from now on."""
        manager = cls.__new__(cls)
        manager._stand_on(blocks)
        return manager

    def _stand_on(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.layout, self.root = blocks.layout, blocks.root
        self._changed = (
            threading.Condition()
        )  # never held while ``blocks`` is called, whose lock is held when it reports
        self._tasks: OrderedDict[int, TokenTask] = OrderedDict()
        self._counters: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    # Life

    def start(self) -> None:
        """Take the memory, open the lower tiers and start the executor; what :meth:`BlockManager.start` raises. Call once."""
        self.blocks.start()

    def is_ready(self) -> bool:
        """Whether tasks are taken."""
        return self.blocks.is_ready()

    def shutdown(self) -> None:
        """End the executor, write what waits for the SSD within ten seconds, and give the memory back. Tasks that still run are
        cancelled. A second call does nothing."""
        self.blocks.shutdown()

    def reset(self) -> None:
        """Forget everything that is cached. Transfers that run end on their own; what they bring is not found any more."""
        self.blocks.reset()

    @property
    def host(self) -> HostSegment:
        """The host tier's memory; after :meth:`start`."""
        return self.blocks.host

    def counters(self) -> Counters:
        """A consistent copy of the counters."""
        return self.blocks.counters()

    def usage(self) -> tuple[int, int]:
        """Slots of the host tier that are taken, and all."""
        return self.blocks.usage()

    def take_events(self, blocks_max: int = 16384) -> list[TierEvent]:
        """What came to each tier and left it, :meth:`reset` aside, oldest first, about ``blocks_max`` blocks a call; empty unless tracked."""
        return self.blocks.take_events(blocks_max)

    # Tasks

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
        task = TokenTask(len(tokens), start)
        keys = self._keys(tokens, namespace)
        task.task_id, task.block_count = self.blocks.get_keys(keys, start, self._reporter(task))
        self._remember(task)
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
        task = TokenTask(len(tokens), direction=Direction.STORE)
        keys = self._keys(tokens[:stop], namespace)
        task.task_id, task.start_block, task.block_count = self.blocks.put_keys(keys, self._reporter(task))
        self._remember(task)
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
        task = TokenTask(len(tokens), launched=True)
        keys = self._keys(tokens, namespace)
        task.task_id, task.block_count = self.blocks.prefetch_keys(keys, 0, self._reporter(task))
        self._remember(task)
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
            layerwise_transfer: deliver gets layer by layer, see :meth:`wait_layers`. A task is reported when all its layers are there.
            counter_id: a name of the caller's for the gets of this launch; what was launched layerwise under it before is not awaited
                any more.
            as_batch: accepted for callers of the reference API.

        Raises:
            ValueError: a mapping has another length, or does not follow blocks; its task is cancelled.
        """
        assert len(task_ids) == len(slot_mappings), (len(task_ids), len(slot_mappings))
        if layerwise_transfer:
            self._count_layers(counter_id, task_ids)
        for task_id, slot_mapping in zip(task_ids, slot_mappings, strict=True):
            task = self._take_unlaunched(task_id)
            if task is None:
                continue
            try:
                blocks = task.device_blocks(
                    np.asarray(slot_mapping, np.int64),
                    self.layout.tokens_per_block,
                    self.layout.device_block_tokens,
                )
            except ValueError:
                self._drop(task)
                raise
            is_layerwise = layerwise_transfer and task.direction is Direction.LOAD
            self.blocks.launch_blocks(task_id, blocks, Delivery.LAYERWISE if is_layerwise else Delivery.WHOLE)

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

    def wait_layers(self, layers: int, counter_id: int = 0, timeout: float = 20.0) -> bool:
        """Wait at most ``timeout`` seconds until the first ``layers`` layers of all gets that were last launched layerwise under
        ``counter_id`` may be read; with 0, until all their blocks were found whole in host memory, which comes first.

        To be called by the thread that gives the device its work: what it gives from now on reads the layers' bytes (on a GPU the
        device waits, not the thread). False when the time is over or a block will be missing: then only :meth:`wait` tells what may
        be read. A manager whose device is an executor of other processes always says False.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            task_ids = self._counters.get(counter_id, ())
        return all(
            self.blocks.wait_layers(task_id, layers, max(0.0, deadline - time.monotonic()))
            is LayerStatus.READY
            for task_id in task_ids
        )

    def try_wait(self, task_ids: int | Iterable[int]) -> dict[int, KVResponse]:
        """The tasks' state now; what ended is forgotten."""
        ids = [task_ids] if isinstance(task_ids, int) else list(task_ids)
        with self._changed:
            return {task_id: self._response(task_id, KVResponseStatus.UNREADY) for task_id in ids}

    def cancel(self, task_ids: int | Iterable[int]) -> None:
        """Give up tasks. A copy that runs already ends first; its slots return then."""
        for task_id in [task_ids] if isinstance(task_ids, int) else list(task_ids):
            task = self._take_unlaunched(task_id)
            if task is not None:
                self._drop(task)
            else:
                self.blocks.cancel(task_id)

    # Inside

    def _count_layers(self, counter_id: int, task_ids: Sequence[int]) -> None:
        """Remember which gets a counter stands for; those that move nothing have nothing to wait for."""
        with self._changed:
            tasks = {task_id: self._tasks.get(task_id) for task_id in task_ids}
            self._counters[counter_id] = tuple(
                task_id
                for task_id, task in tasks.items()
                if task is not None and task.block_count and task.direction is Direction.LOAD
            )
            self._counters.move_to_end(counter_id)
            if len(self._counters) > COUNTERS_MAX:
                self._counters.popitem(last=False)

    def _keys(self, tokens: TokenIds, namespace: Sequence[str] | None) -> bytes:
        return hash_tokens(namespace_root(self.root, namespace or ()), tokens, self.layout.tokens_per_block)

    def _reporter(self, task: TokenTask) -> OnDone:
        def ended(done: TaskDone) -> None:
            with self._changed:
                task.end(done)
                self._changed.notify_all()

        return ended

    def _remember(self, task: TokenTask) -> None:
        """Enter a new task, which has ended if it moves nothing. The oldest whose caller is gone makes room where there are too many."""
        dropped = None
        with self._changed:
            if not task.block_count and not task.ended:
                task.status = KVResponseStatus.SUCCESS
            if len(self._tasks) >= TASKS_MAX:
                dropped = next((old for old in self._tasks.values() if old.ended or not old.launched), None)
            if dropped is not None:
                del self._tasks[dropped.task_id]
            self._tasks[task.task_id] = task
        if dropped is not None and not dropped.ended:
            logger.warning("task %d was matched and neither launched nor cancelled: dropped", dropped.task_id)
            self._drop(dropped)

    def _take_unlaunched(self, task_id: int) -> TokenTask | None:
        """The task, if it waits for its launch; from now on nobody else launches it."""
        with self._changed:
            task = self._tasks.get(task_id)
            if task is None or task.launched or task.ended:
                return None
            task.launched = True
            return task

    def _drop(self, task: TokenTask) -> None:
        """End a task that was not launched and will not be."""
        with self._changed:
            task.status = KVResponseStatus.CANCELLED
            self._changed.notify_all()
        self.blocks.cancel(task.task_id)

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
        return task.response(self.layout.tokens_per_block)
