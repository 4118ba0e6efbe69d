"""Two tiers by example; what must hold for all sequences of calls is in tiers_machine.py."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest

from flexkv_core.cache import ROOT, EventKind, GlobalCacheEngine, WritePlan
from flexkv_core.cache.radix_tree import PyRunIndex, RunIndex
from flexkv_core.types import KEY_BYTES, Slots, Tier

Engine = Callable[[int, int], GlobalCacheEngine]


@pytest.fixture(params=list({PyRunIndex, RunIndex}), ids=lambda c: c.__module__.split(".")[-1])
def make(request: pytest.FixtureRequest) -> Engine:
    return lambda host, ssd: GlobalCacheEngine({Tier.HOST: host, Tier.SSD: ssd}, index_factory=request.param)


def keys_of(blocks: int) -> bytes:
    return os.urandom(KEY_BYTES * blocks)


def store(engine: GlobalCacheEngine, keys: bytes) -> None:
    engine.commit_put(engine.plan_put(keys))


def write_all(engine: GlobalCacheEngine, limit: int = 64) -> list[WritePlan]:
    plans = []
    while (plan := engine.plan_write(limit)) is not None:
        assert not len(engine.finish_write(plan, np.ones(plan.count, np.bool_)))
        plans.append(plan)
    engine.check_integrity()
    return plans


def array(*values: int) -> Slots:
    return np.array(values, dtype=np.int32)


def test_what_leaves_host_memory_comes_back_from_the_ssd(make: Engine) -> None:
    engine, keys = make(8, 32), keys_of(8)
    store(engine, keys)
    plans = write_all(engine, limit=5)
    assert [plan.count for plan in plans] == [5, 3]
    assert b"".join(plan.keys for plan in plans) == keys
    assert b"".join(plan.parents for plan in plans) == ROOT + keys[:-KEY_BYTES]
    other = keys_of(6)
    store(engine, other)
    assert engine.match(keys) == 8
    kept = engine.plan_get(other)
    cut = engine.plan_get(keys)
    assert (cut.blocks, len(cut.reads)) == (2, 0)  # no room to read into
    assert engine.plan_get(keys, fetch=False).blocks == 2
    engine.finish_get(kept)
    get = engine.plan_get(keys)
    assert (get.blocks, len(get.reads)) == (8, 6)
    assert engine.match(other) == 0  # never written, and evicted


def test_get_reads_what_only_the_ssd_has(make: Engine) -> None:
    engine, keys = make(8, 32), keys_of(8)
    store(engine, keys)
    write_all(engine)
    assert engine.evict(5) == 5
    get = engine.plan_get(keys, start_block=1)
    assert get.reads.index.tolist() == [2, 3, 4, 5, 6]
    assert get.reads.ssd_slots.tolist() == [3, 4, 5, 6, 7]
    engine.finish_get(get, np.array([True, True, False, True, True]))
    again = engine.plan_get(keys)
    assert again.reads.ssd_slots.tolist() == [5]
    engine.finish_get(again)
    assert (engine.used(), engine.used(Tier.SSD), engine.match(keys)) == (7, 8, 8)
    engine.check_integrity()


def test_two_gets_of_one_block_leave_one_copy(make: Engine) -> None:
    engine, keys = make(16, 32), keys_of(4)
    store(engine, keys)
    write_all(engine)
    engine.evict(4)
    gets = [engine.plan_get(keys) for _ in range(2)]
    assert not set(gets[0].host_slots.tolist()) & set(gets[1].host_slots.tolist())
    for get in gets:
        engine.finish_get(get, np.ones(4, np.bool_))
    assert engine.used() == 4
    assert engine.plan_get(keys).host_slots.tolist() == gets[0].host_slots.tolist()


def test_ssd_evicts_what_was_used_longest_ago(make: Engine) -> None:
    engine = make(100, 20)
    first, second, third = keys_of(10), keys_of(10), keys_of(6)
    for keys in (first, second):
        store(engine, keys)
        write_all(engine)
    engine.evict(20)
    engine.plan_get(first, fetch=False)
    store(engine, third)
    write_all(engine)
    assert [engine.match(keys) for keys in (first, second, third)] == [10, 4, 6]
    assert engine.stats.ssd_blocks_evicted == 6


def test_blocks_under_a_write_stay_in_host_memory(make: Engine) -> None:
    engine, keys = make(8, 8), keys_of(8)
    store(engine, keys)
    plan = engine.plan_write(8)
    assert plan is not None
    assert engine.evict(8) == 0
    assert engine.plan_put(keys_of(4)).count == 0
    assert not len(engine.finish_write(plan, np.ones(8, np.bool_)))
    assert engine.evict(8) == 8
    assert engine.match(keys) == 8


def test_write_of_blocks_that_left_is_forgotten(make: Engine) -> None:
    engine, keys = make(8, 8), keys_of(8)
    store(engine, keys)
    plan = engine.plan_write(8)
    assert plan is not None
    engine.reset()
    assert (engine.used(), engine.used(Tier.SSD)) == (8, 8)
    forget = engine.finish_write(plan, np.array([True] * 6 + [False] * 2))
    assert forget.tolist() == plan.ssd_slots[:6].tolist()
    assert (engine.used(), engine.used(Tier.SSD)) == (0, 0)


def test_dropped_writes_come_with_what_follows_them(make: Engine) -> None:
    engine, keys = make(32, 32), keys_of(12)
    store(engine, keys[: 8 * KEY_BYTES])
    assert engine.waiting_writes == 8
    assert engine.drop_oldest_writes(3) == 8
    assert engine.plan_write(8) is None
    store(engine, keys)
    (plan,) = write_all(engine)
    assert plan.keys == keys


def test_failed_writes_wait_again_if_asked_to(make: Engine) -> None:
    engine, keys = make(8, 8), keys_of(4)
    store(engine, keys)
    for retry, waiting in ((True, 4), (False, 0)):
        plan = engine.plan_write(8)
        assert plan is not None
        engine.finish_write(plan, np.zeros(4, np.bool_), retry)
        assert (engine.waiting_writes, engine.used(Tier.SSD)) == (waiting, 0)


def test_sequence_that_grows_under_writes_becomes_one_run(make: Engine) -> None:
    engine, keys = make(600, 600), keys_of(300)
    waiting: list[WritePlan] = []
    for blocks in range(1, 301):
        store(engine, keys[: blocks * KEY_BYTES])
        plan = engine.plan_write(64)
        if plan is not None:
            waiting.append(plan)
        if len(waiting) > 3:
            engine.finish_write(waiting[0], np.ones(waiting.pop(0).count, np.bool_))
    for plan in waiting:
        engine.finish_write(plan, np.ones(plan.count, np.bool_))
    assert len(engine.index) == 1
    engine.check_integrity()


def test_bad_copy_leaves_and_the_other_stays(make: Engine) -> None:
    engine, keys = make(16, 16), keys_of(4)
    store(engine, keys)
    write_all(engine)
    get = engine.plan_get(keys)
    assert engine.invalidate(get, 2) == 0
    assert engine.used() == 4  # others may be copying it
    engine.finish_get(get)
    assert engine.used() == 3
    get = engine.plan_get(keys)
    assert get.reads.ssd_slots.tolist() == [2]
    assert engine.invalidate(get, 2, Tier.SSD) == 2  # no copy is left
    engine.finish_get(get)
    assert engine.match(keys) == 2
    assert engine.pools[Tier.SSD].quarantined_count == 1
    assert engine.used(Tier.SSD) == 2
    store(engine, keys_of(14))
    assert 2 not in np.concatenate([plan.ssd_slots for plan in write_all(engine)])


def test_warm_start(make: Engine) -> None:
    engine, keys = make(8, 16), keys_of(6)
    branch = keys[: 2 * KEY_BYTES] + keys_of(2)
    lost = keys_of(2)
    names = keys + branch[2 * KEY_BYTES :] + lost[KEY_BYTES:] + keys_of(1)
    before = [
        ROOT,
        *(keys[16 * i : 16 * i + 16] for i in range(5)),
        branch[16:32],
        branch[32:48],
        lost[:16],
        ROOT,
    ]
    slots = array(5, 4, 3, 2, 1, 0, 9, 8, 7, 16)
    ages = np.array([1, 2, 3, 4, 5, 6, 20, 21, 22, 23])
    assert engine.load(slots, names, b"".join(before), ages).tolist() == [
        16,
        7,
    ]  # beyond the tier; without its parent
    engine.check_integrity()
    get = engine.plan_get(branch)
    assert get.reads.ssd_slots.tolist() == [5, 4, 9, 8]
    engine.finish_get(get)
    engine.evict(3, Tier.SSD)
    assert (engine.match(keys), engine.match(branch)) == (3, 4)


def test_warm_start_of_nothing(make: Engine) -> None:
    engine = make(8, 16)
    assert not len(engine.load(array(), b"", b""))
    engine.check_integrity()


def test_what_is_owed_waits_again_when_it_is_asked_for(make: Engine) -> None:
    engine, keys, others = make(16, 32), keys_of(6), keys_of(4)
    store(engine, keys)
    store(engine, others)
    assert engine.drop_oldest_writes(6) == 6
    plan = engine.plan_write(64)
    assert plan is not None
    assert plan.keys == others
    ok = np.array([True, True, False, False])
    assert not len(engine.finish_write(plan, ok))
    assert engine.plan_write(64) is None
    store(engine, keys + keys_of(2))  # cuts nothing: what is owed stays so when its run grows
    assert engine.queue_owed_writes(1) + engine.queue_owed_writes(64) == 8
    assert engine.queue_owed_writes(64) == 0
    assert sum(plan.count for plan in write_all(engine)) == 10


def test_nothing_is_owed_that_has_left_host_memory(make: Engine) -> None:
    engine, keys = make(8, 32), keys_of(8)
    store(engine, keys)
    engine.drop_oldest_writes(8)
    engine.evict(8)
    assert engine.queue_owed_writes(64) == 0


def test_slots_with_other_bytes_leave_the_tree_without_a_read(make: Engine) -> None:
    engine, keys, branch = make(8, 32), keys_of(8), keys_of(3)
    store(engine, keys)
    (plan,) = write_all(engine)
    slots = plan.ssd_slots
    assert engine.drop_slots(Tier.SSD, slots[[1, 6]]) == 0  # host memory has them
    (again,) = write_all(engine)
    assert again.keys == keys[KEY_BYTES : 2 * KEY_BYTES] + keys[6 * KEY_BYTES : 7 * KEY_BYTES]
    assert not set(again.ssd_slots.tolist()) & {int(slots[1]), int(slots[6])}
    engine.evict(8)
    get = engine.plan_get(keys[: 4 * KEY_BYTES])
    assert engine.drop_slots(Tier.SSD, slots[[3, 5, 7]]) == 5
    assert engine.match(keys) == 3
    store(engine, keys[: 3 * KEY_BYTES] + branch)  # nothing is left that stands in its way
    engine.invalidate(get, 3, Tier.SSD)  # the read found it too
    engine.finish_get(get)
    engine.check_integrity()
    assert engine.pools[Tier.SSD].quarantined_count == 5
    assert engine.drop_slots(Tier.SSD, slots) == 3 + len(branch) // KEY_BYTES


@pytest.mark.parametrize("index", list({PyRunIndex, RunIndex}))
def test_a_warm_start_is_told_in_pieces_and_parents_first(index: type[PyRunIndex]) -> None:
    capacities = {Tier.HOST: 8, Tier.SSD: 200}
    engine = GlobalCacheEngine(capacities, index_factory=index, track_events=True)
    stem = keys_of(4)
    chains = [stem + keys_of(12) for _ in range(10)]
    rows: dict[bytes, bytes] = {}
    for chain in chains:
        above = ROOT
        for at in range(0, len(chain), KEY_BYTES):
            rows[chain[at : at + KEY_BYTES]] = above
            above = chain[at : at + KEY_BYTES]
    order = np.random.default_rng(1).permutation(len(rows))
    keys, parents = (np.frombuffer(b"".join(raw), "V16")[order].tobytes() for raw in (rows, rows.values()))
    assert not len(engine.load(np.arange(len(rows), dtype=np.int32), keys, parents))
    engine.evict(5, Tier.SSD)  # comes after all that it takes back
    known, pieces = {ROOT}, 0
    told = set()
    while events := engine.take_events(16):
        pieces += 1
        for event in events:
            names = [event.keys[i : i + KEY_BYTES] for i in range(0, len(event.keys), KEY_BYTES)]
            assert event.tier is Tier.SSD
            if event.kind is EventKind.REMOVED:
                told -= set(names)
                continue
            assert event.parent in known
            assert [rows[name] for name in names] == [event.parent, *names[:-1]]
            known |= set(names)
            told |= set(names)
    assert pieces > 4
    assert len(told) == len(rows) - 5
