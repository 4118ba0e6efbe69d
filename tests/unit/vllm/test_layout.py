"""vLLM's tensors in FlexKV's words: every shape that its backends make, and clear refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flexkv_core.errors import LayoutError
from flexkv_vllm.layout import device_segments

BLOCKS = 6


def cache_config(layers: list[str]) -> SimpleNamespace:
    return SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=[SimpleNamespace(layer_names=layers)])


@pytest.mark.parametrize(
    ("tensor", "segments", "piece_bytes"),
    [
        (torch.zeros(BLOCKS, 3, 64, 128), 1, 3 * 64 * 128 * 4),  # K and V side by side, all in one block
        (torch.zeros(2, BLOCKS, 16, 3, 64), 2, 16 * 3 * 64 * 4),  # K, then V
        (torch.zeros(BLOCKS, 2, 16, 3, 64), 1, 2 * 16 * 3 * 64 * 4),  # K and V per block
        (torch.zeros(BLOCKS, 16, 576), 1, 16 * 576 * 4),  # MLA
        (torch.zeros(BLOCKS, 3, 16, 64).transpose(1, 2), 1, 16 * 3 * 64 * 4),  # heads and tokens exchanged
        (
            torch.zeros(4 * BLOCKS, 16, 8),
            1,
            4 * 16 * 8 * 4,
        ),  # the kernel's blocks are a quarter of the engine's
        (torch.zeros(2, 4 * BLOCKS, 16, 8), 2, 4 * 16 * 8 * 4),
        (torch.zeros(BLOCKS, 8, 4)[:, :, :3], 8, 3 * 4),  # other bytes between the pieces
    ],
)
def test_shapes(tensor: torch.Tensor, segments: int, piece_bytes: int) -> None:
    found = device_segments({"a": tensor}, cache_config(["a"]))
    assert (len(found.addresses), found.piece_bytes, found.block_count) == (segments, piece_bytes, BLOCKS)


def test_layers_of_one_storage() -> None:
    """One storage for all layers, the layers of a block next to each other."""
    storage = torch.zeros(BLOCKS, 2, 100)
    found = device_segments({"b": storage[:, 1], "a": storage[:, 0]}, cache_config(["a", "b"]))
    assert (found.addresses - storage.data_ptr()).tolist() == [0, 400]
    assert found.strides.tolist() == [800, 800]
    assert found.block_bytes == 800


def test_layers_that_share_a_tensor_count_once() -> None:
    tensor = torch.zeros(BLOCKS, 8)
    assert device_segments({"a": tensor, "b": tensor}, cache_config(["a"])).block_bytes == 32


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(BLOCKS + 1, 8), "multiple of the 6 blocks"),
        ([torch.zeros(BLOCKS, 8)], "found list; expected one tensor"),
    ],
)
def test_what_is_not_understood_is_refused(tensor: object, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        device_segments({"a": tensor}, cache_config(["a"]))  # type: ignore[dict-item]
