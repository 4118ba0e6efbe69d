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


@pytest.mark.parametrize("count", [4, 40])
def test_quarantined_slots_are_never_handed_out_again(count: int) -> None:
    pool = Mempool(50)
    slots = pool.allocate(count)
    assert slots is not None
    pool.quarantine(2)
    pool.quarantine(2)
    assert (pool.used_count, pool.quarantined_count) == (count, 1)
    pool.free(slots)
    assert (pool.used_count, pool.free_count, pool.quarantined_count) == (0, 49, 1)
    pool.quarantine(2)
    assert 2 not in (pool.allocate(49) if pool.allocate(50) is None else [])
    assert not pool.taken()[2]
    with pytest.raises(AssertionError):
        pool.free(np.array([2], dtype=np.int32))


def test_claimed_slots_are_taken() -> None:
    pool = Mempool(10)
    pool.claim(np.array([3, 0, 7], dtype=np.int32))
    assert np.flatnonzero(pool.taken()).tolist() == [0, 3, 7]
    rest = pool.allocate(7)
    assert rest is not None
    assert rest.tolist() == [1, 2, 4, 5, 6, 8, 9]
    for wrong in ([3], [10], [-1]):
        with pytest.raises(AssertionError):
            pool.claim(np.array(wrong, dtype=np.int32))
