"""The C index against its Python twin, operation by operation."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flexkv_core.cache.radix_tree import PyRunIndex, RunIndex
from flexkv_core.types import KEY_BYTES, Slots

native_only = pytest.mark.skipif(RunIndex is PyRunIndex, reason="the C extension was not built")
each_index = pytest.mark.parametrize(
    "index_class", list({PyRunIndex, RunIndex}), ids=lambda c: c.__module__.split(".")[-1]
)


def chain(parent: bytes, tokens: list[int]) -> bytes:
    keys = []
    for token in tokens:
        parent = hashlib.blake2b(parent + bytes([token]), digest_size=KEY_BYTES).digest()
        keys.append(parent)
    return b"".join(keys)


def slots(*values: int) -> Slots:
    return np.array(values, dtype=np.int32)


class BothIndexes(RuleBasedStateMachine):
    """Every operation on both; ids may differ, so they are paired when a run is made."""

    @initialize(track=st.booleans())
    def make(self, track: bool) -> None:
        self.twin, self.native = PyRunIndex(track), RunIndex(track)
        self.native_id = {-1: -1}
        self.next_slot = 0
        self.pinned: list[int] = []  # twin's ids, once a pin

    def twin_id(self, native: int) -> int:
        return next(t for t, n in self.native_id.items() if n == native)

    def draw_run(self, data: st.DataObject, attached: bool = False) -> int:
        runs = [run for run in self.twin.runs() if not (attached and self.twin.info(run)[3])]
        return data.draw(st.sampled_from(runs), label="run") if runs else -1

    def forget_gone(self) -> None:
        alive = {*self.twin.runs(), -1}
        self.native_id = {t: n for t, n in self.native_id.items() if t in alive}

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 3), min_size=1, max_size=12), tier=st.integers(0, 2))
    def insert(self, data: st.DataObject, tokens: list[int], tier: int) -> None:
        parent = self.draw_run(data, attached=True) if data.draw(st.booleans(), label="below a run") else -1
        keys = chain(self.twin.keys(parent)[-KEY_BYTES:] if parent >= 0 else b"", tokens)
        new = np.arange(self.next_slot, self.next_slot + len(tokens), dtype=np.int32)
        self.next_slot += len(tokens)
        if self.twin.find(keys[:KEY_BYTES]) >= 0:
            for index, above in ((self.twin, parent), (self.native, self.native_id[parent])):
                with pytest.raises(ValueError, match="head"):
                    index.insert(above, keys, tier, new)
            return
        run = self.twin.insert(parent, keys, tier, new)
        self.native_id[run] = self.native.insert(self.native_id[parent], keys, tier, new)
        self.pinned.append(run)

    @rule(data=st.data())
    def split(self, data: st.DataObject) -> None:
        run = self.draw_run(data, attached=True)
        if run < 0 or self.twin.info(run)[1] < 2:
            return
        at = data.draw(st.integers(1, self.twin.info(run)[1] - 1), label="at")
        head = self.twin.split(run, at)
        self.native_id[head] = self.native.split(self.native_id[run], at)

    @rule(data=st.data(), blocks_max=st.integers(2, 30))
    def merge(self, data: st.DataObject, blocks_max: int) -> None:
        run = self.draw_run(data)
        if run < 0:
            return
        native = self.native.merge(self.native_id[run], blocks_max)
        assert self.native_id[self.twin.merge(run, blocks_max)] == native
        self.forget_gone()

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        run = self.draw_run(data)
        if run >= 0:
            self.twin.publish(run)
            self.native.publish(self.native_id[run])

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        run = self.draw_run(data, attached=True)
        if run >= 0:
            self.twin.pin(run)
            self.native.pin(self.native_id[run])
            self.pinned.append(run)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        run = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1), label="pin"))
        native = self.native.release(self.native_id[run])
        above = self.twin.release(run)
        assert self.native_id[above] == native
        self.forget_gone()

    @rule(data=st.data(), tier=st.integers(0, 2), want=st.integers(1, 20))
    def evict(self, data: st.DataObject, tier: int, want: int) -> None:
        runs = list(
            dict.fromkeys(self.draw_run(data) for _ in range(data.draw(st.integers(1, 4), label="runs")))
        )
        if runs == [-1]:
            return
        native = self.native.evict([self.native_id[run] for run in runs], tier, want)
        freed, done, blocked, gone, above = self.twin.evict(runs, tier, want)
        assert native[:3] == (freed, done, blocked)
        assert sorted(native[3]) == sorted(self.native_id[other] for other in gone)
        assert native[4] == self.native_id[above]
        self.forget_gone()

    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        run = self.draw_run(data)
        if run < 0:
            return
        before = dict(self.native_id)
        left = self.native.detach(self.native_id[run])
        assert sorted(before[twin] for twin in self.twin.detach(run)) == sorted(left)
        self.forget_gone()

    @precondition(lambda self: self.twin.blocks > 60)
    @rule()
    def detach_all(self) -> None:
        self.twin.detach_all()
        self.native.detach_all()
        self.forget_gone()

    @rule(data=st.data(), tier=st.integers(0, 2), values=st.lists(st.integers(-2, 99), max_size=4))
    def set_slots(self, data: st.DataObject, tier: int, values: list[int]) -> None:
        run = self.draw_run(data)
        if run < 0:
            return
        at = data.draw(st.integers(0, self.twin.info(run)[1]), label="at")
        fits = at + len(values) <= self.twin.info(run)[1]
        for index, number in ((self.twin, run), (self.native, self.native_id[run])):
            if fits:
                index.set_slots(number, tier, at, slots(*values))
            else:
                with pytest.raises(ValueError, match="do not fit"):
                    index.set_slots(number, tier, at, slots(*values))

    @rule(
        data=st.data(),
        skip=st.integers(0, 8),
        tier=st.integers(0, 2),
        values=st.lists(st.integers(-1, 99), min_size=1, max_size=8),
    )
    def fill(self, data: st.DataObject, skip: int, tier: int, values: list[int]) -> None:
        run = self.draw_run(data)
        if run < 0:
            return
        above = sum(self.twin.info(step)[1] for step in self.twin.path(run))
        given = [slots(*values) for _ in range(2)]
        pairs = ((self.twin, run, given[0]), (self.native, self.native_id[run], given[1]))
        if above < skip + len(values):
            for index, number, array in pairs:
                with pytest.raises(ValueError, match="blocks"):
                    index.fill(number, skip, tier, array)
            return
        gained = [index.fill(number, skip, tier, array) for index, number, array in pairs]
        assert [self.native_id[other] for other in gained[0]] == gained[1]
        assert given[0].tolist() == given[1].tolist()

    @rule(data=st.data(), tiers=st.permutations([0, 1, 2]), limit=st.integers(1, 9))
    def missing_and_segment(self, data: st.DataObject, tiers: list[int], limit: int) -> None:
        run = self.draw_run(data)
        if run < 0:
            return
        number, length = self.native_id[run], self.twin.info(run)[1]
        at = data.draw(st.integers(0, length), label="at")
        found = self.twin.missing(run, tiers[0], tiers[1], at, limit)
        assert self.native.missing(number, tiers[0], tiers[1], at, limit) == found
        if found[1]:
            whole = self.twin.segment(run, tiers[0], *found)
            assert self.native.segment(number, tiers[0], *found) == whole
            assert whole[1] == self.twin.keys(run)[KEY_BYTES * found[0] : KEY_BYTES * sum(found)]

    @rule(tier=st.integers(0, 2), values=st.sets(st.integers(-1, 99), max_size=20))
    def locate(self, tier: int, values: set[int]) -> None:
        found = [np.frombuffer(i.locate(tier, slots(*values)), np.int32) for i in (self.twin, self.native)]
        places = [[tuple(place) for place in raw.reshape(-1, 3).tolist()] for raw in found]
        assert sorted((self.native_id[run], at, slot) for run, at, slot in places[0]) == places[1]

    @rule(data=st.data(), through=st.booleans(), tier=st.integers(0, 2), start=st.integers(0, 6))
    def match(self, data: st.DataObject, tier: int, through: bool, start: int) -> None:
        run = self.draw_run(data)
        path = self.twin.path(run) if run >= 0 else []
        keys = b"".join(self.twin.keys(step) for step in path)
        cut = data.draw(st.integers(0, len(keys) // KEY_BYTES), label="cut") * KEY_BYTES
        keys = keys[:cut] + chain(keys[:cut][-KEY_BYTES:], data.draw(st.lists(st.integers(0, 4), max_size=6)))
        outs = [np.full(max(0, len(keys) // KEY_BYTES - start), -7, dtype=np.int32) for _ in range(2)]
        blocks, found, at = self.twin.match(keys, start, outs[0], tier, through)
        assert self.native.match(keys, start, outs[1], tier, through) == (blocks, self.native_id[found], at)
        assert outs[0].tolist() == outs[1].tolist()

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "twin"):
            return
        twin, native = self.twin, self.native
        assert (len(twin), twin.blocks, len(twin.runs())) == (len(native), native.blocks, len(native.runs()))
        for run in twin.runs():
            number = self.native_id[run]
            parent, *rest = twin.info(run)
            assert native.info(number) == (self.native_id[parent], *rest)
            assert native.keys(number) == twin.keys(run)
            assert native.path(number) == [self.native_id[step] for step in twin.path(run)]
            assert native.holds(number) == twin.holds(run)
            assert native.child(number) == self.native_id[twin.child(run)]
            assert native.leaves(number) == tuple(self.native_id[leaf] for leaf in twin.leaves(run))
            for tier in range(3):
                assert native.evictable(number, tier) == twin.evictable(run, tier)
            assert self.native_id[twin.find(twin.keys(run)[:KEY_BYTES])] == native.find(
                twin.keys(run)[:KEY_BYTES]
            )
            assert [native.slots(number, t) for t in range(3)] == [twin.slots(run, t) for t in range(3)]
        for tier in range(3):
            drained = [sorted(np.frombuffer(i.drain(tier), np.int32).tolist()) for i in (twin, native)]
            assert drained[0] == drained[1]
            removed = [i.drain_removed(tier) for i in (twin, native)]
            parts = [sorted(raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)) for raw in removed]
            assert parts[0] == parts[1]


@native_only
def test_native_equals_twin() -> None:
    run_state_machine_as_test(
        BothIndexes,
        settings=settings(
            max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@each_index
def test_growth_over_many_runs(index_class: type[PyRunIndex]) -> None:
    index = index_class(False)
    keys = [chain(b"", [i & 255, i >> 8]) for i in range(5000)]
    heads = {key[:KEY_BYTES] for key in keys}
    for i, key in enumerate(keys):
        if index.find(key[:KEY_BYTES]) < 0:
            index.release(index.insert(-1, key, 0, slots(2 * i, 2 * i + 1)))
    assert len(index) == len(heads) == 256
    for i in range(5000):  # one run each, through several sizes of the table
        run = index.insert(-1, i.to_bytes(KEY_BYTES, "little"), 0, slots(i))
        index.publish(run)
        index.release(run)
    for i in range(0, 5000, 2):
        assert index.evict([index.find(i.to_bytes(KEY_BYTES, "little"))], 0, 1)[:2] == (1, 1)
    assert [index.find(i.to_bytes(KEY_BYTES, "little")) >= 0 for i in range(5000)] == [False, True] * 2500
    assert len(index.drain(0)) == 4 * 2500


@each_index
def test_a_deep_path_needs_no_recursion(index_class: type[PyRunIndex]) -> None:
    index = index_class(False)
    # The twin counts pins and slots up to the root at every step: its time grows with the square of the depth.
    depth = 3_000 if index_class is PyRunIndex else 20_000
    parent, key = -1, b""
    for i in range(depth):
        key = chain(key, [i % 7])
        parent = index.insert(parent, key, 0, slots(i))
        index.publish(parent)
        index.release(parent)
    root = index.path(parent)[0]
    assert len(index.detach(root)) == depth
    assert len(index) == index.blocks == len(index.runs()) == 0
    assert sorted(np.frombuffer(index.drain(0), np.int32).tolist()) == list(range(depth))


@each_index
def test_keys_that_are_not_chained_do_no_harm(index_class: type[PyRunIndex]) -> None:
    index = index_class(False)
    one, two = chain(b"", [1, 2]), chain(b"", [3])
    for keys, new in ((one, slots(0, 1)), (two, slots(2))):
        index.publish(index.insert(-1, keys, 0, new))
    assert index.match(one + two, 0, None, 0, False)[0] == 2


@each_index
def test_wrong_arguments(index_class: type[PyRunIndex]) -> None:
    index = index_class(False)
    keys = chain(b"", [1, 2, 3])
    run = index.insert(-1, keys, 0, slots(0, 1, 2))
    for unknown in (run + 1, 10**6, -5):
        with pytest.raises(KeyError):
            index.info(unknown)
    for at in (0, 3, -1):
        with pytest.raises(ValueError, match="cannot split"):
            index.split(run, at)
    for bad, count in ((b"", 0), (keys[:20], 1), (keys, 2)):
        with pytest.raises(ValueError, match="do not go with"):
            index.insert(-1, bad, 0, np.zeros(count, dtype=np.int32))
    with pytest.raises(ValueError, match="no room"):
        index.match(keys, 0, np.empty(2, dtype=np.int32), 0, True)
    with pytest.raises(ValueError, match="cannot evict"):
        index.evict([run], 0, 0)
    with pytest.raises(KeyError):
        index.evict([run + 1], 0, 1)
    with pytest.raises(ValueError, match="are not in a run"):
        index.segment(run, 0, 2, 2)
    with pytest.raises(ValueError, match="cannot load"):
        index.load(1, slots(0), keys[:KEY_BYTES], bytes(KEY_BYTES), np.zeros(1, np.int64))
    index.release(run)
    with pytest.raises(ValueError, match="not pinned"):
        index.release(run)


@native_only
def test_native_refuses_other_dtypes() -> None:
    index = RunIndex(False)
    with pytest.raises(TypeError, match="int32"):
        index.insert(-1, chain(b"", [1]), 0, np.zeros(1, dtype=np.int64))
    frozen = np.zeros(1, dtype=np.int32)
    frozen.setflags(write=False)
    with pytest.raises((BufferError, ValueError)):
        index.match(chain(b"", [1]), 0, frozen, 0, True)


# ---- the warm start ----------------------------------------------------------------------------------------------------------

_FOREST = st.lists(
    st.integers(-4, 20), max_size=40
)  # for each block the place of its parent; negative: none, or one that is lost


def _loose_blocks(forest: list[int]) -> tuple[list[bytes], list[bytes]]:
    keys = [i.to_bytes(KEY_BYTES, "big") for i in range(100, 100 + len(forest))]
    lost = b"lost".ljust(KEY_BYTES)
    parents = [
        keys[place] if 0 <= place < len(keys) else lost if place == -1 else bytes(KEY_BYTES)
        for place in forest
    ]
    return keys, parents


@each_index
@given(forest=_FOREST, twice=st.lists(st.integers(0, 39), max_size=3), seed=st.integers(0, 99))
@settings(suppress_health_check=list(HealthCheck), deadline=None)
def test_load_finds_what_hangs_together(
    index_class: type[PyRunIndex], forest: list[int], twice: list[int], seed: int
) -> None:
    keys, parents = _loose_blocks(forest)
    for place in twice:
        if place < len(forest):
            keys.append(keys[place])
            parents.append(parents[place])
    count = len(keys)
    ages = np.random.default_rng(seed).permutation(count).astype(np.int64)
    index = index_class(False)
    dropped, runs, newest = (
        np.frombuffer(raw, dtype).tolist()
        for raw, dtype in zip(
            index.load(1, np.arange(count, dtype=np.int32), b"".join(keys), b"".join(parents), ages),
            (np.int32, np.int32, np.int64),
            strict=True,
        )
    )
    first = {key: i for i, key in reversed(list(enumerate(keys)))}

    def chain_of(i: int) -> list[int] | None:
        chain: list[int] = []
        while i not in chain:
            chain.insert(0, i)
            if parents[i] == bytes(KEY_BYTES):
                return chain
            if parents[i] not in first:
                return None
            i = first[parents[i]]
        return None

    for i, key in enumerate(keys):
        chain = chain_of(i) if first[key] == i else None
        assert (chain is None) == (i in dropped)
        if chain is not None:
            out = np.empty(len(chain), np.int32)
            found = index.match(b"".join(keys[j] for j in chain), 0, out, 1, False)
            assert (found[0], out.tolist()) == (len(chain), chain)
    assert index.blocks == count - len(dropped)
    assert index.runs() == sorted(runs)
    for run, age in zip(runs, newest, strict=True):
        below = [other for other in runs if run in index.path(other)]
        held = [i for other in below for i in np.frombuffer(index.slots(other, 1) or b"", np.int32).tolist()]
        assert age == max(ages[i] for i in held)
        assert index.info(run)[2:5] == (False, False, 0)
        assert runs.index(run) >= max((runs.index(step) for step in index.path(run)), default=0)
        assert index.child(run) < 0, "two runs that could be one"


@native_only
@given(forest=_FOREST)
@settings(suppress_health_check=list(HealthCheck), deadline=None)
def test_load_is_the_same_in_both(forest: list[int]) -> None:
    keys, parents = _loose_blocks(forest)
    arguments = (2, np.arange(len(keys), dtype=np.int32), b"".join(keys), b"".join(parents))
    ages = np.arange(len(keys), dtype=np.int64)
    twin, native = PyRunIndex(False), RunIndex(False)
    dropped, runs, newest = twin.load(*arguments, ages)
    native_dropped, native_runs, native_newest = native.load(*arguments, ages)
    assert (dropped, newest) == (native_dropped, native_newest)
    for run, other in zip(np.frombuffer(runs, np.int32), np.frombuffer(native_runs, np.int32), strict=True):
        assert twin.keys(int(run)) == native.keys(int(other))
        assert twin.slots(int(run), 2) == native.slots(int(other), 2)
