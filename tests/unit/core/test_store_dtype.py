"""``store_dtype: fp8`` of a KVManager on CPU tensors: what comes back, what is never kept, and what must agree."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from flexkv_core import KVLayout, KVManager, KVResponseStatus, ModelConfig
from flexkv_core.block_manager import root_key
from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import ConfigError, LayoutError
from flexkv_core.quantised import quantised_layout
from flexkv_core.storage.directory import folder_name
from flexkv_kernels import copier_for
from flexkv_kernels.segments import pieces_of
from tests.unit.kernels.quantising_rig import rounded

TOKENS, BLOCKS, LAYERS = 16, 32, 3
IDS = np.random.default_rng(5).integers(0, 50_000, 6 * TOKENS)
PUT, GOT = [3, 4, 9, 1, 20, 30], [10, 11, 12, 13, 14, 15]


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    return [torch.randn(2, BLOCKS, TOKENS, 2, 8).to(torch.bfloat16) for _ in range(LAYERS)]


def exact_layout(tensors: list[torch.Tensor]) -> KVLayout:
    return KVLayout(2 * TOKENS, TOKENS, pieces_of(tensors, 1).block_bytes)


def layout_of(tensors: list[torch.Tensor]) -> KVLayout:
    return quantised_layout(exact_layout(tensors), 2 * LAYERS)


@pytest.fixture
def manager(tensors: list[torch.Tensor]) -> Iterator[KVManager]:
    layout = layout_of(tensors)
    copier = copier_for(tensors, block_dim=1, scales=layout.scales)
    config = FlexKVConfig(host_bytes=8 << 20, store_dtype="fp8")
    manager = KVManager(ModelConfig({"model": "test"}, layout), config, copier)
    manager.start()
    yield manager
    manager.blocks.check_integrity()
    manager.shutdown()


def places(blocks: list[int]) -> np.ndarray:
    return (np.array(blocks)[:, None] * TOKENS + np.arange(TOKENS)).ravel()


def values(tensors: list[torch.Tensor], blocks: list[int]) -> torch.Tensor:
    """[segments, blocks, tokens, values]."""
    return torch.cat([tensor[:, blocks].flatten(3) for tensor in tensors])


@pytest.mark.parametrize("layerwise", [False, True])
def test_what_comes_back_is_rounded(manager: KVManager, tensors: list[torch.Tensor], layerwise: bool) -> None:
    task = manager.put_async(IDS, places(PUT))
    assert manager.wait(task)[task].status is KVResponseStatus.SUCCESS
    task, mask = manager.get_match(IDS)
    assert mask.all()
    counter = {"layerwise_transfer": True, "counter_id": 1} if layerwise else {}
    manager.launch([task], [places(GOT)], **counter)
    wanted = rounded(values(tensors, PUT))
    for layer in range(LAYERS if layerwise else 0):
        assert manager.wait_layers(layer + 1, counter_id=1)
        part = slice(2 * layer, 2 * layer + 2)
        assert torch.equal(values(tensors, GOT)[part], wanted[part])
    assert manager.wait(task)[task].status is KVResponseStatus.SUCCESS
    assert torch.equal(values(tensors, GOT), wanted)


def test_a_value_that_is_not_finite_ends_what_is_kept(
    manager: KVManager, tensors: list[torch.Tensor]
) -> None:
    """Its block and those behind it; the same sequence is kept once it is computed right."""
    right = tensors[1][0, PUT[2], 0, 0, 0].item()
    tensors[1][0, PUT[2], 0, 0, 0] = float("inf")
    task = manager.put_async(IDS, places(PUT))
    assert manager.wait(task)[task].status is KVResponseStatus.FAILED
    assert manager.blocks.counters().unstorable_blocks == 1
    task, mask = manager.get_match(IDS)
    assert mask.sum() == 2 * TOKENS  # a block of FlexKV's
    manager.cancel([task])
    tensors[1][0, PUT[2], 0, 0, 0] = right
    task = manager.put_async(IDS, places(PUT))
    assert manager.wait(task)[task].status is KVResponseStatus.SUCCESS
    task, mask = manager.get_match(IDS)
    assert mask.all()
    manager.cancel([task])


@pytest.mark.parametrize("wanted", ["engine", "fp8"])
def test_setting_and_layout_must_agree(tensors: list[torch.Tensor], wanted: str) -> None:
    layout = layout_of(tensors) if wanted == "engine" else exact_layout(tensors)
    config = FlexKVConfig(host_bytes=8 << 20, store_dtype=wanted)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"store_dtype = {wanted}: the layout"):
        KVManager(ModelConfig({"model": "test"}, layout), config, copier_for(tensors, block_dim=1))


def test_a_copier_of_the_other_kind_is_refused(tensors: list[torch.Tensor]) -> None:
    config = FlexKVConfig(host_bytes=8 << 20, store_dtype="fp8")
    model = ModelConfig({"model": "test"}, layout_of(tensors))
    manager = KVManager(model, config, copier_for(tensors, block_dim=1))
    with pytest.raises(LayoutError, match="expected"):
        manager.start()
    manager.shutdown()


def test_names_differ_and_those_of_exact_bytes_are_what_they_were(tensors: list[torch.Tensor]) -> None:
    """Even of a layout of the same size that holds exact bytes."""
    rounding = layout_of(tensors)
    alike = KVLayout(rounding.tokens_per_block, rounding.device_block_tokens, rounding.device_block_bytes)
    more = quantised_layout(exact_layout(tensors), 2 * LAYERS + 1)
    layouts = [rounding, alike, more, exact_layout(tensors)]
    assert len({root_key(ModelConfig({}, layout), "") for layout in layouts}) == len(layouts)
    assert len({folder_name({}, layout) for layout in layouts}) == len(layouts)
    assert repr(alike) == repr(rounding)
    assert "scales" not in alike.as_dict()
    assert KVLayout(**rounding.as_dict()) == rounding
