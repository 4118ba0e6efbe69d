"""A device of random bytes behind adversarial streams, with the copier's logic on it and a real host segment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from flexkv_core.layout import KVLayout
from flexkv_core.storage.memory import HostSegment
from flexkv_core.types import Direction
from flexkv_kernels.calibration import ModeTable
from flexkv_kernels.paths import Mode, Paths
from flexkv_kernels.segments import pieces_of
from flexkv_kernels.stream_copier import BUFFERS, CopierSettings, StreamCopier, staging_rings
from flexkv_kernels.streams import Order
from tests.unit.kernels.adversary import Adversary

BLOCKS = 32
TOKENS = 4
CHUNK_BLOCKS = 2


@dataclass(frozen=True)
class Shape:
    """Of the slots: device blocks a slot, ranks, and this rank; of the model: layers."""

    blocks_per_slot: int = 1
    shards: int = 1
    shard: int = 0
    layers: int = 2


class StreamRig:
    """``tensors`` are the device's memory: a layer each, K and V apart."""

    def __init__(
        self, seed: int, mode: Mode, removed: frozenset[Order] = frozenset(), shape: Shape | None = None
    ) -> None:
        shape = shape or Shape()
        generator = torch.Generator().manual_seed(seed)
        self.tensors = [
            torch.randint(0, 256, (2, BLOCKS, TOKENS, 8), dtype=torch.uint8, generator=generator)
            for _ in range(shape.layers)
        ]
        segments = pieces_of(self.tensors, block_dim=1)
        self.streams = Adversary(segments, seed, removed)
        buffer_bytes = CHUNK_BLOCKS * shape.blocks_per_slot * segments.block_bytes
        settings = CopierSettings(chunk_bytes=buffer_bytes, unstaged_chunk_bytes=buffer_bytes)
        self.copier = StreamCopier(self.streams, segments, settings)
        tokens = TOKENS * shape.blocks_per_slot
        self.host = HostSegment.create(BLOCKS, KVLayout(tokens, TOKENS, segments.block_bytes, shape.shards))
        self._staging = np.zeros(2 * BUFFERS * buffer_bytes, np.uint8)
        rings = staging_rings(self._staging.ctypes.data, buffer_bytes, BUFFERS)
        paths = Paths(self.streams, segments, *rings, self.host.address)
        modes = ModeTable({direction: [(0, mode)] for direction in Direction})
        self.copier.use(self.host, shape.shard, paths, modes)

    def bytes_of(self, blocks: np.ndarray) -> torch.Tensor:
        """What the device's blocks hold now."""
        return torch.cat([tensor[:, torch.from_numpy(blocks)].clone() for tensor in self.tensors])

    def write(self, blocks: np.ndarray, values: torch.Tensor) -> None:
        """Overwrite the blocks, now."""
        for tensor, part in zip(self.tensors, values.split(2), strict=True):
            tensor[:, torch.from_numpy(blocks)] = part

    def close(self) -> None:
        self.streams.drain()
        self.copier.close()
        self.host.close()
