from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core.cache.mempool import Mempool


def test_fresh_pool_hands_out_ascending_neighbours() -> None:
    pool = Mempool(100)
    first, second = pool.allocate(60), pool.allocate(40)
    assert first is not None
    assert second is not None
    assert first.dtype == np.int32
    assert first.tolist() == list(range(60))
    assert second.tolist() == list(range(60, 100))
    assert (pool.free_count, pool.used_count) == (0, 100)


def test_all_or_nothing() -> None:
    pool = Mempool(10)
    assert pool.allocate(11) is None
    assert pool.free_count == 10
    empty = pool.allocate(0)
    assert empty is not None
    assert len(empty) == 0


@pytest.mark.parametrize("count", [5, 40])
def test_slots_returned_together_come_out_together(count: int) -> None:
    pool = Mempool(100)
    slots = pool.allocate(count)
    assert slots is not None
    pool.allocate(count)
    pool.free(slots)
    again = pool.allocate(count)
    assert again is not None
    assert again.tolist() == slots.tolist()


@pytest.mark.parametrize("count", [3, 40], ids=["few", "many"])
@pytest.mark.parametrize("fault", ["free already", "named twice", "too high", "negative"])
def test_wrong_returns_are_noticed(count: int, fault: str) -> None:
    pool = Mempool(100)
    slots = pool.allocate(count)
    assert slots is not None
    wrong = slots.copy()
    wrong[1] = {"free already": 99, "named twice": wrong[0], "too high": 100, "negative": -1}[fault]
    with pytest.raises(AssertionError):
        pool.free(wrong)


@given(st.lists(st.one_of(st.integers(0, 30), st.sampled_from(["first", "last"])), max_size=30))
def test_equals_a_set(steps: list[int | str]) -> None:
    pool = Mempool(64)
    taken: list[list[int]] = []
    for step in steps:
        if isinstance(step, int):
            slots = pool.allocate(step)
            used = sum(map(len, taken))
            assert (slots is None) == (step > 64 - used)
            if slots is not None:
                assert not {slot for part in taken for slot in part} & set(slots.tolist())
                taken.append(slots.tolist())
        elif taken:
            pool.free(np.array(taken.pop(0 if step == "first" else -1)[::-1], dtype=np.int32))
        assert set(np.flatnonzero(pool.taken()).tolist()) == {slot for part in taken for slot in part}
