"""Tensors become pieces: as long as they lie side by side, in the order of memory, and never overlapping."""

from __future__ import annotations

import pytest
import torch

from flexkv_core.errors import LayoutError
from flexkv_kernels.access import Access, all_accesses, choose_access
from flexkv_kernels.segments import pieces_of


@pytest.mark.parametrize(
    ("tensor", "block_dim", "offsets", "piece_bytes", "stride"),
    [
        (torch.zeros(2, 5, 4, 3, dtype=torch.int16), 1, [0, 120], 24, 24),  # K, then V
        (torch.zeros(5, 2, 4, 3, dtype=torch.int16), 0, [0], 48, 48),
        (torch.zeros(3, 5, 4, dtype=torch.uint8).permute(1, 2, 0), 0, [0, 20, 40], 4, 4),  # a piece a head
        (torch.zeros(5, 4, 6, dtype=torch.uint8)[:, :, :3], 0, [0, 6, 12, 18], 3, 24),  # gaps within a block
        (torch.zeros(2, 3, 5, 4, dtype=torch.uint8), 2, [0, 20, 40, 60, 80, 100], 4, 4),
        (torch.zeros(2, 1, 4, dtype=torch.uint8), 1, [0, 4], 4, 4),  # one block only
    ],
)
def test_pieces(
    tensor: torch.Tensor, block_dim: int, offsets: list[int], piece_bytes: int, stride: int
) -> None:
    found = pieces_of([tensor], block_dim)
    assert (found.addresses - tensor.data_ptr()).tolist() == offsets
    assert (found.piece_bytes, set(found.strides.tolist())) == (piece_bytes, {stride})


def test_tensors_with_other_pieces_share_the_shortest() -> None:
    whole, halves = torch.zeros(5, 8, dtype=torch.uint8), torch.zeros(2, 5, 4, dtype=torch.uint8)
    found = pieces_of([whole, halves.permute(1, 0, 2)])
    assert found.piece_bytes == 4
    assert (found.addresses[:2] - whole.data_ptr()).tolist() == [0, 4]
    assert found.block_bytes == 16


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "found none"),
        ([torch.zeros(5, 3), torch.zeros(4, 3)], "expected one of each"),
        ([torch.zeros(5, 1, 4).expand(5, 3, 4)], "do not overlap"),
        ([torch.zeros(5, 6, dtype=torch.uint8), torch.zeros(5, 8, dtype=torch.uint8)[:, :4]], "a multiple"),
    ],
)
def test_what_cannot_be_cut_is_refused(tensors: list[torch.Tensor], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        pieces_of(tensors)


@pytest.mark.parametrize("width", [16, 8, 4, 2, 1])
def test_access_is_as_wide_as_all_allow(width: int) -> None:
    aligned = torch.zeros(5 * 64 + 16, dtype=torch.uint8)
    aligned = aligned[-aligned.data_ptr() % 16 :]
    segments = pieces_of([aligned[:320].view(5, 64)])
    assert choose_access(segments, 4096).vector_bytes == 16
    assert choose_access(segments, 4096 + width).vector_bytes == width  # by the images
    if width < 16:
        shifted = pieces_of([aligned[width : width + 256].view(4, 64)])
        assert choose_access(shifted, 4096).vector_bytes == width  # by the addresses
        pieces = pieces_of([aligned[: 3 * (width + 16)].view(3, width + 16)])
        assert choose_access(pieces, 4096).vector_bytes == width  # by pieces and strides


def test_tiles_fit_the_pieces() -> None:
    for piece_bytes, tile_bytes in ((16, 2048), (2048, 2048), (4096, 4096), (4112, 8192), (1 << 20, 8192)):
        raw = torch.empty(3 * piece_bytes + 16, dtype=torch.uint8)
        tensor = raw[-raw.data_ptr() % 16 :][: 3 * piece_bytes].view(3, piece_bytes)
        access = choose_access(pieces_of([tensor]), 4096)
        assert access == Access(16, tile_bytes)
        assert access in all_accesses()
