"""What every eviction policy owes, whatever its order. A new policy is covered by its line in the registry."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core.cache.eviction import POLICIES, EvictionPolicy, make_policy
from flexkv_core.errors import ConfigError

RUNS = range(8)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "touch", "park", "unpark"]), st.permutations(RUNS)),
    max_size=60,
)


@pytest.fixture(params=sorted(POLICIES))
def make(request: pytest.FixtureRequest) -> Callable[[], EvictionPolicy]:
    return POLICIES[request.param]


def _drain(policy: EvictionPolicy) -> list[int]:
    """All victims in turn, each removed."""
    victims = []
    while run := policy.victims(1):
        victims += run
        policy.remove(run[0])
    return victims


def _apply(policy: EvictionPolicy, name: str, runs: list[int], held: set[int], parked: set[int]) -> None:
    """One operation as the engine may do it, on the policy and on the two sets of its model."""
    run = runs[0]
    if name == "add" and run not in held:
        policy.add(run)
        held.add(run)
    elif name == "remove":
        policy.remove(run)
        held.discard(run)
        parked.discard(run)
    elif name == "touch":
        policy.touch(runs[:3])
        parked.difference_update(runs[:3])
    elif name == "park" and (victims := policy.victims(2)):
        policy.park(victims[-1])
        parked.add(victims[-1])
    elif name == "unpark":
        policy.unpark(run)
        if run in parked:
            parked.remove(run)
            assert policy.victims(1) == [run]


@given(operations=OPERATIONS)
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_holds_each_run_once_and_offers_no_parked_one(
    name: str, operations: list[tuple[str, list[int]]]
) -> None:
    policy, held, parked = make_policy(name), set[int](), set[int]()
    for operation, runs in operations:
        _apply(policy, operation, runs, held, parked)
        order, aside = (list(part) for part in policy.members())
        assert len(order) == len(set(order))
        assert set(order) == held - parked
        assert set(aside) == parked
        assert policy.victims(3) == order[:3]
    assert set(_drain(policy)) == held - parked


def test_a_child_goes_before_its_parent(make: Callable[[], EvictionPolicy]) -> None:
    policy = make()
    for run in (3, 1, 2, 7):
        policy.add(run)
    policy.touch([1, 2, 3])
    victims = _drain(policy)
    assert victims.index(3) < victims.index(2) < victims.index(1)


def test_unknown_runs_are_ignored(make: Callable[[], EvictionPolicy]) -> None:
    policy = make()
    policy.remove(5)
    policy.unpark(5)
    policy.touch([5, 6])
    assert policy.victims(1) == []


def test_cost_does_not_grow_with_the_number_of_runs(make: Callable[[], EvictionPolicy]) -> None:
    def evict_8_us(runs: int) -> float:
        policy, times = make(), []
        for run in range(runs):
            policy.add(run)
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(8):
                policy.remove(policy.victims(1)[0])
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)

    small = evict_8_us(1_000)
    assert evict_8_us(100_000) < 10 * small + 10  # a scan of all runs would be 100 times as slow


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="lru"):
        make_policy("nothing")
