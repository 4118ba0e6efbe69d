"""The engine by example; what must hold for all sequences of calls is in test_engine_machine.py."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest

from flexkv_core.cache import ROOT, EventKind, GlobalCacheEngine, TierEvent
from flexkv_core.cache.radix_tree import PyRunIndex, RunIndex
from flexkv_core.errors import ConfigError
from flexkv_core.types import KEY_BYTES, Tier

Engine = Callable[[int], GlobalCacheEngine]


@pytest.fixture(params=list({PyRunIndex, RunIndex}), ids=lambda c: c.__module__.split(".")[-1])
def make(request: pytest.FixtureRequest) -> Engine:
    return lambda capacity: GlobalCacheEngine({Tier.HOST: capacity}, index_factory=request.param)


def keys_of(blocks: int) -> bytes:
    """Random keys: as good as chained ones, as long as no prefix is made up twice."""
    return os.urandom(KEY_BYTES * blocks)


def store(engine: GlobalCacheEngine, keys: bytes) -> int:
    return engine.commit_put(engine.plan_put(keys))


def test_unknown_policy() -> None:
    with pytest.raises(ConfigError, match="eviction='best' is unknown; allowed: lru"):
        GlobalCacheEngine({Tier.HOST: 1}, eviction="best")


def test_nothing_asked(make: Engine) -> None:
    engine = make(4)
    assert engine.match(b"") == 0
    assert engine.plan_get(b"").lease is None
    put = engine.plan_put(b"")
    assert (put.count, put.start_block, put.lease) == (0, 0, None)
    assert engine.commit_put(put) == 0
    engine.abort_put(put)


def test_keys_of_any_bytes_type(make: Engine) -> None:
    engine, keys = make(8), keys_of(4)
    store(engine, bytearray(keys))  # type: ignore[arg-type]
    assert engine.match(memoryview(keys)) == 4  # type: ignore[arg-type]
    assert engine.plan_get(memoryview(keys)).keys == keys  # type: ignore[arg-type]


def test_get_gives_the_slots_of_the_put(make: Engine) -> None:
    engine, keys = make(16), keys_of(10)
    put = engine.plan_put(keys)
    assert engine.match(keys) == 0  # not while it is being written
    assert engine.commit_put(put) == 10
    get = engine.plan_get(keys + keys_of(3), start_block=4)
    assert (get.blocks, get.count) == (10, 6)
    assert get.host_slots.tolist() == put.slots[4:].tolist()
    assert get.keys == keys[4 * KEY_BYTES :]
    engine.finish_get(get)
    assert engine.lease_count == 0


def test_get_of_what_the_caller_has_takes_no_lease(make: Engine) -> None:
    engine, keys = make(16), keys_of(4)
    store(engine, keys)
    for start in (4, 9):
        get = engine.plan_get(keys, start_block=start)
        assert (get.blocks, get.count, get.lease) == (4, 0, None)


def test_prefix_longer_than_the_pool_stores_what_fits(make: Engine) -> None:
    engine, keys = make(16), keys_of(40)
    assert store(engine, keys) == 16
    assert engine.match(keys) == 16
    again = engine.plan_put(keys)
    assert (again.start_block, again.count) == (16, 0)
    assert engine.stats.blocks_no_room == 48


def test_new_branch_may_evict_the_old_one(make: Engine) -> None:
    engine, keys = make(16), keys_of(16)
    store(engine, keys)
    branch = keys[: 4 * KEY_BYTES] + keys_of(12)
    assert store(engine, branch) == 12
    assert engine.match(branch) == 16
    assert engine.match(keys) == 4


def test_least_recently_used_goes_first_and_from_its_tail(make: Engine) -> None:
    engine = make(30)
    first, second, third = keys_of(10), keys_of(10), keys_of(10)
    for keys in (first, second, third):
        store(engine, keys)
    engine.finish_get(engine.plan_get(first))
    store(engine, keys_of(4))
    assert [engine.match(keys) for keys in (first, second, third)] == [10, 6, 10]


def test_second_put_skips_what_the_first_is_writing(make: Engine) -> None:
    engine, keys = make(32), keys_of(20)
    first = engine.plan_put(keys[: 8 * KEY_BYTES])
    second = engine.plan_put(keys)
    assert (second.start_block, second.count) == (8, 12)
    assert engine.commit_put(second) == 12
    assert engine.match(keys) == 0  # what comes before is not there yet
    assert engine.commit_put(first) == 8
    assert engine.match(keys) == 20


def test_put_behind_what_its_caller_lacks_takes_nothing(make: Engine) -> None:
    engine, keys, other = make(16), keys_of(12), keys_of(10)
    store(engine, other)
    for first in (1, 12):
        put = engine.plan_put(keys, first)
        assert (put.start_block, put.count, put.lease) == (0, 0, None)
    assert engine.match(other) == 10, "nothing was evicted for it"
    writing = engine.plan_put(keys[: 4 * KEY_BYTES])
    put = engine.plan_put(keys[: 6 * KEY_BYTES], 4)
    assert (put.start_block, put.count) == (4, 2), "what is being written counts as known"
    engine.abort_put(put)
    engine.abort_put(writing)


def test_abort_takes_along_what_was_put_below(make: Engine) -> None:
    engine, keys = make(32), keys_of(20)
    first = engine.plan_put(keys[: 8 * KEY_BYTES])
    second = engine.plan_put(keys)
    engine.abort_put(first)
    third = engine.plan_put(keys[: 12 * KEY_BYTES])
    assert third.start_block == 0
    assert not set(third.slots.tolist()) & set(second.slots.tolist())
    assert engine.commit_put(second) == 0
    engine.abort_put(third)
    assert engine.used() == 0


def test_partial_commit_splits_what_others_branched_off(make: Engine) -> None:
    engine, keys = make(64), keys_of(20)
    put = engine.plan_put(keys)
    branch = keys[: 12 * KEY_BYTES] + keys_of(3)
    other = engine.plan_put(branch)
    assert other.start_block == 12
    assert engine.commit_put(put, 15) == 15
    assert engine.commit_put(other) == 3
    assert (engine.match(keys), engine.match(branch)) == (15, 15)
    engine.check_integrity()


def test_sequence_that_grows_block_by_block_becomes_one_run(make: Engine) -> None:
    engine, keys = make(600), keys_of(600)
    for blocks in range(1, 601):
        assert store(engine, keys[: blocks * KEY_BYTES]) == 1
    assert engine.match(keys) == 600
    assert len(engine.index) == 2  # joined up to 512 blocks
    engine.check_integrity()


def test_reset_forgets_at_once_and_frees_when_the_copies_end(make: Engine) -> None:
    engine, keys = make(32), keys_of(8)
    store(engine, keys)
    get = engine.plan_get(keys)
    put = engine.plan_put(keys_of(8))
    engine.reset()
    assert engine.match(keys) == 0
    assert engine.used() == 16
    fresh = engine.plan_put(keys)
    assert not set(fresh.slots.tolist()) & set(get.host_slots.tolist() + put.slots.tolist())
    engine.finish_get(get)
    assert engine.used() == 16
    assert engine.commit_put(put) == 0
    assert engine.used() == 8
    assert engine.commit_put(fresh) == 8
    assert engine.match(keys) == 8


def test_bad_block_and_what_follows_it_leave(make: Engine) -> None:
    engine, keys = make(32), keys_of(12)
    store(engine, keys)
    branch = keys[: 9 * KEY_BYTES] + keys_of(2)
    store(engine, branch)
    get = engine.plan_get(keys)
    assert engine.invalidate(get, 5) == 7 + 2
    assert engine.invalidate(get, 5) == 0
    assert (engine.match(keys), engine.match(branch)) == (5, 5)
    assert engine.used() == 12  # the branch is gone; what the get reads is not
    fresh = engine.plan_put(keys)
    assert engine.commit_put(fresh) == 7
    assert engine.invalidate(get, 5) == 0  # another block by now
    engine.finish_get(get)
    assert engine.used() == 12
    engine.check_integrity()


def test_what_comes_and_goes_is_reported_once_and_in_order(make: Engine) -> None:
    engine = make(8)
    tracking = GlobalCacheEngine({Tier.HOST: 8}, index_factory=type(engine.index), track_events=True)
    first, second = keys_of(8), keys_of(3)
    store(tracking, first)
    store(tracking, second)
    assert tracking.take_events() == [
        TierEvent(EventKind.STORED, Tier.HOST, first, ROOT),
        TierEvent(EventKind.REMOVED, Tier.HOST, first[5 * KEY_BYTES :]),
        TierEvent(EventKind.STORED, Tier.HOST, second, ROOT),
    ]
    assert tracking.take_events() == []
    tracking.abort_put(tracking.plan_put(second + keys_of(1)))
    tracking.reset()
    assert tracking.take_events() == []


def test_old_pinned_runs_are_stepped_over_once(make: Engine) -> None:
    engine = make(1000)
    old = [keys_of(1) for _ in range(500)]
    for keys in old:
        store(engine, keys)
    gets = [engine.plan_get(keys) for keys in old]
    for _ in range(3):
        assert store(engine, keys_of(500)) == 500
    assert len(list(engine.residency.policies[Tier.HOST].members()[1])) == 500
    for get in gets:
        engine.finish_get(get)
    assert not list(engine.residency.policies[Tier.HOST].members()[1])
    engine.check_integrity()


def _lose_a_slot(engine: GlobalCacheEngine, run: int) -> None:
    engine.index.set_slots(run, 0, 1, np.full(1, -1, np.int32))
    engine.pools[Tier.HOST].free(np.array([1], np.int32))


@pytest.mark.parametrize(
    ("message", "damage"),
    [
        ("pins", lambda engine, run: engine.index.pin(run)),
        ("differently", lambda engine, run: engine.pools[Tier.HOST].allocate(1)),
        ("that two hold", lambda engine, run: engine.index.set_slots(run, 0, 0, np.full(2, 1, np.int32))),
        ("in no tier", _lose_a_slot),
        ("in the tree only", lambda engine, run: engine.residency.policies[Tier.HOST].remove(run)),
        ("parked", lambda engine, run: engine.residency.policies[Tier.HOST].park(run)),
    ],
)
def test_recount_notices_damage(
    make: Engine, message: str, damage: Callable[[GlobalCacheEngine, int], object]
) -> None:
    engine, keys = make(8), keys_of(4)
    store(engine, keys)
    engine.check_integrity()
    damage(engine, engine.index.find(keys[:KEY_BYTES]))
    with pytest.raises(AssertionError, match=message):
        engine.check_integrity()


def test_disowned_put_makes_way_and_keeps_its_slots(make: Engine) -> None:
    engine, longer = make(12), keys_of(6)
    keys = longer[: 4 * KEY_BYTES]
    slow, below = engine.plan_put(keys), engine.plan_put(longer)
    assert (slow.count, below.start_block, below.count) == (4, 4, 2)
    engine.disown_put(slow)
    engine.check_integrity()
    engine.abort_put(below)  # what was put below it left with it
    again = engine.plan_put(keys)
    assert again.start_block == 0
    assert not set(again.slots.tolist()) & set(slow.slots.tolist())
    assert engine.commit_put(again) == again.count == 4
    engine.disown_put(slow)
    assert engine.commit_put(slow) == 0  # it came after all: too late
    engine.disown_put(slow)
    engine.check_integrity()
    assert (engine.match(keys), engine.used()) == (4, 4)
