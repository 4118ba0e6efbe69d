"""A paged cache of CPU tensors, and a copier around the real one that fails on demand."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import TransferError
from flexkv_core.layout import KVLayout
from flexkv_core.manager import KVManager, ModelConfig
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import STORE_PIECE_BYTES, TransferOp
from flexkv_kernels import CpuCopier

BLOCK_TOKENS = 16
LAYERS = 3


class FaultyCopier:
    """Delegates to ``inner``; ``fail`` makes copies raise, ``hold`` makes them wait until it is set; ``hold_layer`` is called with each
    layer's number before it is published, or, the first of some, before they are stored."""

    concurrent = True
    store_piece_bytes = STORE_PIECE_BYTES

    def __init__(self, inner: CpuCopier) -> None:
        self.inner = inner
        self.segments = inner.segments
        self.fail = False
        self.hold = threading.Event()
        self.hold.set()
        self.entered = threading.Event()
        self.order: list[int] = []
        self.is_closed = False
        self.hold_layer: Callable[[int], object] = lambda layer: None

    def bind(self, host: HostSegment, shard: int) -> None:
        self.inner.bind(host, shard)

    def close(self) -> None:
        self.is_closed = True
        self.inner.close()

    def mark(self) -> object:
        return self.inner.mark()

    def gather(self, op: TransferOp, after: object, layers: range | None = None) -> None:
        self._enter(op)
        if layers is not None:
            self.hold_layer(layers.start)
        self.inner.gather(op, after, layers)

    def scatter(self, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        self._enter(op)
        return self.inner.scatter(op, after, verify)

    def scatter_layers(self, op: TransferOp, after: object, on_layer: Callable[[object], None]) -> None:
        self._enter(op)
        layers = itertools.count()

        def publish(layer: object) -> None:
            self.hold_layer(next(layers))
            on_layer(layer)

        self.inner.scatter_layers(op, after, publish)

    def follow(self, layer: object) -> None:
        self.inner.follow(layer)

    def _enter(self, op: TransferOp) -> None:
        self.order.append(op.op_id)
        self.entered.set()
        assert self.hold.wait(30)
        if self.fail:
            raise TransferError("injected")


class Device:
    """``blocks`` blocks of 16 tokens in three layers, K and V."""

    def __init__(self, blocks: int = 64) -> None:
        self.tensors = [torch.zeros(blocks, 2, BLOCK_TOKENS, 2, 8) for _ in range(LAYERS)]
        self.copier = FaultyCopier(CpuCopier.from_tensors(self.tensors))

    def fill(self, block: int, seed: int) -> None:
        """Bytes that tell ``seed`` and the layer apart from all others."""
        for layer, tensor in enumerate(self.tensors):
            tensor[block] = torch.rand(
                tensor.shape[1:], generator=torch.Generator().manual_seed(seed * LAYERS + layer)
            )

    def holds(self, block: int, seed: int) -> bool:
        want = Device(1)
        want.fill(0, seed)
        return all(
            torch.equal(mine[block], theirs[0])
            for mine, theirs in zip(self.tensors, want.tensors, strict=True)
        )

    def layout(self, tokens_per_block: int = BLOCK_TOKENS) -> KVLayout:
        return KVLayout(tokens_per_block, BLOCK_TOKENS, self.copier.segments.block_bytes)

    def manager(
        self, slots: int = 256, tokens_per_block: int = BLOCK_TOKENS, **settings: object
    ) -> KVManager:
        layout = self.layout(tokens_per_block)
        host_bytes = (2 << 20) + slots * (layout.slot_bytes + 12)
        config = FlexKVConfig(host_bytes=host_bytes, **settings)  # type: ignore[arg-type]
        manager = KVManager(ModelConfig({"model": "test"}, layout), config, self.copier)
        manager.start()
        return manager


def places(blocks: list[int]) -> npt.NDArray[np.int64]:
    """Slot mapping of whole device blocks."""
    return (np.array(blocks)[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).ravel()
