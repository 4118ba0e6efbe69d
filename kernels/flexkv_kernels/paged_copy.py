"""The Triton kernel pair: gather (paged KV of all layers -> images) and scatter (back), for every layout.

A layout is a table of segments, :class:`flexkv_core.layout.DeviceSegments`: piece *s* of block *b* lies at ``addresses[s] + b *
strides[s]``. An *image* is the same block with its pieces one after another: in a staging buffer on the device, or in a slot of pinned
host memory, which the kernel then reaches over the bus by itself. All addresses are 64-bit integers from tables, so that one
compiled kernel serves every tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from flexkv_core.layout import DeviceSegments
from flexkv_kernels.access import THREADS, Access

WARPS = THREADS // (64 if torch.version.hip else 32)
WORK_ITEMS_MAX = 1 << 31
"""Work is counted in 32 bits (a 64-bit division costs more than a tile of small pieces); longer calls are cut."""


# Nothing is specialised on values or on the tables' alignment: a copy of an odd number of blocks must not compile anew while serving.
@triton.jit(
    do_not_specialize=["block_count", "segment_start", "segment_count", "piece_bytes"],
    do_not_specialize_on_alignment=[
        "segment_addresses",
        "segment_strides",
        "blocks",
        "images",
        "checksums",
    ],
)
def paged_copy_kernel(  # type: ignore[no-untyped-def]
    segment_addresses,
    segment_strides,
    blocks,
    images,
    checksums,
    block_count,
    segment_start,
    segment_count,
    piece_bytes,
    TO_IMAGES: tl.constexpr,
    VECTOR_BYTES: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    CHECKSUM: tl.constexpr,
):
    """Copies ``block_count`` blocks, grid-stride over (block, segment, tile); the grid's size limits how many run.

    segment_addresses, segment_strides: int64 [segments]; ``segment_count`` of them from ``segment_start`` on are copied. blocks: int64 [block_count], negative: left out. images: int64
    [block_count], address of each block's image. checksums: int64 [block_count], zeroed before, with CHECKSUM. TO_IMAGES: gather,
    otherwise scatter. VECTOR_BYTES must divide every address, stride and piece_bytes.
    """
    WORD_BYTES: tl.constexpr = VECTOR_BYTES if VECTOR_BYTES < 4 else 4
    WORD: tl.constexpr = tl.uint8 if WORD_BYTES == 1 else (tl.int16 if WORD_BYTES == 2 else tl.int32)
    WORDS: tl.constexpr = TILE_BYTES // WORD_BYTES
    # Counted in vectors first, so that the compiler knows the limit to be whole vectors and keeps masked accesses wide.
    piece_words = (piece_bytes // VECTOR_BYTES) * (VECTOR_BYTES // WORD_BYTES)
    tiles = (piece_words + WORDS - 1) // WORDS
    offsets = tl.arange(0, WORDS)
    for item in range(tl.program_id(0), block_count * segment_count * tiles, tl.num_programs(0)):
        row = item // tiles
        tile = item - row * tiles
        place = row // segment_count
        segment = segment_start + row - place * segment_count
        block = tl.load(blocks + place)
        if block >= 0:
            within = tile.to(tl.int64) * TILE_BYTES
            piece_at = (
                tl.load(segment_addresses + segment) + block * tl.load(segment_strides + segment) + within
            )
            image_at = tl.load(images + place) + segment.to(tl.int64) * piece_bytes + within
            # The hint must stand on the pointer: on the integer it is lost in the cast.
            piece = tl.multiple_of(piece_at.to(tl.pointer_type(WORD)), VECTOR_BYTES)
            image = tl.multiple_of(image_at.to(tl.pointer_type(WORD)), VECTOR_BYTES)
            mask = offsets < piece_words - tile * WORDS
            if TO_IMAGES:
                words = tl.load(piece + offsets, mask=mask, other=0)
                tl.store(image + offsets, words, mask=mask)
            else:
                words = tl.load(image + offsets, mask=mask, other=0)
                tl.store(piece + offsets, words, mask=mask)
            if CHECKSUM:
                # Words beyond the piece are 0 and add nothing.
                index = (segment * piece_words + tile * WORDS + offsets).to(tl.uint64)
                weighted = words.to(tl.uint32, bitcast=True).to(tl.uint64) * (2 * index + 1)
                tl.atomic_add(checksums + place, tl.sum(weighted).to(tl.int64, bitcast=True))


@dataclass(frozen=True)
class SegmentTable:
    """A device's copy of the segments: int64 tensors [segments] on one device."""

    addresses: torch.Tensor
    strides: torch.Tensor
    piece_bytes: int
    block_bytes: int

    @classmethod
    def on(cls, device: torch.device | str, segments: DeviceSegments) -> SegmentTable:
        """Copy the table to ``device``."""
        return cls(
            torch.from_numpy(np.ascontiguousarray(segments.addresses)).to(device),
            torch.from_numpy(np.ascontiguousarray(segments.strides)).to(device),
            segments.piece_bytes,
            segments.block_bytes,
        )


def gather(
    table: SegmentTable,
    blocks: torch.Tensor,
    images: torch.Tensor,
    access: Access,
    programs: int,
    checksums: torch.Tensor | None = None,
    run: slice | None = None,
) -> None:
    """Blocks -> images, on the current stream.

    Args:
        table: where the pieces lie.
        blocks: int64 [n] on the device, ids that exist; negative: left out.
        images: int64 [n] on the device, address of each block's image of ``table.block_bytes``. Images do not overlap.
        access: of :func:`flexkv_kernels.access.choose_access`; images keep the alignment that was promised there.
        programs: how many programs run at most; about 16 fit on one SM.
        checksums: int64 [n] on the device, zeros; added to where ``access.checksum``.
        run: neighbouring segments, which alone are copied, to their places in the images; without checksums.
    """
    _launch(table, blocks, images, access, programs, checksums, to_images=True, run=run)


def scatter(
    table: SegmentTable,
    blocks: torch.Tensor,
    images: torch.Tensor,
    access: Access,
    programs: int,
    checksums: torch.Tensor | None = None,
    run: slice | None = None,
) -> None:
    """Images -> blocks, on the current stream; arguments as in :func:`gather`. No block may be named twice."""
    _launch(table, blocks, images, access, programs, checksums, to_images=False, run=run)


def _launch(
    table: SegmentTable,
    blocks: torch.Tensor,
    images: torch.Tensor,
    access: Access,
    programs: int,
    checksums: torch.Tensor | None,
    *,
    to_images: bool,
    run: slice | None = None,
) -> None:
    assert len(blocks) == len(images), (len(blocks), len(images))
    assert access.checksum == (checksums is not None), "a checksum needs the variant that takes it"
    assert run in (None, slice(None)) or checksums is None, "a checksum is of a whole image"
    start, stop, _ = (run or slice(None)).indices(len(table.addresses))
    items_per_block = (stop - start) * -(-table.piece_bytes // access.tile_bytes)
    step = max(1, (WORK_ITEMS_MAX - 1) // items_per_block)
    for at in range(0, len(blocks), step):
        # A slice of a tensor costs the host 3 µs, so the usual call makes none.
        part = slice(at, at + step) if len(blocks) > step else None
        some = blocks if part is None else blocks[part]
        sums = checksums if part is None or checksums is None else checksums[part]
        paged_copy_kernel[(min(programs, len(some) * items_per_block),)](
            table.addresses,
            table.strides,
            some,
            images if part is None else images[part],
            some if sums is None else sums,
            len(some),
            start,
            stop - start,
            table.piece_bytes,
            TO_IMAGES=to_images,
            VECTOR_BYTES=access.vector_bytes,
            TILE_BYTES=access.tile_bytes,
            CHECKSUM=access.checksum,
            num_warps=WARPS,
        )
