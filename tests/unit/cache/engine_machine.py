"""The engine against a model of one dictionary entry a block; hypothesis drives both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from flexkv_core.cache import EventKind, GetPlan, GlobalCacheEngine, PutPlan
from flexkv_core.cache.radix_tree import PyRunIndex
from flexkv_core.types import KEY_BYTES, Tier

CAPACITY = 24

Tokens = tuple[int, ...]


def _branch(document: int, shared: int, branch: int, own: int) -> Tokens:
    """The beginning of one of few documents, then one of few continuations: prefixes are shared and part in the middle."""
    return (document,) * shared + (10 + branch,) * own


# Most fit the pool several times, some are longer than it.
TOKENS = st.one_of(
    st.builds(_branch, st.integers(0, 2), st.integers(1, 8), st.integers(0, 2), st.integers(0, 6)),
    st.builds(
        _branch, st.integers(0, 2), st.integers(0, CAPACITY), st.integers(0, 2), st.integers(0, CAPACITY // 2)
    ),
)


def key_list(tokens: Tokens) -> list[bytes]:
    """Chained keys, as the real ones."""
    keys, parent = [], b""
    for token in tokens:
        parent = hashlib.blake2b(parent + bytes([token]), digest_size=KEY_BYTES).digest()
        keys.append(parent)
    return keys


@dataclass
class Block:
    """A block that is in the tree."""

    parent: bytes
    slot: int
    writer: int | None  # the put that is writing it; None once it is published


@dataclass
class LivePut:
    """A put that has not ended."""

    plan: PutPlan
    number: int
    keys: list[bytes]


@dataclass
class LiveGet:
    """A get that has not ended."""

    plan: GetPlan
    keys: list[bytes]
    blocks: list[Block]  # what the tree held then: after a reset another block may bear the same key


class EngineMachine(RuleBasedStateMachine):
    """Random puts, gets, commits, partial commits, aborts, evictions, invalidations, resets; each end of a plan may come twice."""

    index_factory: Callable[[bool], PyRunIndex] | None = PyRunIndex
    engine_class = GlobalCacheEngine

    live_puts = Bundle("live_puts")
    live_gets = Bundle("live_gets")
    ended = Bundle("ended")

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.engine_class(
            {Tier.HOST: CAPACITY}, index_factory=type(self).index_factory, track_events=True
        )
        self.tree: dict[bytes, Block] = {}
        self.bytes_in_slot: dict[int, bytes] = {}
        self.puts: dict[int, LivePut] = {}
        self.gets: dict[int, LiveGet] = {}
        self.counter = 0
        self.steps = 0  # since the last reset

    # ---- the model -----------------------------------------------------------------------------------------------------------

    def known(self, keys: list[bytes], published_only: bool) -> int:
        for count, key in enumerate(keys):
            block = self.tree.get(key)
            if block is None or (published_only and block.writer is not None):
                return count
        return len(keys)

    def below(self, keys: set[bytes]) -> set[bytes]:
        """These blocks and all that follow them."""
        found = set(keys)
        while True:
            more = {key for key, block in self.tree.items() if block.parent in found} - found
            if not more:
                return found
            found |= more

    def above(self, keys: set[bytes]) -> set[bytes]:
        """These blocks and all that they follow."""
        found = set()
        for key in keys:
            while key in self.tree and key not in found:
                found.add(key)
                key = self.tree[key].parent
        return found

    def held_slots(self) -> set[int]:
        """Slots that a copy may be touching."""
        held: set[int] = set()
        for put in self.puts.values():
            held.update(put.plan.slots.tolist())
        for get in self.gets.values():
            held.update(get.plan.host_slots.tolist())
        return held

    def leave(self, keys: set[bytes]) -> None:
        """Blocks leave the model; the engine must say the same of the published ones."""
        published = {key for key in keys if self.tree[key].writer is None}
        assert self.taken_removed() == published
        for key in keys:
            del self.tree[key]

    def taken_removed(self) -> set[bytes]:
        events = [event for event in self.engine.take_events() if event.kind is EventKind.REMOVED]
        raw = b"".join(event.keys for event in events)
        keys = [raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)]
        assert len(set(keys)) == len(keys), "a key was reported twice"
        return set(keys)

    def check_evicted(self, evicted: set[bytes], own_path: list[bytes], room_needed: int) -> None:
        """Only what may go has gone, no more than was needed, and all of it where it did not suffice."""
        writing = {key for key, block in self.tree.items() if block.writer is not None}
        leased = {
            key
            for get in self.gets.values()
            for key, block in zip(get.keys, get.blocks, strict=True)
            if self.tree.get(key) is block
        }
        in_use = self.above(writing | leased) | set(own_path)
        may_go = self.tree.keys() - in_use
        assert evicted <= may_go, "a block in use was evicted"
        assert len(evicted) <= room_needed, "more was evicted than was needed"
        # A get keeps all of the run that it ends in, and a put that lost its place still keeps what was above it: with such plans
        # alive, less may go than the model says.
        lost = any(
            put.keys[0] not in self.tree or self.tree[put.keys[0]].writer != put.number
            for put in self.puts.values()
        )
        if len(evicted) < room_needed and not self.gets and not lost:
            assert evicted == may_go, "a put found no room although something could go"
        for key in evicted:
            del self.tree[key]
        assert all(block.parent in self.tree or not block.parent for block in self.tree.values())

    # ---- rules ---------------------------------------------------------------------------------------------------------------

    @rule(target=live_puts, tokens=TOKENS)
    def plan_put(self, tokens: Tokens) -> object:
        put = self.plan_put_of(tokens)
        return multiple() if put is None else put

    def plan_put_of(self, tokens: Tokens) -> LivePut | None:
        keys = key_list(tokens)
        free = CAPACITY - self.engine.used()
        known = self.known(keys, published_only=False)
        held = self.held_slots()
        plan = self.engine.plan_put(b"".join(keys))

        assert plan.start_block == known
        needed = len(keys) - known
        self.check_evicted(self.taken_removed(), keys[:known], max(0, needed - free))
        assert plan.count <= needed
        assert plan.count == needed or self.engine.used() == CAPACITY, (
            "a put left blocks out although there was room"
        )
        return self.begin_put(plan, keys, held) if plan.count else None

    def begin_put(self, plan: PutPlan, keys: list[bytes], held: set[int]) -> LivePut:
        known, slots = plan.start_block, plan.slots.tolist()
        new = keys[known : known + plan.count]
        assert plan.lease is not None
        assert plan.keys == b"".join(new)
        assert len(set(slots)) == len(slots)
        assert not held & set(slots), "a slot that a copy is touching was handed out"
        assert not {block.slot for block in self.tree.values()} & set(slots), (
            "a slot in the tree was handed out"
        )
        self.counter += 1
        for i, (key, slot) in enumerate(zip(new, slots, strict=True)):
            parent = keys[known + i - 1] if known + i else b""
            self.tree[key] = Block(parent, slot, self.counter)
            self.bytes_in_slot[slot] = key
        self.puts[self.counter] = LivePut(plan, self.counter, new)
        return self.puts[self.counter]

    @rule(target=ended, tokens=TOKENS)
    def store(self, tokens: Tokens) -> object:
        """A put from plan to commit: so that there is something to find and to evict."""
        put = self.plan_put_of(tokens)
        return (
            multiple() if put is None else self.end_put(put, put.plan.count, self.engine.commit_put(put.plan))
        )

    @rule(target=ended, put=consumes(live_puts), data=st.data())
    def commit_put(self, put: LivePut, data: st.DataObject) -> object:
        keep = data.draw(st.one_of(st.none(), st.integers(0, put.plan.count)), label="blocks")
        published = self.engine.commit_put(put.plan, keep)
        return self.end_put(put, put.plan.count if keep is None else keep, published)

    @rule(target=ended, put=consumes(live_puts))
    def abort_put(self, put: LivePut) -> object:
        self.engine.abort_put(put.plan)
        return self.end_put(put, 0, 0)

    def end_put(self, put: LivePut, keep: int, published: int) -> object:
        del self.puts[put.number]
        mine = [key for key in put.keys if key in self.tree and self.tree[key].writer == put.number]
        assert mine in ([], put.keys), "a part of a put left the tree before the put ended"
        assert published == (keep if mine else 0)
        for key in mine[:keep]:
            self.tree[key].writer = None
        self.leave(self.below(set(mine[keep:])))
        return put.plan

    @rule(target=live_gets, tokens=TOKENS, start=st.integers(0, 8))
    def plan_get(self, tokens: Tokens, start: int) -> object:
        keys = key_list(tokens)
        blocks = self.known(keys, published_only=True)
        plan = self.engine.plan_get(b"".join(keys), start)
        assert plan.blocks == blocks
        wanted = keys[start:blocks]
        assert plan.keys == b"".join(wanted)
        assert plan.host_slots.tolist() == [self.tree[key].slot for key in wanted]
        assert [self.bytes_in_slot[slot] for slot in plan.host_slots.tolist()] == wanted, (
            "a slot has other bytes"
        )
        assert (plan.lease is None) == (not wanted)
        if plan.lease is None:
            return multiple()
        self.gets[plan.lease.lease_id] = LiveGet(
            plan, keys[:blocks], [self.tree[key] for key in keys[:blocks]]
        )
        return self.gets[plan.lease.lease_id]

    @rule(target=ended, get=consumes(live_gets))
    def finish_get(self, get: LiveGet) -> object:
        assert get.plan.lease is not None
        wanted = [get.plan.keys[i : i + KEY_BYTES] for i in range(0, len(get.plan.keys), KEY_BYTES)]
        copied = [self.bytes_in_slot[slot] for slot in get.plan.host_slots.tolist()]
        assert copied == wanted, "the bytes changed while they were leased"
        self.engine.finish_get(get.plan)
        del self.gets[get.plan.lease.lease_id]
        return get.plan

    @rule(get=live_gets, data=st.data())
    def invalidate(self, get: LiveGet, data: st.DataObject) -> None:
        block = data.draw(st.integers(get.plan.start_block, get.plan.blocks - 1), label="block")
        key, slot = get.keys[block], int(get.plan.host_slots[block - get.plan.start_block])
        prefix_found = self.known(get.keys, published_only=True) > block
        still_mine = prefix_found and self.tree[key].slot == slot
        gone = self.below({key}) if still_mine else set()
        assert self.engine.invalidate(get.plan, block) == len(gone)
        self.leave(gone)

    @rule(tokens=TOKENS)
    def match(self, tokens: Tokens) -> None:
        keys = key_list(tokens)
        assert self.engine.match(b"".join(keys)) == self.known(keys, published_only=True)

    @rule(plan=ended)
    def end_again(self, plan: GetPlan | PutPlan) -> None:
        if isinstance(plan, GetPlan):
            self.engine.finish_get(plan)
        else:
            assert self.engine.commit_put(plan) == 0
            self.engine.abort_put(plan)

    @precondition(lambda self: self.steps > 12)  # rarely, or there would be nothing to see
    @rule()
    def reset(self) -> None:
        self.steps = 0
        self.engine.reset()
        self.tree.clear()
        assert self.engine.match(b"".join(key_list((0,)))) == 0

    # ---- always --------------------------------------------------------------------------------------------------------------

    @invariant()
    def recount(self) -> None:
        self.steps += 1
        self.engine.check_integrity()
        slots = [block.slot for block in self.tree.values()]
        assert len(set(slots)) == len(slots), "two blocks share a slot"
        must = set(slots) | self.held_slots()
        taken = set(np.flatnonzero(self.engine.pools[Tier.HOST].taken()).tolist())
        assert must <= taken, "a slot in use is free"
        assert self.engine.lease_count == len(self.puts) + len(self.gets)
        if not self.engine.lease_count:
            assert must == taken, "slots are lost"

    def teardown(self) -> None:
        """Whatever happened: when every plan has ended and the tree is emptied, nothing is left."""
        for put in self.puts.values():
            self.engine.abort_put(put.plan)
        for get in self.gets.values():
            self.engine.finish_get(get.plan)
        self.engine.reset()
        if not self.engine.lease_count:  # else a rule failed half-way, and that is what should be reported
            self.engine.check_integrity()
            assert self.engine.used() == 0
