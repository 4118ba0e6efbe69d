"""KV that is kept as 8-bit floats: ``store_dtype: fp8``. Lossy, so off unless asked for, and never under the keys of exact bytes.

A *piece* is one segment's part of a device block: a layer, or K or V of a layer. Of each piece of bfloat16 values *x* is kept

- ``scale = max|x| / 448`` in float32, 1 where all values are 0 (448 is the largest float8_e4m3fn),
- ``q = x / scale`` in float32, rounded to the nearest float8_e4m3fn, ties to even, at most 448 either way.

A load brings ``float32(q) * scale``, rounded to bfloat16. So a value keeps four significant bits down to a 28,672th of the piece's largest, and
smaller ones are off by at most 2⁻¹⁰ of the scale. A piece with a NaN or an infinity has a scale that is not finite; the block that it is part of is
not stored. FP8 is that of "FP8 Formats for Deep Learning" (2022), E4M3.

In a slot a device block is an image::

    image = [q of piece 0] [q of piece 1] … padding to 4 [scale of piece 0] [scale of piece 1] … zeros to the room for scales, to 16 bytes

Checksums cover images, so they are verified before anything is turned back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from flexkv_core.errors import ConfigError, LayoutError
from flexkv_core.layout import DeviceSegments, KVLayout

logger = logging.getLogger(__name__)

IMAGE_ALIGNMENT_BYTES = 16
SCALE_BYTES = 4


@dataclass(frozen=True)
class QuantisedImage:
    """The shape of an image.

    Attributes:
        piece_bytes: of the engine's bfloat16 values; a piece takes half of it here.
        segment_count: pieces.
        scales: room for so many scales; those beyond ``segment_count`` are 0.

    Raises:
        LayoutError: pieces that are no whole values, or more pieces than scales.
    """

    piece_bytes: int
    segment_count: int
    scales: int

    def __post_init__(self) -> None:
        if self.piece_bytes % 2:
            raise LayoutError(
                f"KV tensors: found pieces of {self.piece_bytes} bytes; expected whole bfloat16 values"
            )
        if self.segment_count > self.scales:
            raise LayoutError(
                f"KV tensors: found {self.segment_count} segments; expected at most {self.scales}, the scales that a slot has room for"
            )

    @classmethod
    def of(cls, segments: DeviceSegments, scales: int) -> QuantisedImage:
        """Of a device's blocks; raises LayoutError also where values do not begin at whole addresses."""
        if (segments.addresses % 2).any() or (segments.strides % 2).any():
            raise LayoutError(
                "KV tensors: found segments at odd addresses or strides; expected bfloat16 values"
            )
        return cls(segments.piece_bytes, len(segments.addresses), scales)

    @property
    def scales_offset(self) -> int:
        """Bytes before the scales."""
        return _padded(self.segment_count * self.piece_bytes // 2, SCALE_BYTES)

    @property
    def image_bytes(self) -> int:
        """Bytes of an image."""
        return _padded(self.scales_offset + SCALE_BYTES * self.scales, IMAGE_ALIGNMENT_BYTES)


def quantised_layout(layout: KVLayout, scales: int) -> KVLayout:
    """The layout of slots that keep as fp8 what ``layout`` keeps as it is, with ``scales`` scales a device block: at least one a segment.

    Raises:
        LayoutError: a device block is no whole number of bfloat16 values.
    """
    assert not layout.scales, "quantised already"
    image = QuantisedImage(layout.device_block_bytes, 1, scales)
    return replace(layout, device_block_bytes=image.image_bytes, scales=scales)


def store_dtype_of(layout: KVLayout) -> str:
    """``store_dtype`` as a layout has it."""
    return "fp8" if layout.scales else "engine"


def check_store_dtype(wanted: str, layout: KVLayout) -> None:
    """Refuse a layout that was made for another ``store_dtype`` than the setting says; and warn once where bytes will be rounded.

    Raises:
        ConfigError: the two do not agree.
    """
    if wanted != store_dtype_of(layout):
        raise ConfigError(
            f"store_dtype = {wanted}: the layout of the slots is made for {store_dtype_of(layout)}; both must agree, see"
            " flexkv_core.quantised.quantised_layout"
        )
    if layout.scales:
        logger.warning(
            "store_dtype = fp8: KV is rounded to 8-bit floats when it is stored, so answers after a hit may differ from those without a cache"
        )


def check_quantisable(dtype: str) -> None:
    """Refuse a KV cache that cannot be kept as fp8; ``dtype`` in torch's words.

    Raises:
        ConfigError: it is not bfloat16.
    """
    if dtype != "bfloat16":
        raise ConfigError(
            f"store_dtype = fp8: the engine's KV cache has dtype {dtype}; only bfloat16 can be kept as fp8. Set store_dtype to engine"
        )


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
