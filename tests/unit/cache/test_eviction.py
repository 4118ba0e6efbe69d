"""The contract of every eviction policy, and the order of each."""

from __future__ import annotations

import pytest

from flexkv_core.cache.eviction import POLICIES, EvictionPolicy, make_policy
from flexkv_core.errors import ConfigError


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    made = make_policy(request.param)
    for run in range(5):
        made.add(run)
    return made


def drain(policy: EvictionPolicy) -> list[int]:
    order = []
    while (run := policy.victim()) is not None:
        order.append(run)
        policy.remove(run)
    return order


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"'mru'.*lru"):
        make_policy("mru")


def test_every_run_becomes_a_victim_once(policy: EvictionPolicy) -> None:
    assert sorted(drain(policy)) == [0, 1, 2, 3, 4]
    assert policy.victim() is None


def test_asking_changes_nothing(policy: EvictionPolicy) -> None:
    assert policy.victim() == policy.victim()


def test_removed_and_unknown_runs(policy: EvictionPolicy) -> None:
    policy.remove(3)
    policy.remove(77)
    policy.touch([3, 77])
    policy.unpark(77)
    assert sorted(drain(policy)) == [0, 1, 2, 4]


def test_child_goes_before_parent(policy: EvictionPolicy) -> None:
    policy.touch([4, 2, 0])
    order = drain(policy)
    assert order.index(0) < order.index(2) < order.index(4)


def test_parked_run_is_out_of_the_way_and_comes_back_first(policy: EvictionPolicy) -> None:
    first = policy.victim()
    assert first is not None
    policy.park(first)
    second = policy.victim()
    assert second != first
    assert first in list(policy.members()[1])
    policy.unpark(first)
    assert policy.victim() == first
    policy.unpark(first)
    assert sorted(drain(policy)) == [0, 1, 2, 3, 4]


def test_use_brings_a_parked_run_back(policy: EvictionPolicy) -> None:
    first = policy.victim()
    assert first is not None
    policy.park(first)
    policy.touch([first])
    assert not list(policy.members()[1])
    assert sorted(drain(policy)) == [0, 1, 2, 3, 4]


def test_parked_run_can_leave(policy: EvictionPolicy) -> None:
    first = policy.victim()
    assert first is not None
    policy.park(first)
    policy.remove(first)
    policy.unpark(first)
    assert first not in drain(policy)


def test_lru_order() -> None:
    policy = make_policy("lru")
    for run in range(4):
        policy.add(run)
    policy.touch([1, 0])
    assert drain(policy) == [2, 3, 0, 1]
