"""The Triton kernel pair that rounds bfloat16 blocks to images of fp8 and back; :mod:`flexkv_core.quantised` says what an image is.

Segments, tables and launches are those of :mod:`flexkv_kernels.paged_copy`. The rounding is written in integers: not every target has a
conversion of its own, and all must give the same bytes. Loads of values are 16 bytes wide, and of their 8-bit forms 8, where the
addresses allow it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl

from flexkv_core.layout import DeviceSegments
from flexkv_core.quantised import IMAGE_ALIGNMENT_BYTES, QuantisedImage
from flexkv_kernels.access import THREADS, VECTOR_BYTES_MAX
from flexkv_kernels.paged_copy import WARPS, WORK_ITEMS_MAX, SegmentTable

VALUE_BYTES = 2

REGISTERS_MAX = 40
"""Of a thread that rounds and reads several values at once: sm_100's assembler takes 48 if it may, and spills nothing with these."""

_TABLES = ["segment_addresses", "segment_strides", "blocks", "images"]


@triton.jit(
    do_not_specialize=["block_count", "segment_count", "scale_count", "piece_values", "scales_offset"],
    do_not_specialize_on_alignment=_TABLES,
)
def quantise_kernel(  # type: ignore[no-untyped-def]
    segment_addresses,
    segment_strides,
    blocks,
    images,
    block_count,
    segment_count,
    scale_count,
    piece_values,
    scales_offset,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rounds ``block_count`` blocks, grid-stride over (block, scale): a program reads a piece twice, for its scale and to round it.

    Tables as in :func:`~flexkv_kernels.paged_copy.paged_copy_kernel`. scale_count: of an image; those beyond ``segment_count`` become 0.
    piece_values: bfloat16 values of a piece. VECTOR values must divide every piece, and twice as many bytes every address and stride.
    """
    offsets = tl.arange(0, TILE)
    values = (piece_values // VECTOR) * VECTOR
    for item in range(tl.program_id(0), block_count * scale_count, tl.num_programs(0)):
        place = item // scale_count
        segment = item - place * scale_count
        block = tl.load(blocks + place)
        if block >= 0:
            image = tl.load(images + place)
            scale_at = (image + scales_offset + segment * 4).to(tl.pointer_type(tl.float32))
            if segment < segment_count:
                at = tl.load(segment_addresses + segment) + block * tl.load(segment_strides + segment)
                largest = tl.zeros([TILE], tl.int32)
                for start in range(0, values, TILE):
                    piece = (at + start * 2).to(tl.pointer_type(tl.int16))
                    piece = tl.multiple_of(piece, VECTOR * 2)
                    bits = tl.load(piece + offsets, mask=offsets < values - start, other=0)
                    largest = tl.maximum(largest, bits.to(tl.int32) & 0x7FFF)
                top = tl.max(largest)
                scale = tl.math.div_rn((top << 16).to(tl.float32, bitcast=True), 448.0)
                scale = tl.where(top == 0, 1.0, scale)
                tl.store(scale_at, scale)
                to = image + segment.to(tl.int64) * piece_values
                for start in range(0, values, TILE):
                    piece = (at + start * 2).to(tl.pointer_type(tl.int16))
                    piece = tl.multiple_of(piece, VECTOR * 2)
                    rounded = tl.multiple_of((to + start).to(tl.pointer_type(tl.uint8)), VECTOR)
                    mask = offsets < values - start
                    bits = tl.load(piece + offsets, mask=mask, other=0).to(tl.int32)
                    bits = tl.math.div_rn((bits << 16).to(tl.float32, bitcast=True), scale).to(
                        tl.int32, bitcast=True
                    )
                    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
                    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
                    # Below 2^-6 the steps are of 2^-9, as are those of floats from 2^14 on: the addition rounds.
                    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
                    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
                    code = tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)
                    tl.store(rounded + offsets, code.to(tl.uint8), mask=mask)
            else:
                tl.store(scale_at, 0.0)
            if segment == 0:
                used = segment_count * piece_values
                padding = tl.arange(0, 4)
                gap = (image + used).to(tl.pointer_type(tl.uint8))
                tl.store(gap + padding, tl.zeros([4], tl.uint8), mask=padding < scales_offset - used)


@triton.jit(
    do_not_specialize=[
        "block_count",
        "segment_start",
        "segment_count",
        "piece_values",
        "scales_offset",
    ],
    do_not_specialize_on_alignment=_TABLES,
)
def dequantise_kernel(  # type: ignore[no-untyped-def]
    segment_addresses,
    segment_strides,
    blocks,
    images,
    block_count,
    segment_start,
    segment_count,
    piece_values,
    scales_offset,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes ``segment_count`` segments from ``segment_start`` on of ``block_count`` blocks, grid-stride over (block, segment, tile);
    arguments as in :func:`quantise_kernel`."""
    offsets = tl.arange(0, TILE)
    values = (piece_values // VECTOR) * VECTOR
    tiles = (values + TILE - 1) // TILE
    for item in range(tl.program_id(0), block_count * segment_count * tiles, tl.num_programs(0)):
        row = item // tiles
        tile = item - row * tiles
        place = row // segment_count
        segment = segment_start + row - place * segment_count
        block = tl.load(blocks + place)
        if block >= 0:
            image = tl.load(images + place)
            start = tile.to(tl.int64) * TILE
            at = tl.load(segment_addresses + segment) + block * tl.load(segment_strides + segment) + start * 2
            code_at = image + segment.to(tl.int64) * piece_values + start
            scale = tl.load((image + scales_offset + segment * 4).to(tl.pointer_type(tl.float32)))
            piece = tl.multiple_of(at.to(tl.pointer_type(tl.int16)), VECTOR * 2)
            codes = tl.multiple_of(code_at.to(tl.pointer_type(tl.uint8)), VECTOR)
            mask = offsets < values - tile * TILE
            code = tl.load(codes + offsets, mask=mask, other=0).to(tl.int32)
            magnitude = code & 0x7F
            normal = ((magnitude << 20) + 0x3C000000).to(tl.float32, bitcast=True)
            subnormal = magnitude.to(tl.float32) * 0.001953125
            value = tl.where(magnitude < 8, subnormal, normal) * scale
            bits = value.to(tl.int32, bitcast=True)
            half = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            tl.store(piece + offsets, (half | ((code & 0x80) << 8)).to(tl.int16), mask=mask)


VECTORS = (8, 1)
"""Values of one access: 16 bytes where the addresses allow it, otherwise one value, which is slow and right."""

_TILES = {8: 8 * THREADS, 1: 4 * THREADS}


def choose_variant(segments: DeviceSegments, image: QuantisedImage) -> tuple[int, int]:
    """(VECTOR, TILE) for these segments, and for images that begin at multiples of 16 bytes."""
    alignment = int(np.gcd.reduce(np.concatenate([segments.addresses, segments.strides])))
    alignment = int(np.gcd.reduce([alignment, image.piece_bytes, 2 * IMAGE_ALIGNMENT_BYTES]))
    vector = 8 if alignment % VECTOR_BYTES_MAX == 0 else 1
    return vector, _TILES[vector]


def all_variants() -> list[tuple[int, int]]:
    """Every (VECTOR, TILE) that :func:`choose_variant` can choose."""
    return [(vector, _TILES[vector]) for vector in VECTORS]


def quantise(
    table: SegmentTable,
    blocks: torch.Tensor,
    images: torch.Tensor,
    image: QuantisedImage,
    variant: tuple[int, int],
    programs: int,
) -> None:
    """Blocks -> images, on the current stream.

    Args:
        table: where the pieces lie.
        blocks: int64 [n] on the device, ids that exist; negative: left out.
        images: int64 [n] on the device, address of each block's image: multiples of 16. Images do not overlap.
        image: their shape.
        variant: of :func:`choose_variant`.
        programs: how many programs run at most.
    """
    scale_count = (image.image_bytes - image.scales_offset) // 4
    values = image.piece_bytes // VALUE_BYTES
    for some, places in _parts(blocks, images, scale_count):
        quantise_kernel[(min(programs, len(some) * scale_count),)](
            table.addresses,
            table.strides,
            some,
            places,
            len(some),
            image.segment_count,
            scale_count,
            values,
            image.scales_offset,
            VECTOR=variant[0],
            TILE=variant[1],
            num_warps=WARPS,
            maxnreg=registers_max(variant),
        )


def registers_max(variant: tuple[int, int]) -> int | None:
    """The bound that :func:`quantise` gives the compiler; None: its own choice, which stays below where values are read one by one."""
    return REGISTERS_MAX if variant[0] > 1 else None


def dequantise(
    table: SegmentTable,
    blocks: torch.Tensor,
    images: torch.Tensor,
    image: QuantisedImage,
    variant: tuple[int, int],
    programs: int,
    run: slice | None = None,
) -> None:
    """Images -> blocks, on the current stream; arguments as in :func:`quantise`. No block may be named twice. ``run``: neighbouring
    segments, which alone are written."""
    values = image.piece_bytes // VALUE_BYTES
    start, stop, _ = (run or slice(None)).indices(image.segment_count)
    items = (stop - start) * -(-values // variant[1])
    for some, places in _parts(blocks, images, items):
        dequantise_kernel[(min(programs, len(some) * items),)](
            table.addresses,
            table.strides,
            some,
            places,
            len(some),
            start,
            stop - start,
            values,
            image.scales_offset,
            VECTOR=variant[0],
            TILE=variant[1],
            num_warps=WARPS,
        )


def _parts(
    blocks: torch.Tensor, images: torch.Tensor, items_per_block: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both lists in parts whose work is counted in 32 bits."""
    assert len(blocks) == len(images), (len(blocks), len(images))
    step = max(1, (WORK_ITEMS_MAX - 1) // items_per_block)
    for at in range(0, len(blocks), step):
        yield blocks[at : at + step], images[at : at + step]
