"""What LRU promises beyond the contract of all policies (tests/contract/test_eviction_policies.py): the order."""

from __future__ import annotations

import pytest

from flexkv_core.cache.eviction import EvictionPolicy, make_policy


@pytest.fixture
def policy() -> EvictionPolicy:
    made = make_policy("lru")
    for run in range(4):
        made.add(run)
    return made


def order(policy: EvictionPolicy) -> list[int]:
    return list(policy.members()[0])


def test_use_makes_newest_and_the_deepest_older_than_what_is_above_it(policy: EvictionPolicy) -> None:
    policy.touch([1, 0])
    assert order(policy) == [2, 3, 0, 1]


def test_unparked_run_keeps_its_age_and_a_used_one_does_not(policy: EvictionPolicy) -> None:
    policy.park(0)
    policy.park(1)
    policy.touch([1])
    policy.unpark(0)
    assert order(policy) == [0, 2, 3, 1]
