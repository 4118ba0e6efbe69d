"""A load layer by layer against a load as a whole, by the TransferEngine, before a toy forward pass that reads each layer's blocks."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from flexkv_core.layout import KVLayout
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.engine import TransferEngine
from flexkv_core.transfer.layers import LayerStatus
from flexkv_core.transfer.plan import Delivery, OpResult, TransferOp
from flexkv_core.types import Direction
from flexkv_kernels.cuda_copier import CudaCopier
from flexkv_kernels.gpu_bench.report import Figures
from flexkv_kernels.segments import pieces_of

LAYERS = 32
TOKENS = 16
BLOCKS = 250  # a hit of 4,000 tokens
NEW_TOKENS = 512  # computed behind the hit
WIDTH = 4096
WAIT_S = 20.0
SHAPES = {"16k": (8, 64), "32k": (8, 128)}  # heads of K and of V, and their size; bf16


def layer_figures(rounds: int) -> Figures:
    """Milliseconds from the load's submission to the end of a forward pass of 32 layers, by how the load is delivered; in turns."""
    figures: Figures = {}
    for name, (heads, size) in SHAPES.items():
        toy = _Toy(heads, size)
        try:
            times: dict[Delivery, list[float]] = {delivery: [] for delivery in Delivery}
            for turn in range(rounds + 1):  # the first warms up
                for delivery in Delivery:
                    elapsed = toy.answer(delivery)
                    if turn:
                        times[delivery].append(elapsed)
            whole, layers = median(times[Delivery.WHOLE]), median(times[Delivery.LAYERWISE])
            figures |= {
                f"layers_{name}_mib": float(toy.load_bytes >> 20),
                f"layers_{name}_forward_ms": toy.forward_alone() * 1e3,
                f"layers_{name}_whole_ms": whole * 1e3,
                f"layers_{name}_layerwise_ms": layers * 1e3,
                f"layers_{name}_layerwise_to_whole": layers / whole,
            }
        finally:
            toy.close()
    return figures


@dataclass
class _Toy:
    """A KV cache of 32 layers, stored once, and weights of which one matrix serves all layers."""

    heads: int
    size: int

    def __post_init__(self) -> None:
        shape = (2, 2 * BLOCKS, TOKENS, self.heads, self.size)
        self.layers = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)]
        segments = pieces_of(self.layers, 1)
        self.host = HostSegment.create(BLOCKS, KVLayout(TOKENS, TOKENS, segments.block_bytes))
        self.engine = TransferEngine(CudaCopier(segments, torch.device("cuda"), keep_alive=self.layers))
        self.results: queue.Queue[OpResult] = queue.Queue()
        self.engine.start(self.host, self.results.put)
        self.weights = torch.randn(4, WIDTH, WIDTH, dtype=torch.bfloat16, device="cuda") / WIDTH**0.5
        self.hidden = torch.randn(NEW_TOKENS, WIDTH, dtype=torch.bfloat16, device="cuda")
        self.rng = np.random.default_rng()
        self.keys = self.rng.bytes(16 * BLOCKS)
        self.slots = self.rng.permutation(BLOCKS).astype(np.int32)
        self.op_id = 0
        self.load_bytes = BLOCKS * segments.block_bytes
        self._run(Direction.STORE, np.arange(BLOCKS), Delivery.WHOLE)
        self._finish()

    def answer(self, delivery: Delivery) -> float:
        """Seconds from a load to the end of the forward pass that reads it."""
        blocks = BLOCKS + self.rng.permutation(BLOCKS)
        wanted = torch.from_numpy(blocks).cuda()
        torch.cuda.synchronize()
        start = time.perf_counter()
        op_id = self._run(Direction.LOAD, blocks, delivery)
        if delivery is Delivery.WHOLE:
            self._finish()
        self._forward(wanted, op_id if delivery is Delivery.LAYERWISE else None)
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        if delivery is Delivery.LAYERWISE:
            self._finish()
        return elapsed

    def forward_alone(self) -> float:
        """Seconds of the forward pass when everything is there."""
        wanted, times = torch.arange(BLOCKS, device="cuda"), []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._forward(wanted, None)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return median(times[1:])

    def close(self) -> None:
        self.engine.close()
        self.host.close()

    def _forward(self, blocks: torch.Tensor, op_id: int | None) -> None:
        hidden = self.hidden
        for index, layer in enumerate(self.layers):
            if op_id is not None:
                status = self.engine.wait_layers(op_id, index + 1, WAIT_S)
                assert status is LayerStatus.READY, status
            keys, values = layer[:, blocks].flatten(1, 2).unbind()
            query = hidden[:, : self.heads * self.size].view(1, NEW_TOKENS, self.heads, self.size)
            attended = torch.nn.functional.scaled_dot_product_attention(
                query.transpose(1, 2), keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
            )
            hidden = hidden + attended.mean()
            for weight in self.weights:
                hidden = hidden @ weight

    def _run(self, direction: Direction, blocks: np.ndarray, delivery: Delivery) -> int:
        self.op_id += 1
        self.engine.submit(
            TransferOp(self.op_id, direction, self.keys, self.slots, blocks, delivery=delivery)
        )
        return self.op_id

    def _finish(self) -> None:
        result = self.results.get(timeout=WAIT_S)
        assert result.ok.all(), result
