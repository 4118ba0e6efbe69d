"""Stores within a step: a layer's blocks are copied as soon as attention has run on it, while the next layers are computed.

vLLM says so by ``save_kv_layer``. What makes them right:

- A step's stores and their blocks are known before its forward, and stay the request's until the stores have ended. Each layer writes its
  part of a block once a step, before its hook is called.
- The last layer is announced only behind the step. Until then the store is given up if the step turns out to have computed from missing
  bytes, or if a layer was announced twice: then it may have been copied between two writes. No store layer by layer begins in that engine
  any more. (vLLM cuts a step in two with dual-batch overlap; a drafter runs several times.)
- Where no layer is announced, as when a graph of the whole forward runs, no store has begun, and all are copied whole behind the
  step. Layers that lie between announced ones and are not announced themselves are copied behind it as well.
- Layers of several groups share memory: a part of it counts as written when all its layers are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from flexkv_core.config import FlexKVConfig
from flexkv_core.transfer.engine import TransferEngine
from flexkv_core.transfer.plan import Delivery, TransferOp
from flexkv_vllm.drafts import keeps_kv

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

Submit = Callable[[TransferOp], TransferEngine | None]
"""Starts an op and returns the engine that has it; None: it was reported as failed."""


class InStepStorePolicy:
    """Which stores may be copied within their step, by size. On the scheduler's thread."""

    def __init__(self, vllm_config: VllmConfig, config: FlexKVConfig) -> None:
        self._bytes_min = int(config.layerwise_store_bytes_min)
        refused = {
            "store_dtype: fp8, which rounds a block as a whole": config.store_dtype != "engine",
            "a drafter that keeps KV, which writes its layers several times a step": keeps_kv(vllm_config),
        }
        reasons = [reason for reason, is_so in refused.items() if is_so]
        if self._bytes_min and reasons:
            logger.warning("layerwise_store_bytes_min has no effect with %s", " and ".join(reasons))
            self._bytes_min = 0

    def delivery(self, store_bytes: int) -> Delivery:
        """How a store of this size, of all ranks, is copied."""
        is_large = self._bytes_min and store_bytes >= self._bytes_min
        return Delivery.LAYERWISE if is_large else Delivery.WHOLE


class InStepStores:
    """A worker's stores layer by layer of the step that runs. On the worker's main thread, which submits the step's work to the device.

    Args:
        layers: the layers by name, counted as the device's segments are.
        layer_count: of the device's segments.
        timeout_s: of a transfer.
    """

    def __init__(self, layers: Mapping[str, int], layer_count: int, timeout_s: float) -> None:
        self._layers = layers
        self._layer_count = layer_count
        self._timeout_s = timeout_s
        self._names = Counter(layers.values())
        self._is_usable = 1 < layer_count == len(self._names)
        self._offered: Sequence[TransferOp] = ()
        self._engine: TransferEngine | None = None
        self._begun: frozenset[int] = frozenset()
        self._seen: set[str] = set()
        self._missing: dict[int, int] = {}  # layer -> names that are not announced yet
        self._written = 0
        self._is_repeated = False

    def offer(self, ops: Collection[TransferOp]) -> None:
        """A step begins: its stores. One that was never ended, because the step before it broke, is given up."""
        self.end(keep=False)
        if self._is_usable:
            self._offered = [op for op in ops if op.delivery is Delivery.LAYERWISE]

    def written(self, name: str, submit: Submit) -> None:
        """The device has been given the work that writes the layer; the first one begins the stores."""
        if not self._offered:
            return
        if name in self._seen:
            self._is_repeated = True
            return
        self._seen.add(name)
        if name not in self._layers:
            return
        if not self._begun:
            self._begin(submit)
        self._missing[self._layers[name]] -= 1
        before = self._written
        # Not the last one, which ends a store.
        while self._written < self._layer_count - 1 and not self._missing[self._written]:
            self._written += 1
        if self._engine is not None and self._written > before and not self._is_repeated:
            self._engine.layers_written(self._begun, self._written)

    def end(self, keep: bool) -> frozenset[int]:
        """The step's forward was given to the device in full; ``keep``: what it computed is right. Returns the stores that were begun,
        which are reported in any case; the others are still to be started."""
        begun = self._begun
        if self._is_repeated:
            self._is_usable = False
            logger.warning(
                "the engine announced a layer twice in a step: from now on its stores are copied whole"
            )
        if self._engine is not None and keep and not self._is_repeated:
            self._engine.layers_written(begun, self._layer_count)
        elif self._engine is not None:
            self._engine.abandon(begun)
            # The step's own report tells of it: the blocks are planned anew with what the engine computes next.
            self._engine.drain(begun, self._timeout_s)
        self._offered, self._begun, self._engine = (), frozenset(), None
        self._seen.clear()
        self._written, self._is_repeated = 0, False
        return begun

    def _begin(self, submit: Submit) -> None:
        self._missing = dict(self._names)
        for op in self._offered:
            self._engine = submit(op) or self._engine
        self._begun = frozenset(op.op_id for op in self._offered)
