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
        self._cuda = self._open_streams(device, segments, settings)
        super().__init__(self._cuda, segments, settings)
        self._device = device
        self._keep_alive = keep_alive
        self._pinned: PinnedRange | None = None

    def _open_streams(
        self, device: torch.device, segments: DeviceSegments, settings: CopierSettings
    ) -> CudaStreams:
        # Every image starts at a multiple of a block from a page or from a staging buffer.
        alignment = segments.block_bytes & -segments.block_bytes
        return CudaStreams(device, segments, min(alignment, 256), settings.programs)

    def _image_bytes(self) -> int:
        return self.segments.block_bytes

    @classmethod
    def from_tensors(
        cls,
        tensors: Sequence[torch.Tensor],
        block_dim: int = 0,
        settings: CopierSettings | None = None,
        layers: Sequence[int] | None = None,
    ) -> CudaCopier:
        """One or more tensors a layer, of any layout that :func:`~flexkv_kernels.segments.pieces_of` understands.

        Raises:
            LayoutError: what was found and what was expected.
            TransferError: there is no CUDA driver.
        """
        segments = cuda_segments(tensors, block_dim, layers)
        return cls(segments, tensors[0].device, settings, keep_alive=list(tensors))

    def bind(self, host: HostSegment, shard: int) -> None:
        """Pin the slots, take staging memory (96 MiB, or six times a slot's shard), measure the modes; see the protocol.

        Takes seconds; pinning and measuring are bounded. Slots that could not be pinned in whole are copied through staging memory.
        """
        self.check_slots(host)
        layout, settings = host.layout, self._settings
        with torch.cuda.device(self._device):
            # The driver's calls want the device's context on this thread, which only some of torch's put there; this one does.
            torch.cuda.synchronize(self._device)
            self._pinned = pin(
                host.address,
                host.slot_count * layout.slot_bytes,
                layout.slot_bytes,
                self._cuda.driver.register,
                settings.pin_budget_s,
            )
            buffer_bytes = max(settings.chunk_bytes, layout.shard_bytes)
            self._staging = torch.empty(2 * BUFFERS * buffer_bytes, dtype=torch.uint8, device=self._device)
            # The allocator may give what work of the engine's stream still uses: it orders by that stream, ours are others.
            torch.cuda.synchronize(self._device)
            modes = self._measure_modes(self._pinned)
        rings = staging_rings(self._staging.data_ptr(), buffer_bytes, BUFFERS)
        paths = Paths(
            self._streams, self.segments, *rings, host.address, self._pinned.piece_bytes, self._image_bytes()
        )
        logger.info("device copies: %s", modes)
        self.use(host, shard, paths, modes)

    def _measure_modes(self, pinned: PinnedRange) -> ModeTable:
        driver, settings = self._cuda.driver, self._settings
        if not pinned.whole:
            driver.batches = False  # batches want memory that the driver knows
            return ModeTable({direction: [(0, Mode.STAGED)] for direction in Direction}, direct=False)
        modes = tuple(
            mode for mode in Mode if mode is not Mode.DIRECT or driver.kernels_reach(pinned.address)
        )
        try:
            return calibrate_gpu(
                self.segments, self._device, settings.programs, modes, settings.calibration_budget_s
            )
        except RuntimeError as error:
            # A TransferError, or torch's own: no memory for the scratch buffers is no reason to serve without a cache.
            logger.warning("device copies: not calibrated: %s", error)
            return ModeTable({}, direct=Mode.DIRECT in modes)

    def close(self) -> None:
        """Unpin the slots; the host segment may be unmapped then. No copy may be running."""
        super().close()
        if self._pinned is None:
            return
        pinned, self._pinned = self._pinned, None
        with torch.cuda.device(self._device):
            torch.cuda.synchronize(self._device)
            for start in range(0, pinned.pinned_bytes, pinned.piece_bytes):
                self._cuda.driver.unregister(pinned.address + start)


def cuda_segments(
    tensors: Sequence[torch.Tensor], block_dim: int, layers: Sequence[int] | None
) -> DeviceSegments:
    """Of tensors on a GPU; see :func:`~flexkv_kernels.segments.pieces_of`.

    Raises:
        LayoutError: what was found and what was expected.
    """
    segments = pieces_of(tensors, block_dim, layers)
    if tensors[0].device.type != "cuda":
        raise LayoutError(f"KV tensors: found device {tensors[0].device}; expected cuda")
    return segments
