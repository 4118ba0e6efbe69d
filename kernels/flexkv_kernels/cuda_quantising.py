"""The copier of an NVIDIA GPU that rounds bfloat16 blocks to fp8: :class:`~flexkv_kernels.cuda_copier.CudaCopier` with other kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexkv_core.layout import DeviceSegments
from flexkv_core.quantised import QuantisedImage, check_quantisable
from flexkv_kernels.calibration import ModeTable
from flexkv_kernels.cuda_copier import CudaCopier, cuda_segments
from flexkv_kernels.cuda_driver import PinnedRange
from flexkv_kernels.cuda_streams import CudaStreams
from flexkv_kernels.quantised_copy import choose_variant, dequantise, quantise
from flexkv_kernels.quantising_streams import STAGED_ONLY, QuantisingStreamCopier
from flexkv_kernels.stream_copier import CopierSettings
from flexkv_kernels.streams import ALL, Addresses, ImagePlace, Stream


class QuantisingCudaStreams(CudaStreams):
    """CUDA's streams with the kernels of :mod:`flexkv_kernels.quantised_copy`; arguments as of the class above, and the images' shape."""

    def __init__(
        self, device: torch.device, segments: DeviceSegments, programs: int, image: QuantisedImage
    ) -> None:
        super().__init__(device, segments, 1, programs)
        self._image = image
        self._variant = choose_variant(segments, image)

    def gather(
        self, stream: Stream, blocks: Addresses, images: Addresses, place: ImagePlace, run: slice = ALL
    ) -> None:
        """See the protocol; of all segments."""
        assert run == ALL, "a block is rounded as a whole"
        with self._on(stream):
            lists = self._upload(stream, blocks, images)
            quantise(self._table, *lists, self._image, self._variant, self._programs_for(place))

    def scatter(
        self, stream: Stream, blocks: Addresses, images: Addresses, place: ImagePlace, run: slice = ALL
    ) -> None:
        """See the protocol."""
        with self._on(stream):
            lists = self._upload(stream, blocks, images)
            dequantise(self._table, *lists, self._image, self._variant, self._programs_for(place), run)


class QuantisingCudaCopier(QuantisingStreamCopier, CudaCopier):
    """Copies between a GPU's bfloat16 blocks and pinned slots of fp8.

    Args:
        segments: where the engine's blocks lie, on ``device``. ``keep_alive`` holds their memory.
        device: a CUDA device.
        scales: what a slot has room for, at least one a segment.

    Raises:
        LayoutError: blocks that cannot be kept as fp8.
        TransferError: there is no CUDA driver.
    """

    def __init__(
        self,
        segments: DeviceSegments,
        device: torch.device,
        scales: int,
        settings: CopierSettings | None = None,
        keep_alive: object = None,
    ) -> None:
        self._image = QuantisedImage.of(segments, scales)
        CudaCopier.__init__(self, segments, device, settings, keep_alive)

    @classmethod
    def from_tensors(
        cls,
        tensors: Sequence[torch.Tensor],
        block_dim: int = 0,
        settings: CopierSettings | None = None,
        layers: Sequence[int] | None = None,
        scales: int = 0,
    ) -> QuantisingCudaCopier:
        """As of the class above. ``scales``: as the class takes it; 0: one a segment.

        Raises:
            ConfigError: tensors that are not bfloat16.
        """
        segments = cuda_segments(tensors, block_dim, layers)
        for tensor in tensors:
            check_quantisable(str(tensor.dtype).removeprefix("torch."))
        scales = scales or len(segments.addresses)
        return cls(segments, tensors[0].device, scales, settings, keep_alive=list(tensors))

    def _open_streams(
        self, device: torch.device, segments: DeviceSegments, settings: CopierSettings
    ) -> CudaStreams:
        return QuantisingCudaStreams(device, segments, settings.programs, self._image)

    def _image_bytes(self) -> int:
        return self._image.image_bytes

    def _measure_modes(self, pinned: PinnedRange) -> ModeTable:
        self._cuda.driver.batches &= pinned.whole  # batches want memory that the driver knows
        return STAGED_ONLY
