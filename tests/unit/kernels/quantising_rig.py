"""A device of random bfloat16 blocks behind adversarial streams whose kernels round to fp8, and the CPU's copier over the same memory."""

from __future__ import annotations

from functools import partial

import torch

from flexkv_core import native
from flexkv_core.layout import DeviceSegments
from flexkv_core.quantised import QuantisedImage, quantised_layout
from flexkv_core.storage.memory import HostSegment
from flexkv_kernels.quantising import QuantisingCpuCopier
from flexkv_kernels.quantising_streams import STAGED_ONLY, QuantisingStreamCopier
from flexkv_kernels.streams import ALL, Addresses, ImagePlace, Order, Stream
from tests.unit.kernels.adversary import Adversary
from tests.unit.kernels.stream_rig import BLOCKS, TOKENS, DeviceRig, Shape

SPARE_SCALES = 3


class RoundingAdversary(Adversary):
    """Its kernels round; a block is the smallest work of a gather, a piece of a scatter."""

    def __init__(
        self, segments: DeviceSegments, image: QuantisedImage, seed: int, removed: frozenset[Order]
    ) -> None:
        super().__init__(segments, seed, removed)
        self._image = image

    def gather(
        self, stream: Stream, blocks: Addresses, images: Addresses, place: ImagePlace, run: slice = ALL
    ) -> None:
        assert (place, run) == (ImagePlace.STAGING, ALL)
        everything = slice(0, len(self._segments.addresses))
        self._queue(stream, native.quantise, blocks, images, [everything])

    def scatter(
        self, stream: Stream, blocks: Addresses, images: Addresses, place: ImagePlace, run: slice = ALL
    ) -> None:
        assert place is ImagePlace.STAGING
        start, stop, _ = run.indices(len(self._segments.addresses))
        parts = [slice(index, index + 1) for index in range(start, stop)]
        self._queue(stream, native.dequantise, blocks, images, parts)

    def _queue(self, stream, function, blocks, images, parts) -> None:  # type: ignore[no-untyped-def]
        for index in self._rng.permutation(len(blocks)):
            for part in parts:
                first = {} if function is native.quantise else {"first_segment": part.start}
                self._queues[stream].append(
                    partial(
                        function,
                        segment_addrs=self._segments.addresses[part],
                        block_strides=self._segments.strides[part],
                        piece_bytes=self._segments.piece_bytes,
                        blocks=blocks[index : index + 1].copy(),
                        block_count=self._segments.block_count,
                        images=images[index : index + 1].copy(),
                        scales_offset=self._image.scales_offset,
                        image_bytes=self._image.image_bytes,
                        **first,
                    )
                )
        self._chance()


class QuantisingRig(DeviceRig):
    """Of random bfloat16 values; ``copier`` is over streams, or the CPU's."""

    def __init__(
        self,
        seed: int,
        streams: bool = True,
        removed: frozenset[Order] = frozenset(),
        shape: Shape | None = None,
    ) -> None:
        shape = shape or Shape()
        generator = torch.Generator().manual_seed(seed)
        super().__init__(
            [
                torch.randn(2, BLOCKS, TOKENS, 8, generator=generator).to(torch.bfloat16)
                for _ in range(shape.layers)
            ],
            shape,
        )
        self.image = QuantisedImage.of(self.segments, len(self.segments.addresses) + SPARE_SCALES)
        self.host = HostSegment.create(BLOCKS, quantised_layout(self.layout, self.image.scales))
        self.streams = RoundingAdversary(self.segments, self.image, seed, removed)
        if streams:
            paths, settings = self.paths(self.image.image_bytes)
            copier = QuantisingStreamCopier(self.streams, self.segments, settings, self.image)
            copier.use(self.host, shape.shard, paths, STAGED_ONLY)
            self.copier = copier
        else:
            self.copier = QuantisingCpuCopier(self.segments, self.image.scales)
            self.copier.bind(self.host, shape.shard)


def rounded(values: torch.Tensor) -> torch.Tensor:
    """What comes back of ``values`` (bfloat16 [segments, n, …]) by torch's own casts."""
    floats = values.float()
    largest = floats.abs().flatten(2).amax(2)[..., None, None]
    scale = torch.where(largest == 0, 1.0, largest / 448)
    return ((floats / scale).to(torch.float8_e4m3fn).float() * scale).to(torch.bfloat16)
