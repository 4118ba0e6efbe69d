"""Layouts refuse what they do not describe, and say what was found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexkv_core.errors import ConfigError, LayoutError
from flexkv_core.layout import DeviceSegments, KVLayout
from flexkv_kernels import pieces_of


def test_slot_holds_all_shards_in_whole_pages() -> None:
    layout = KVLayout(tokens_per_block=64, device_block_tokens=16, device_block_bytes=1000, shard_count=2)
    assert (layout.blocks_per_slot, layout.shard_bytes, layout.slot_bytes) == (4, 4000, 8192)


def test_block_size_must_be_a_multiple_of_the_engines() -> None:
    with pytest.raises(
        ConfigError, match=r"tokens_per_block = 24: must be a multiple of the engine's block size, 16"
    ):
        KVLayout(tokens_per_block=24, device_block_tokens=16, device_block_bytes=1)


@pytest.mark.parametrize(
    "field", ["tokens_per_block", "device_block_tokens", "device_block_bytes", "shard_count"]
)
def test_sizes_must_be_positive(field: str) -> None:
    values = {"tokens_per_block": 16, "device_block_tokens": 16, "device_block_bytes": 1, "shard_count": 1}
    with pytest.raises(LayoutError, match=f"{field} is 0"):
        KVLayout(**{**values, field: 0})


def test_blocks_of_several_tables_fill_a_slot() -> None:
    """Three device blocks of two sizes; what is recorded of a layout with one table is what it was before there were others."""
    layout = KVLayout(32, 16, 1000, device_blocks=3)
    assert (layout.blocks_per_slot, layout.shard_bytes) == (3, 3000)
    assert KVLayout(**layout.as_dict()) == layout
    assert "device_blocks" not in KVLayout(32, 16, 1000).as_dict()
    assert repr(KVLayout(32, 16, 1000)) == (
        "KVLayout(tokens_per_block=32, device_block_tokens=16, device_block_bytes=1000, shard_count=1)"
    )
    with pytest.raises(LayoutError, match="device_blocks is -1"):
        KVLayout(32, 16, 1000, device_blocks=-1)


def test_overlapping_blocks_are_refused() -> None:
    with pytest.raises(LayoutError, match="stride of 8 bytes; expected at least the piece's 16"):
        DeviceSegments(np.array([4096]), np.array([8]), piece_bytes=16, block_count=4)


@pytest.mark.parametrize(
    ("tensor", "piece_bytes"),
    [
        (torch.zeros(5, 3, 7), 84),
        (torch.zeros(5, 7, 3).transpose(1, 2), 84),  # inner dimensions in any order
        (torch.zeros(5, 2, 3, 7)[:, 0], 84),  # other bytes between blocks
        (torch.zeros(5, 3, dtype=torch.bfloat16), 6),
    ],
)
def test_whole_blocks_are_one_piece(tensor: torch.Tensor, piece_bytes: int) -> None:
    segments = pieces_of([tensor])
    assert (segments.piece_bytes, segments.block_count) == (piece_bytes, 5)
    assert segments.strides[0] == tensor.stride(0) * tensor.element_size()
