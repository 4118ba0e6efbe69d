"""Copies over streams that round bfloat16 blocks to fp8: always through staging memory, so that what crosses the bus is the image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import DeviceSegments
from flexkv_core.quantised import QuantisedImage
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import TransferOp
from flexkv_core.types import Direction
from flexkv_kernels.calibration import ModeTable
from flexkv_kernels.paths import Mode
from flexkv_kernels.quantising import check_slots, finite_slots
from flexkv_kernels.stream_copier import CopierSettings, StreamCopier
from flexkv_kernels.streams import Streams

STAGED_ONLY = ModeTable({direction: [(0, Mode.STAGED)] for direction in Direction}, direct=False)


class QuantisingStreamCopier(StreamCopier):
    """A :class:`~flexkv_kernels.stream_copier.StreamCopier` whose streams' kernels round; to be given :data:`STAGED_ONLY` and paths with the
    image's size."""

    def __init__(
        self, streams: Streams, segments: DeviceSegments, settings: CopierSettings, image: QuantisedImage
    ) -> None:
        super().__init__(streams, segments, settings)
        self._image = image

    def check_slots(self, host: HostSegment) -> None:
        """Refuse slots that are made for other images; raises LayoutError."""
        check_slots(self._image, host)

    def gather(
        self, op: TransferOp, after: object, layers: range | None = None
    ) -> npt.NDArray[np.bool_] | None:
        """See the protocol; all layers at once with the last ones: a block is rounded as a whole."""
        if layers is not None and layers.stop < self.segments.layer_count:
            return None
        return super().gather(op, after)

    def scatter_layers(self, op: TransferOp, after: object, on_layer: Callable[[object], None]) -> None:
        """All layers at once, then each is announced: a layer's part of an image is no piece that DMA could bring by itself."""
        self.scatter(op, after, verify=False)
        for _ in range(self.segments.layer_count):
            on_layer(None)

    def _take_checksums(self, part: TransferOp) -> npt.NDArray[np.bool_]:
        super()._take_checksums(part)
        return finite_slots(self._host, self._shard, part.slots, self._image)
