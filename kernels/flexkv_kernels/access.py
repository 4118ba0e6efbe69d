"""How a paged copy touches memory: the widest access that every address allows, and the tile that one program moves at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexkv_core.layout import DeviceSegments

VECTOR_BYTES_MAX = 16
"""One thread's widest access on every target (``v4.b32``, ``dwordx4``)."""

THREADS = 128
"""Of a program on every target: 4 warps of 32 lanes, or 2 of AMD's 64."""

ACCESSES = {16: (1, 2, 4), 8: (1, 4), 4: (1, 4), 2: (4,), 1: (8,)}
"""How many accesses of each width one thread may have under way, by the piece's size. The largest stay within 40 registers on every
target, so that 12 programs fit on an SM and have about 100 KiB under way. On an H200 tiles of 4 KiB gather at 0.88 of a copy within device
memory, of 8 KiB at 0.85, of 16 KiB at 0.82; over the bus 8 KiB fill it with half the programs that 4 KiB need (2026-11-27)."""

CHECKSUM_ACCESSES = {16: (1,), 8: (2,), 4: (4,)}
"""With the checksum fused each word also needs a 64-bit product."""


@dataclass(frozen=True)
class Access:
    """One variant of the kernel.

    Attributes:
        vector_bytes: bytes of one access, 16, 8, 4, 2 or 1: divides every address, stride and piece.
        tile_bytes: bytes that a program moves between two looks into the tables; a power of two.
        checksum: add up each block's checksum on the way, see :mod:`flexkv_kernels.checksum`.
    """

    vector_bytes: int
    tile_bytes: int
    checksum: bool = False

    def __post_init__(self) -> None:
        assert self.vector_bytes in (16, 8, 4, 2, 1), self.vector_bytes
        assert self.tile_bytes >= THREADS * self.vector_bytes, self.tile_bytes
        assert not self.tile_bytes & (self.tile_bytes - 1), self.tile_bytes
        assert not self.checksum or self.word_bytes == 4, "the checksum is a sum over 32-bit words"

    @property
    def word_bytes(self) -> int:
        """Bytes of an element in the kernel; wider accesses are vectors of 32-bit words."""
        return min(4, self.vector_bytes)


def choose_access(segments: DeviceSegments, image_alignment: int, checksum: bool = False) -> Access:
    """The widest access for these segments and for images whose addresses are all multiples of ``image_alignment`` bytes.

    An image is where a block's pieces lie one after another, in a staging buffer or in a slot. With ``checksum``, pieces and addresses
    must be multiples of 4 bytes.
    """
    alignment = int(np.gcd.reduce(np.concatenate([segments.addresses, segments.strides])))
    alignment = int(np.gcd.reduce([alignment, segments.piece_bytes, image_alignment]))
    vector_bytes = min(VECTOR_BYTES_MAX, alignment & -alignment)
    tiles = [
        THREADS * vector_bytes * count
        for count in (CHECKSUM_ACCESSES if checksum else ACCESSES)[vector_bytes]
    ]
    return Access(
        vector_bytes, next((tile for tile in tiles if tile >= segments.piece_bytes), tiles[-1]), checksum
    )


def all_accesses() -> list[Access]:
    """Every variant that :func:`choose_access` can choose."""
    return [
        Access(width, THREADS * width * count, checksum)
        for checksum, table in ((False, ACCESSES), (True, CHECKSUM_ACCESSES))
        for width, counts in table.items()
        for count in counts
    ]
