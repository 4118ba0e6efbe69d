"""Tensors become pieces: as long as they lie side by side, in the order of memory, and never overlapping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core import native
from flexkv_core.errors import LayoutError
from flexkv_kernels import CpuCopier, copier_for
from flexkv_kernels.access import Access, all_accesses, choose_access
from flexkv_kernels.gpu_bench.geometry import DTYPES, LAYOUTS, Geometry
from flexkv_kernels.reference import gather_reference, scatter_reference
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
    with pytest.raises(LayoutError, match=message) as error:
        pieces_of(tensors)
    assert "found" in str(error.value)
    assert "expected" in str(error.value)


@given(
    geometry=st.builds(
        Geometry,
        layout=st.sampled_from(LAYOUTS),
        dtype=st.sampled_from(sorted(DTYPES)),
        blocks=st.integers(1, 9),
        tokens=st.integers(1, 40),
        layers=st.integers(1, 3),
        heads=st.integers(1, 4),
        dim=st.integers(1, 33),
    ),
    seed=st.integers(0, 2**20),
)
def test_the_cpus_copies_agree_with_the_reference(geometry: Geometry, seed: int) -> None:
    """Every layout, both ways, by the C functions (or their twin) that the CPU's copier uses."""
    tensors, dim = geometry.tensors(seed), geometry.block_dim
    segments = pieces_of(tensors, dim)
    order = np.random.default_rng(seed).permutation(geometry.blocks)
    images = np.zeros((geometry.blocks, segments.block_bytes), np.uint8)
    places = np.arange(geometry.blocks, dtype=np.int32)
    arguments = {
        "segment_addrs": segments.addresses,
        "block_strides": segments.strides,
        "piece_bytes": segments.piece_bytes,
        "blocks": order,
        "block_count": geometry.blocks,
        "slot_base": images.ctypes.data,
        "slot_stride": segments.block_bytes,
        "slots": places,
        "slot_count": geometry.blocks,
    }
    native.gather(**arguments)
    assert torch.equal(torch.from_numpy(images), gather_reference(tensors, dim, torch.from_numpy(order)))
    images[:] = np.random.default_rng(seed + 1).integers(0, 256, images.shape)
    wanted = geometry.tensors(seed)
    scatter_reference(wanted, dim, torch.from_numpy(order), torch.from_numpy(images))
    native.scatter(**arguments)
    blocks = torch.arange(geometry.blocks)
    assert torch.equal(gather_reference(tensors, dim, blocks), gather_reference(wanted, dim, blocks))


def test_the_device_chooses_the_copier() -> None:
    tensors = [torch.zeros(2, 5, 4)]
    copier = copier_for(tensors, block_dim=1)
    assert isinstance(copier, CpuCopier)
    assert (copier.segments.block_count, len(copier.segments.addresses)) == (5, 2)
    with pytest.raises(LayoutError, match="found device meta; expected cpu, or cuda"):
        copier_for([torch.zeros(5, 4, device="meta")])


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
