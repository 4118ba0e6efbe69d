"""Which device blocks of several block tables make a slot."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from flexkv_core.errors import ConfigError
from flexkv_vllm.groups import LEFT_OUT, Groups, of_engine, of_lists

SHAPE = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}


def config_of(*specs: object) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


def full(block_size: int) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block_size, **SHAPE)


def window(block_size: int, tokens: int) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=block_size, sliding_window=tokens, **SHAPE)


TABLES = of_lists([[10, 11, 12, 13], [0, 0, 22, 23, 24, 25, 26, 27]])
MIXED = Groups.of(config_of(full(32), window(16, 40)), None)


def test_slot_is_the_smallest_that_fits_all_groups() -> None:
    assert (MIXED.slot_tokens, MIXED.per_slot) == (32, 3)
    assert Groups.of(config_of(full(32), window(16, 40)), 64).per_slot == 6
    assert Groups.of(config_of(full(16)), None).per_slot == 1
    with pytest.raises(ConfigError, match=r"tokens_per_block = 48: .* 32"):
        Groups.of(config_of(full(32), window(16, 40)), 48)


def test_blocks_of_a_slot_stand_group_by_group_without_what_left_its_window() -> None:
    assert MIXED.blocks(TABLES, 0, 3).reshape(-1, 3).tolist() == [
        [10, LEFT_OUT, LEFT_OUT],
        [11, 22, 23],
        [12, 24, 25],
    ]


def test_engine_tables_are_read_like_lists() -> None:
    tables = [[SimpleNamespace(block_id=i) for i in table] for table in ([10, 11], [0, 0, 22, 23])]
    assert MIXED.blocks(of_engine(tables), 0, 2).tolist() == MIXED.blocks(TABLES, 0, 2).tolist()


def test_what_the_device_holds_is_left_out_of_each_group() -> None:
    blocks = MIXED.blocks(TABLES, 1, 4)
    MIXED.leave_out_held(blocks, 1, 80)  # two and a half slots
    assert blocks.reshape(-1, 3).tolist() == [[LEFT_OUT] * 3, [12, LEFT_OUT, 25], [13, 26, 27]]


def test_first_whole_block() -> None:
    assert MIXED.first_whole(TABLES, 0, 4) == 1
    assert MIXED.first_whole(TABLES, 2, 4) == 2
    gone = of_lists([[10, 11], [0, 0, 0, 23]])
    assert MIXED.first_whole(gone, 0, 2) == 2
    assert Groups.of(config_of(full(32)), None).first_whole(gone, 0, 2) == 0


def test_only_blocks_of_windows_can_be_lost() -> None:
    assert MIXED.losable(MIXED.blocks(TABLES, 1, 3)) == {22, 23, 24, 25}
    assert not Groups.of(config_of(full(16), full(16)), None).lose_blocks
    assert Groups.of(config_of(full(16), full(16)), None).fail_as_one
    assert not Groups.of(config_of(full(16)), None).fail_as_one
    assert Groups.of(config_of(window(16, 40)), None).fail_as_one


@pytest.mark.parametrize("tokens", [1, 2, 33, 64, 65, 1000])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_batch_of_a_generating_request_is_stored_before_its_window_passes(tokens: int, step: int) -> None:
    """vLLM gives a block back before a step when every token of it lies before the window of the step's first token."""
    groups = Groups.of(config_of(full(16), window(16, tokens)), None)
    batch = groups.store_batch_max
    assert batch is not None
    planned = 0
    for computed in range(0, 3000, step):  # before the step
        full_blocks = (computed + step) // 16
        gone = max(0, computed - tokens + 1) // 16
        if full_blocks - planned >= batch:
            assert gone <= planned
            planned = full_blocks


def test_batch_is_not_bounded_without_windows() -> None:
    assert Groups.of(config_of(full(16)), None).store_batch_max is None
    assert np.array_equal(
        Groups.of(config_of(full(16)), 32).blocks(of_lists([[1, 2, 3, 4]]), 0, 2), [1, 2, 3, 4]
    )
