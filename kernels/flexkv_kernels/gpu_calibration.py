"""The calibration of a GPU: pieces of the engine's size in scratch memory, never the engine's blocks or anyone's slots."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexkv_core.layout import DeviceSegments
from flexkv_core.types import Direction
from flexkv_kernels.calibration import SIZES_BYTES, ModeTable, calibrate
from flexkv_kernels.cuda_streams import CudaStreams
from flexkv_kernels.paths import Chunk, Mode, Paths, StagingBuffer, StagingRing, chunk_slices
from flexkv_kernels.stream_copier import BUFFERS, CHUNK_BYTES, FIRST_CHUNK_BYTES, UNSTAGED_CHUNK_BYTES
from flexkv_kernels.streams import Order

_TIMEOUT_S = 10.0


def calibrate_gpu(
    segments: DeviceSegments, device: torch.device, programs: int, modes: Sequence[Mode], budget_s: float
) -> ModeTable:
    """Measure ``modes`` on as many pieces, as long as the engine's. Takes scratch memory of the largest size, on the device twice.

    Raises:
        TransferError: the GPU failed.
    """
    scratch = Scratch(segments.piece_bytes, len(segments.addresses), max(SIZES_BYTES), device, programs)

    def measure(direction: Direction, mode: Mode, size_bytes: int) -> float:
        start = time.perf_counter()
        scratch.run(direction, mode, size_bytes, np.random.default_rng(0))
        return time.perf_counter() - start

    return calibrate(measure, modes, budget_s=budget_s)


@dataclass
class Scratch:
    """A paged cache of ``segment_count`` pieces a block, pinned host memory for its images, and the paths between.

    Attributes:
        capacity_bytes: of the cache and of the host memory; whole blocks of it are taken, at least one.
    """

    piece_bytes: int
    segment_count: int
    capacity_bytes: int
    device: torch.device
    programs: int

    def __post_init__(self) -> None:
        block_bytes = self.piece_bytes * self.segment_count
        self.block_bytes = block_bytes
        self.count = max(1, self.capacity_bytes // block_bytes)
        self.paged = torch.empty(self.count * block_bytes, dtype=torch.uint8, device=self.device)
        self.host = torch.empty(self.count * block_bytes, dtype=torch.uint8, pin_memory=True)
        self.segments = DeviceSegments(
            addresses=self.paged.data_ptr()
            + np.arange(self.segment_count, dtype=np.int64) * self.count * self.piece_bytes,
            strides=np.full(self.segment_count, self.piece_bytes, np.int64),
            piece_bytes=self.piece_bytes,
            block_count=self.count,
        )
        self.streams = CudaStreams(
            self.device, self.segments, min(block_bytes & -block_bytes, 256), self.programs
        )
        size = max(CHUNK_BYTES, block_bytes)
        self.staging = torch.empty(BUFFERS * size, dtype=torch.uint8, device=self.device)
        places = [StagingBuffer(self.staging.data_ptr() + index * size, size) for index in range(BUFFERS)]
        # The allocator may give what the current stream's work still uses; ours are other streams.
        torch.cuda.synchronize(self.device)
        self.paths = Paths(self.streams, self.segments, StagingRing(places), StagingRing(places))
        self.chunk_blocks = {mode: max(1, UNSTAGED_CHUNK_BYTES // block_bytes) for mode in Mode}
        self.chunk_blocks[Mode.STAGED] = max(1, size // block_bytes)

    def fill(self) -> None:
        """Random bytes on both sides, other ones: zeros may be copied faster."""
        self.host.copy_(self.paged.random_(0, 256))
        self.paged.random_(0, 256)

    def run(self, direction: Direction, mode: Mode, size_bytes: int, rng: np.random.Generator) -> None:
        """One transfer of about ``size_bytes`` in random order on both sides, to its end."""
        count = min(self.count, max(1, size_bytes // self.block_bytes))
        blocks = rng.permutation(self.count)[:count]
        images = self.host.data_ptr() + rng.permutation(self.count)[:count] * self.block_bytes
        self.move(direction, mode, blocks, images)

    def move(self, direction: Direction, mode: Mode, blocks: np.ndarray, images: np.ndarray) -> None:
        """Copy ``blocks`` to or from ``images`` chunk by chunk, and wait for the end."""
        move = self.paths.store if direction is Direction.STORE else self.paths.load
        first = FIRST_CHUNK_BYTES // self.block_bytes
        chunks = (
            Chunk(blocks[part], images[part])
            for part in chunk_slices(len(blocks), first, self.chunk_blocks[mode])
        )
        events = list(move(mode, chunks, self.streams.mark()))
        self.streams.finish(events[-1], _TIMEOUT_S, Order.STORED)
