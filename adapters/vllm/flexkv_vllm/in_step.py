"""Loads within a step: the request is in the batch at once, and attention on a layer waits for that layer's bytes, while the next ones come.

vLLM calls them synchronous. What makes them right:

- A block that fails is told before the step's results are used: the workers wait for every such load's end, its checksums included, before
  they report, and vLLM then discards what the request computed, and computes it again from the first block that is missing.
- That holds where one step is under way at a time: not with asynchronous scheduling, nor with pipeline stages. Nor with speculative
  decoding, where a drafter has guessed what follows a token that is then taken back.
- vLLM enters the blocks of such a request in its prefix cache when it takes them. After a failure, others could find them there and read
  them before they are computed again. So the request must be the only one that can be scheduled in this step for the first time, and
  after a failure its blocks leave the prefix cache.
- What the step computed from missing bytes is never stored.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from flexkv_core.config import FlexKVConfig
from flexkv_core.transfer.engine import TransferEngine
from flexkv_core.transfer.layers import LayerStatus

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager

logger = logging.getLogger(__name__)

END_TIMEOUTS = 3
"""How many times the transfers' own timeout a load may take to end: the wait of its turn, the copy, and some more. A device that takes
longer may write at any later time, so the worker ends with an error rather than go on."""


class InStepPolicy:
    """Which hits are loaded within the step. On the scheduler's thread.

    It knows every request of the engine from :meth:`arrived` to :meth:`left`; where the engine's version does not tell of arrivals, or does
    not show its prefix cache, no load is within a step.
    """

    def __init__(self, vllm_config: VllmConfig, config: FlexKVConfig) -> None:
        parallel, scheduling = vllm_config.parallel_config, vllm_config.scheduler_config
        self._is_safe = (
            parallel.pipeline_parallel_size == 1
            and not scheduling.async_scheduling
            and vllm_config.speculative_config is None
        )
        self._bytes_max = int(config.layerwise_bytes_max)
        if self._bytes_max and not self._is_safe:
            logger.warning(
                "layerwise_bytes_max has no effect with asynchronous scheduling, pipeline stages or speculative decoding: a step that"
                " is taken back must be the last"
            )
        self._cache: KVCacheManager | None = None
        self._requests: set[str] = set()

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """The engine's cache, of which blocks that failed must leave the prefix cache."""
        self._cache = kv_cache_manager

    def arrived(self, request_id: str) -> None:
        """The engine has a request more."""
        self._requests.add(request_id)

    def left(self, request_id: str) -> None:
        """The request has ended, in whatever way."""
        self._requests.discard(request_id)

    def allows(self, request_id: str, load_bytes: int) -> bool:
        """Whether a load of this size from host memory may be within the step: it holds whoever else is in the batch, so there must be
        nobody else."""
        return (
            self._is_safe
            and self._cache is not None
            and load_bytes <= self._bytes_max
            and self._requests == {request_id}
        )

    def failed(self, device_blocks: Collection[int]) -> None:
        """Blocks of a load within a step that hold wrong bytes until they are computed again."""
        assert self._cache is not None
        self._cache.evict_blocks(set(device_blocks))


class InStepLoads:
    """A worker's loads within the step that runs. On the worker's main thread, which submits the step's work to the device.

    Args:
        layers: the layers by name, counted as the device's segments are.
        timeout_s: of a transfer.
    """

    def __init__(self, layers: Mapping[str, int], timeout_s: float) -> None:
        self._layers = layers
        self._timeout_s = timeout_s
        self._engine: TransferEngine | None = None
        self._reached: dict[int, int] = {}  # load that is waited for -> layers that it has reached
        self._running: list[int] = []
        self._unwaited: set[int] = set()

    def begin(self, engine: TransferEngine, op_id: int) -> None:
        """A load was submitted to ``engine``, the same for all."""
        self._engine = engine
        self._reached[op_id] = 0
        self._running.append(op_id)

    def wait_for_layer(self, name: str) -> None:
        """What is given to the device from now on reads the layer's loaded bytes; unless the load fails, which :meth:`end` reports."""
        if not self._reached or name not in self._layers:
            return
        assert self._engine is not None
        count = self._layers[name] + 1
        for op_id in list(self._reached):
            status = self._engine.wait_layers(op_id, count, self._timeout_s)
            if status is LayerStatus.READY:
                self._reached[op_id] = count
                continue
            del self._reached[op_id]
            if status is LayerStatus.LATE:
                logger.error(
                    "load %d did not reach layer %s in %.1f s: dropped", op_id, name, self._timeout_s
                )
                self._unwaited.add(op_id)

    def end(self) -> set[int]:
        """Wait until no load writes to its blocks any more; those of which the step may have read a layer too early, and so have failed.

        Raises:
            RuntimeError: a load does not end.
        """
        if not self._running:
            return set()
        assert self._engine is not None
        timeout_s = END_TIMEOUTS * self._timeout_s
        if not self._engine.drain(self._running, 0):
            self._engine.help(timeout_s)  # with what is still to be checked
        if not self._engine.drain(self._running, timeout_s):
            raise RuntimeError(
                f"FlexKV: a load did not end within {timeout_s:g} s; the device may still write"
            )
        # An engine that does not announce its layers, as within a graph of the whole forward, has read them unasked.
        unannounced = {op_id for op_id, count in self._reached.items() if count < self._engine.layer_count}
        if unannounced:
            logger.error(
                "the engine announced only some of its layers: loads %s dropped", sorted(unannounced)
            )
        unwaited, self._unwaited = self._unwaited | unannounced, set()
        self._reached.clear()
        self._running.clear()
        return unwaited
