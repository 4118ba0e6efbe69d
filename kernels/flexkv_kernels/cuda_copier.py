"""The copier of an NVIDIA GPU: pinned slots, staging memory and a calibration around the logic of :mod:`flexkv_kernels.stream_copier`."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from flexkv_core.errors import LayoutError
from flexkv_core.layout import DeviceSegments
from flexkv_core.storage.memory import HostSegment
from flexkv_core.types import Direction
from flexkv_kernels.calibration import ModeTable
from flexkv_kernels.cuda_driver import PinnedRange, pin
from flexkv_kernels.cuda_streams import CudaStreams
from flexkv_kernels.gpu_calibration import calibrate_gpu
from flexkv_kernels.paths import Mode, Paths
from flexkv_kernels.segments import pieces_of
from flexkv_kernels.stream_copier import (
    BUFFERS,
    CopierSettings,
    StreamCopier,
    check_block_bytes,
    staging_rings,
)

logger = logging.getLogger(__name__)


class CudaCopier(StreamCopier):
    """Copies between a GPU's blocks and pinned slots.

    Args:
        segments: where the engine's blocks lie, on ``device``. ``keep_alive`` holds their memory.
        device: a CUDA device.
    """

    def __init__(
        self,
        segments: DeviceSegments,
        device: torch.device,
        settings: CopierSettings | None = None,
        keep_alive: object = None,
    ) -> None:
        settings = settings or CopierSettings()
        # Every image starts at a multiple of a block from a page or from a staging buffer.
        alignment = segments.block_bytes & -segments.block_bytes
        self._cuda = CudaStreams(device, segments, min(alignment, 256), settings.programs)
        super().__init__(self._cuda, segments, settings)
        self._device = device
        self._keep_alive = keep_alive
        self._pinned: PinnedRange | None = None

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[torch.Tensor], block_dim: int = 0, settings: CopierSettings | None = None
    ) -> CudaCopier:
        """One or more tensors a layer, of any layout that :func:`~flexkv_kernels.segments.pieces_of` understands.

        Raises:
            LayoutError: what was found and what was expected.
            TransferError: there is no CUDA driver.
        """
        segments = pieces_of(tensors, block_dim)
        if tensors[0].device.type != "cuda":
            raise LayoutError(f"KV tensors: found device {tensors[0].device}; expected cuda")
        return cls(segments, tensors[0].device, settings, keep_alive=list(tensors))

    def bind(self, host: HostSegment, shard: int) -> None:
        """Pin the slots, take staging memory, measure the modes; see the protocol. Takes seconds, and both steps are bounded."""
        check_block_bytes(self.segments, host)
        layout, settings = host.layout, self._settings
        size_bytes = host.slot_count * layout.slot_bytes
        driver = self._cuda.driver
        with torch.cuda.device(self._device):
            self._pinned = pin(
                host.address, size_bytes, layout.slot_bytes, driver.register, settings.pin_budget_s
            )
            buffer_bytes = max(settings.chunk_bytes, layout.shard_bytes)
            self._staging = torch.empty(2 * BUFFERS * buffer_bytes, dtype=torch.uint8, device=self._device)
            rings = staging_rings(self._staging.data_ptr(), buffer_bytes, BUFFERS)
            paths = Paths(self._streams, self.segments, *rings, host.address, self._pinned.piece_bytes)
            modes = ModeTable({direction: [(0, Mode.STAGED)] for direction in Direction})
            if not self._pinned.whole:
                driver.batches = False  # batches want memory that the driver knows
            else:
                modes = calibrate_gpu(
                    self.segments, self._device, settings.programs, settings.calibration_budget_s
                )
        logger.info("device copies: %s", modes)
        self.use(host, shard, paths, modes)

    def close(self) -> None:
        """Unpin the slots; the host segment may be unmapped then. No copy may be running."""
        if self._pinned is None:
            return
        pinned, self._pinned = self._pinned, None
        with torch.cuda.device(self._device):
            torch.cuda.synchronize(self._device)
            for start in range(0, pinned.pinned_bytes, pinned.piece_bytes):
                self._cuda.driver.unregister(pinned.address + start)
