"""Devices behind adversarial streams, with a copier on them and a real host segment: what all have, and the one of random bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from flexkv_core.layout import DeviceSegments, KVLayout
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import DeviceCopier
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


class DeviceRig:
    """``tensors`` are the device's memory: a layer each, [K and V, blocks, …]. What derives from it makes ``host`` and ``copier``."""

    host: HostSegment
    copier: DeviceCopier

    def __init__(self, tensors: list[torch.Tensor], shape: Shape) -> None:
        self.tensors, self.shape = tensors, shape
        self.segments: DeviceSegments = pieces_of(tensors, block_dim=1)
        self.layout = KVLayout(
            TOKENS * shape.blocks_per_slot, TOKENS, self.segments.block_bytes, shape.shards
        )
        self.streams: Adversary

    def paths(self, image_bytes: int) -> tuple[Paths, CopierSettings]:
        """Over staging buffers of a chunk of images."""
        buffer_bytes = CHUNK_BLOCKS * self.shape.blocks_per_slot * image_bytes
        self._staging = np.zeros(2 * BUFFERS * buffer_bytes, np.uint8)
        rings = staging_rings(self._staging.ctypes.data, buffer_bytes, BUFFERS)
        paths = Paths(self.streams, self.segments, *rings, self.host.address, image_bytes=image_bytes)
        return paths, CopierSettings(chunk_bytes=buffer_bytes, unstaged_chunk_bytes=buffer_bytes)

    def held(self, blocks: np.ndarray) -> torch.Tensor:
        """[segments, n, tokens, …]: what the device's blocks hold now."""
        return torch.cat([tensor[:, torch.from_numpy(blocks)].clone() for tensor in self.tensors])

    def write(self, blocks: np.ndarray, values: torch.Tensor) -> None:
        """Overwrite the blocks, now."""
        for layer in range(self.shape.layers):
            self.write_layer(layer, blocks, values[2 * layer : 2 * layer + 2])

    def write_layer(self, layer: int, blocks: np.ndarray, values: torch.Tensor) -> None:
        """Overwrite a layer of the blocks, now; ``values``: of K and V."""
        self.tensors[layer][:, torch.from_numpy(blocks)] = values

    def close(self) -> None:
        self.streams.drain()
        self.copier.close()
        self.host.close()


class StreamRig(DeviceRig):
    """Of random bytes."""

    copier: StreamCopier

    def __init__(
        self, seed: int, mode: Mode, removed: frozenset[Order] = frozenset(), shape: Shape | None = None
    ) -> None:
        shape = shape or Shape()
        generator = torch.Generator().manual_seed(seed)
        super().__init__(
            [
                torch.randint(0, 256, (2, BLOCKS, TOKENS, 8), dtype=torch.uint8, generator=generator)
                for _ in range(shape.layers)
            ],
            shape,
        )
        self.streams = Adversary(self.segments, seed, removed)
        self.host = HostSegment.create(BLOCKS, self.layout)
        paths, settings = self.paths(self.segments.block_bytes)
        self.copier = StreamCopier(self.streams, self.segments, settings)
        modes = ModeTable({direction: [(0, mode)] for direction in Direction})
        self.copier.use(self.host, shape.shard, paths, modes)
