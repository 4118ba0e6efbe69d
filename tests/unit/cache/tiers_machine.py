"""Two tiers against a model of one dictionary entry a block, with a store that crashes; hypothesis drives both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

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

from flexkv_core.cache import ROOT, EventKind, GetPlan, GlobalCacheEngine, PutPlan, WritePlan
from flexkv_core.cache.radix_tree import PyRunIndex
from flexkv_core.types import KEY_BYTES, Tier
from tests.unit.cache.engine_machine import TOKENS, Tokens, key_list

CAPACITIES = {Tier.HOST: 20, Tier.SSD: 32}
TIERS = tuple(CAPACITIES)


@dataclass(eq=False)
class Block:
    """A block that is in the tree. Slots by tier; a tier that lacks it is absent."""

    parent: bytes
    slots: dict[Tier, int]
    putting: int | None = None  # the put that is writing it; None once it is published
    writing: int | None = None  # the write plan that brings it to the SSD


@dataclass
class Live:
    """A plan that has not ended: its blocks, as objects, since another block may bear the same key after a reset."""

    plan: GetPlan | PutPlan | WritePlan
    number: int
    keys: list[bytes]
    blocks: list[Block] = field(default_factory=list)


def split_keys(raw: bytes) -> list[bytes]:
    return [raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES)]


class TiersMachine(RuleBasedStateMachine):
    """Puts, gets with reads, writes that fail, evictions of both tiers, bad copies, resets, crashes with a warm start."""

    index_factory: Callable[[bool], PyRunIndex] | None = PyRunIndex
    engine_class = GlobalCacheEngine

    puts = Bundle("puts")
    gets = Bundle("gets")
    writes = Bundle("writes")
    ended = Bundle("ended")

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[
            int, tuple[bytes, bytes]
        ] = {}  # what the store would load: SSD slot -> key, parent
        self.counter = 0
        self.parents: dict[bytes, bytes] = {}  # as the events say; a key names all before it, so that stays
        self.start()

    def start(self) -> None:
        self.engine = self.engine_class(CAPACITIES, index_factory=type(self).index_factory, track_events=True)
        self.tree: dict[bytes, Block] = {}
        self.host_bytes: dict[int, bytes] = {}
        self.live: dict[int, Live] = {}
        self.quarantined: set[int] = set()
        self.must_wait: set[bytes] = set()  # published blocks that no write plan may forget
        self.owed: set[bytes] = set()  # those that must wait again after queue_owed_writes()
        self.steps = 0
        self.told: dict[Tier, set[bytes]] = {tier: set() for tier in TIERS}  # what the events say

    # ---- the model -----------------------------------------------------------------------------------------------------------

    def known(self, keys: list[bytes], published_only: bool = True) -> int:
        for count, key in enumerate(keys):
            block = self.tree.get(key)
            if block is None or (published_only and block.putting is not None):
                return count
        return len(keys)

    def below(self, keys: Iterable[bytes]) -> set[bytes]:
        found = set(keys)
        while more := {key for key, block in self.tree.items() if block.parent in found} - found:
            found |= more
        return found

    def above(self, keys: Iterable[bytes]) -> set[bytes]:
        found = set()
        for key in keys:
            while key in self.tree and key not in found:
                found.add(key)
                key = self.tree[key].parent
        return found

    def plans(self, kind: type) -> list[Live]:
        return [live for live in self.live.values() if isinstance(live.plan, kind)]

    def in_use(self) -> set[bytes]:
        """What may not be evicted."""
        keys = {key for key, block in self.tree.items() if block.putting is not None}
        for live in self.live.values():
            keys |= {
                key for key, block in zip(live.keys, live.blocks, strict=True) if self.tree.get(key) is block
            }
        return self.above(keys)

    def held(self, tier: Tier) -> set[int]:
        """Slots that a copy may be touching."""
        found: set[int] = set()
        for live in self.live.values():
            plan = live.plan
            if isinstance(plan, GetPlan):
                found |= set((plan.host_slots if tier is Tier.HOST else plan.reads.ssd_slots).tolist())
            elif isinstance(plan, WritePlan):
                found |= set((plan.host_slots if tier is Tier.HOST else plan.ssd_slots).tolist())
            elif tier is Tier.HOST:
                found |= set(plan.slots.tolist())
        return found

    def actual(self) -> dict[bytes, tuple[dict[Tier, int], bool]]:
        """What the engine's tree says: slots of each block, and whether it is being put."""
        index = self.engine.index
        found = {}
        for run in index.runs():
            _, length, putting, detached, *_ = index.info(run)
            if detached:
                continue
            raw = {tier: index.slots(run, tier) for tier in TIERS}
            columns = {tier: np.frombuffer(slots, np.int32).tolist() for tier, slots in raw.items() if slots}
            keys = split_keys(index.keys(run))
            for i in range(length):
                slots = {tier: column[i] for tier, column in columns.items() if column[i] >= 0}
                found[keys[i]] = (slots, putting)
        return found

    def leave(self, keys: set[bytes]) -> None:
        for key in keys:
            del self.tree[key]
        self.must_wait -= keys
        self.owed -= keys

    def evicted(
        self, tier: Tier, room_needed: int, own_path: Iterable[bytes] = (), exactly: bool = True
    ) -> None:
        """Take over what the engine let go in order to make room; and judge it."""
        actual = self.actual()
        in_use = self.in_use() | set(own_path)
        lost = {
            key
            for key, block in self.tree.items()
            if tier in block.slots and tier not in actual.get(key, ({},))[0]
        }
        gone = self.tree.keys() - actual.keys()
        assert not lost & in_use, "a copy in use was evicted"
        assert not gone & in_use, "a block in use was evicted"
        assert len(lost) <= room_needed, "more was evicted than was needed"
        assert gone == self.below(key for key in lost if self.tree[key].slots.keys() == {tier}), (
            "blocks left, but not those that lost their last copy and what follows"
        )
        still = {key for key, (slots, _) in actual.items() if tier in slots}
        assert not self.below(lost) & still, "a block lost its copy before one that follows it"
        if exactly and len(lost) < room_needed and not self.live:
            may_go = {key for key, block in self.tree.items() if tier in block.slots} - in_use
            assert lost == may_go, "there was no room although something could go"
        if tier is Tier.SSD:
            self.must_wait -= lost
        for key in lost - gone:
            del self.tree[key].slots[tier]
        self.leave(gone)

    def begin(self, plan: GetPlan | PutPlan | WritePlan, keys: list[bytes]) -> Live:
        self.counter += 1
        live = Live(plan, self.counter, keys, [self.tree[key] for key in keys])
        self.live[live.number] = live
        return live

    def own(self, slots: Iterable[int], tier: Tier, held: set[int]) -> None:
        """New slots: nobody else's."""
        new = list(slots)
        assert len(set(new)) == len(new)
        assert not held & set(new), "a slot that a copy is touching was handed out"
        in_tree = {block.slots[tier] for block in self.tree.values() if tier in block.slots}
        assert not in_tree & set(new), "a slot in the tree was handed out"
        if tier is Tier.SSD:
            assert not self.quarantined & set(new), "a slot in quarantine was handed out"

    # ---- put -----------------------------------------------------------------------------------------------------------------

    @rule(target=puts, tokens=TOKENS)
    def plan_put(self, tokens: Tokens) -> object:
        live = self.begin_put(tokens)
        return multiple() if live is None else live

    def begin_put(self, tokens: Tokens) -> Live | None:
        keys = key_list(tokens)
        free = CAPACITIES[Tier.HOST] - self.engine.used()
        known, held = self.known(keys, published_only=False), self.held(Tier.HOST)
        plan = self.engine.plan_put(b"".join(keys))
        assert plan.start_block == known
        needed = len(keys) - known
        new = keys[known : known + plan.count]
        assert plan.keys == b"".join(new)
        made = dict(zip(new, plan.slots.tolist(), strict=True))
        actual = self.actual()
        assert all(actual[key] == ({Tier.HOST: slot}, True) for key, slot in made.items())
        self.evicted(Tier.HOST, max(0, needed - free), keys[:known])
        self.own(plan.slots.tolist(), Tier.HOST, held)
        if not plan.count:
            return None
        for i, key in enumerate(new):
            parent = keys[known + i - 1] if known + i else b""
            self.tree[key] = Block(parent, {Tier.HOST: made[key]}, putting=self.counter + 1)
            self.host_bytes[made[key]] = key
        return self.begin(plan, new)

    @rule(target=ended, tokens=TOKENS)
    def store(self, tokens: Tokens) -> object:
        live = self.begin_put(tokens)
        return multiple() if live is None else self.end_put(live, None)

    @rule(target=ended, put=consumes(puts), data=st.data())
    def commit_put(self, put: Live, data: st.DataObject) -> object:
        if put.number not in self.live:
            return multiple()
        return self.end_put(
            put, data.draw(st.one_of(st.none(), st.integers(0, len(put.keys))), label="blocks")
        )

    @rule(target=ended, put=consumes(puts))
    def abort_put(self, put: Live) -> object:
        return self.end_put(put, -1) if put.number in self.live else multiple()

    def end_put(self, put: Live, keep: int | None) -> object:
        assert isinstance(put.plan, PutPlan)
        if keep == -1:
            self.engine.abort_put(put.plan)
        else:
            self.engine.commit_put(put.plan, keep)
        keep = len(put.keys) if keep is None else max(0, keep)
        del self.live[put.number]
        mine = [key for key in put.keys if key in self.tree and self.tree[key].putting == put.number]
        assert mine in ([], put.keys), "a part of a put left the tree before the put ended"
        for key in mine[:keep]:
            self.tree[key].putting = None
            self.must_wait.add(key)
        self.leave(self.below(mine[keep:]))
        return put.plan

    # ---- get -----------------------------------------------------------------------------------------------------------------

    @rule(
        target=gets, tokens=TOKENS, start=st.integers(0, 8), fetch=st.sampled_from([True, True, True, False])
    )
    def plan_get(self, tokens: Tokens, start: int, fetch: bool) -> object:
        keys = key_list(tokens)
        known, held = self.known(keys), self.held(Tier.HOST)
        wanted = keys[start:known]
        lacking = [i for i, key in enumerate(wanted) if Tier.HOST not in self.tree[key].slots]
        free = CAPACITIES[Tier.HOST] - self.engine.used()
        plan = self.engine.plan_get(b"".join(keys), start, fetch)
        count = plan.count
        if not fetch:
            assert count == (lacking[0] if lacking else len(wanted))
            assert not len(plan.reads)
        elif count < len(wanted):
            assert count in lacking
            assert self.engine.used() == CAPACITIES[Tier.HOST], "a get was cut short although there was room"
        # Not exactly: a get keeps all of the run that it ends in.
        self.evicted(Tier.HOST, max(0, len(lacking) - free) if fetch else 0, keys[:known], exactly=False)
        assert plan.keys == b"".join(wanted[:count])
        assert plan.blocks == (start + count if wanted else known)
        assert plan.reads.index.tolist() == [i for i in lacking if i < count]
        self.own(plan.host_slots[plan.reads.index].tolist(), Tier.HOST, held)
        for i, (key, slot) in enumerate(zip(wanted[:count], plan.host_slots.tolist(), strict=True)):
            if i not in lacking:
                assert slot == self.tree[key].slots[Tier.HOST]
                assert self.host_bytes[slot] == key, "a slot has other bytes"
        for i, slot in zip(plan.reads.index.tolist(), plan.reads.ssd_slots.tolist(), strict=True):
            assert slot == self.tree[wanted[i]].slots[Tier.SSD]
            assert self.records[slot][0] == wanted[i], "a slot of the SSD has other bytes"
        assert (plan.lease is None) == (count == 0)
        return self.begin(plan, keys[: plan.blocks]) if count else multiple()

    @rule(target=ended, get=consumes(gets), data=st.data())
    def finish_get(self, get: Live, data: st.DataObject) -> object:
        plan = get.plan
        if get.number not in self.live:
            return multiple()
        assert isinstance(plan, GetPlan)
        reads = len(plan.reads)
        ok = data.draw(
            st.one_of(st.none(), st.lists(st.booleans(), min_size=reads, max_size=reads)), label="ok"
        )
        read = plan.reads.index.tolist()
        for i, key in enumerate(split_keys(plan.keys)):
            if i not in read:
                assert self.host_bytes[int(plan.host_slots[i])] == key, (
                    "the bytes changed while they were leased"
                )
        self.engine.finish_get(plan, None if ok is None else np.array(ok, np.bool_))
        del self.live[get.number]
        for i, good in zip(read, ok or (), strict=bool(ok)):
            key, slot = get.keys[plan.start_block + i], int(plan.host_slots[i])
            block = get.blocks[plan.start_block + i]
            if good and self.tree.get(key) is block and Tier.HOST not in block.slots:
                block.slots[Tier.HOST] = slot
                self.host_bytes[slot] = key
        return plan

    @rule(get=gets, data=st.data())
    def invalidate(self, get: Live, data: st.DataObject) -> None:
        plan = get.plan
        if get.number not in self.live:
            return
        assert isinstance(plan, GetPlan)
        reads = plan.reads.index.tolist()
        place = data.draw(st.integers(0, plan.count - 1), label="place")
        tier = Tier.SSD if place in reads else Tier.HOST
        quarantine = data.draw(st.booleans(), label="quarantine")
        if tier is Tier.HOST:
            slot = int(plan.host_slots[place])
        else:
            slot = int(plan.reads.ssd_slots[reads.index(place)])
            if quarantine:
                self.quarantined.add(slot)
                self.records.pop(slot, None)
        block = plan.start_block + place
        key, mine = get.keys[block], get.blocks[block]
        found = self.tree.get(key) is mine and mine.slots.get(tier) == slot and self.known(get.keys) > block
        left = self.engine.invalidate(plan, block, tier, quarantine)
        gone: set[bytes] = set()
        if found:
            del mine.slots[tier]
            if mine.slots:
                if tier is Tier.SSD:
                    self.must_wait.add(key)
            else:
                gone = self.below({key})
        assert left == len(gone)
        self.leave(gone)

    @rule(data=st.data())
    def drop_slots(self, data: st.DataObject) -> None:
        held = {block.slots[Tier.SSD]: key for key, block in self.tree.items() if Tier.SSD in block.slots}
        bad = data.draw(
            st.sets(st.integers(0, CAPACITIES[Tier.SSD] - 1), min_size=1, max_size=3), label="bad"
        )
        gone = set()
        for slot in bad & held.keys():
            block = self.tree[held[slot]]
            self.quarantined.add(slot)
            self.records.pop(slot)
            del block.slots[Tier.SSD]
            if block.slots:
                self.must_wait.add(held[slot])
            else:
                gone.add(held[slot])
        gone = self.below(gone)
        assert self.engine.drop_slots(Tier.SSD, np.array(sorted(bad), np.int32)) == len(gone)
        self.leave(gone)

    # ---- write-behind --------------------------------------------------------------------------------------------------------

    @rule(target=writes, limit=st.integers(1, 12))
    def plan_write(self, limit: int) -> object:
        live = self.begin_write(limit)
        return multiple() if live is None else live

    def begin_write(self, limit: int) -> Live | None:
        held = self.held(Tier.SSD)
        free = CAPACITIES[Tier.SSD] - self.engine.used(Tier.SSD) - len(self.quarantined)  # or more
        plan = self.engine.plan_write(limit)
        keys = [] if plan is None else split_keys(plan.keys)
        self.evicted(Tier.SSD, max(0, limit - free), self.above(keys), exactly=False)
        room = CAPACITIES[Tier.SSD] - self.engine.used(Tier.SSD) - len(self.quarantined)
        if len(keys) < limit and room > 0:
            waiting = {
                k for k in self.must_wait & self.tree.keys() if self.tree[k].writing is None and k not in keys
            }
            reachable = {
                k for k in waiting if Tier.HOST in self.tree[k].slots and Tier.SSD not in self.tree[k].slots
            }
            assert not reachable, "blocks wait for ever"
        if plan is None:
            return None
        assert 0 < plan.count <= limit
        self.own(plan.ssd_slots.tolist(), Tier.SSD, held)
        self.counter += 1
        for i, (key, parent) in enumerate(zip(keys, split_keys(plan.parents), strict=True)):
            block = self.tree[key]
            assert (block.putting, block.writing, Tier.SSD in block.slots) == (None, None, False)
            assert block.slots[Tier.HOST] == plan.host_slots[i]
            assert parent == (block.parent or ROOT)
            above = self.tree.get(block.parent)
            assert above is None or Tier.SSD in above.slots or above.writing is not None or above.putting, (
                "a block is written before the one that it follows"
            )
            block.writing = self.counter
            self.records.pop(int(plan.ssd_slots[i]), None)  # the store begins with that
        self.must_wait -= set(keys)
        self.owed -= set(keys)
        self.counter -= 1
        return self.begin(plan, keys)

    @rule(limit=st.integers(1, 40))
    def write_now(self, limit: int) -> None:
        live = self.begin_write(limit)
        if live is not None:
            self.end_write(live, [True] * len(live.keys), False)

    @rule(target=ended, write=consumes(writes), data=st.data(), retry=st.booleans())
    def finish_write(self, write: Live, data: st.DataObject, retry: bool) -> object:
        if write.number not in self.live:
            return multiple()
        count = len(write.keys)
        ok = data.draw(
            st.one_of(st.just([True] * count), st.lists(st.booleans(), min_size=count, max_size=count))
        )
        return self.end_write(write, ok, retry)

    def end_write(self, write: Live, ok: list[bool], retry: bool) -> object:
        plan = write.plan
        assert isinstance(plan, WritePlan)
        parents, host = split_keys(plan.parents), plan.host_slots.tolist()
        assert [self.host_bytes[slot] for slot in host] == write.keys, (
            "the bytes changed while they were written"
        )
        forget = set()
        for i, slot in enumerate(plan.ssd_slots.tolist()):
            key, block = write.keys[i], write.blocks[i]
            here = self.tree.get(key) is block
            block.writing = None
            if ok[i]:
                self.records[slot] = (key, parents[i])
                if here:
                    block.slots[Tier.SSD] = slot
                else:
                    forget.add(slot)
            elif here:
                (self.must_wait if retry else self.owed).add(key)
        assert set(self.engine.finish_write(plan, np.array(ok, np.bool_), retry).tolist()) == forget
        for slot in forget:
            del self.records[slot]
        del self.live[write.number]
        return plan

    @rule(blocks=st.integers(1, 6))
    def drop_oldest_writes(self, blocks: int) -> None:
        waiting = self.engine.waiting_writes
        dropped = self.engine.drop_oldest_writes(blocks)
        assert dropped >= min(blocks, waiting)
        self.owed |= self.must_wait
        self.must_wait.clear()

    @rule()
    def queue_owed_writes(self) -> None:
        self.engine.queue_owed_writes(1 << 20)
        self.must_wait |= self.owed
        self.owed.clear()

    # ---- all -----------------------------------------------------------------------------------------------------------------

    @rule(tier=st.sampled_from(TIERS), want=st.integers(1, 12))
    def evict(self, tier: Tier, want: int) -> None:
        before = sum(tier in block.slots for block in self.tree.values())
        freed = self.engine.evict(want, tier)
        self.evicted(tier, want)
        assert freed == before - sum(tier in block.slots for block in self.tree.values())

    @rule(plan=ended)
    def end_again(self, plan: GetPlan | PutPlan | WritePlan) -> None:
        if plan.lease is not None and plan.lease.lease_id in self.live_leases():
            return  # of another engine, before a crash
        if isinstance(plan, GetPlan):
            self.engine.finish_get(plan, np.ones(len(plan.reads), np.bool_))
        elif isinstance(plan, PutPlan):
            assert self.engine.commit_put(plan) == 0
            self.engine.abort_put(plan)
        else:
            assert not len(self.engine.finish_write(plan, np.ones(plan.count, np.bool_)))

    def live_leases(self) -> set[int]:
        return {live.plan.lease.lease_id for live in self.live.values() if live.plan.lease is not None}

    @precondition(lambda self: self.steps > 12)
    @rule()
    def reset(self) -> None:
        self.engine.reset()
        assert not self.engine.take_events()
        self.told = {tier: set() for tier in TIERS}
        self.tree.clear()
        self.records.clear()
        self.must_wait.clear()
        self.owed.clear()
        self.steps = 0

    @precondition(lambda self: self.steps > 12)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """Nothing is left but the records, those of a few writes under way among them."""
        for live in self.plans(WritePlan):
            assert isinstance(live.plan, WritePlan)
            parents = split_keys(live.plan.parents)
            for i, slot in enumerate(live.plan.ssd_slots.tolist()):
                if data.draw(st.booleans(), label="was committed"):
                    self.records[slot] = (live.keys[i], parents[i])
        self.start()
        rows = data.draw(st.permutations(sorted(self.records.items())), label="order")
        slots = np.array([slot for slot, _ in rows], dtype=np.int32)
        dropped = self.engine.load(
            slots, b"".join(k for _, (k, _) in rows), b"".join(p for _, (_, p) in rows)
        ).tolist()
        actual = self.actual()
        for slot in dropped:
            key, parent = self.records.pop(slot)
            connected = key in actual and actual[key][0][Tier.SSD] != slot  # there twice
            assert connected or (parent != ROOT and parent not in actual), "a block was dropped for no reason"
        for slot, (key, parent) in self.records.items():
            assert actual[key] == ({Tier.SSD: slot}, False)
            self.tree[key] = Block(b"" if parent == ROOT else parent, {Tier.SSD: slot})
        assert all(not block.parent or block.parent in self.tree for block in self.tree.values())

    # ---- always --------------------------------------------------------------------------------------------------------------

    def follow_events(self) -> None:
        for event in self.engine.take_events():
            told, keys = self.told[event.tier], split_keys(event.keys)
            assert len(set(keys)) == len(keys) > 0
            if event.kind is EventKind.REMOVED:
                assert told >= set(keys), "what was removed had not been there"
                told -= set(keys)
                continue
            assert not told & set(keys), "what was stored was there already"
            told |= set(keys)
            for key, parent in zip(keys, [event.parent, *keys], strict=False):
                assert self.parents.setdefault(key, parent) == parent
        for tier in TIERS:
            there = {k for k, block in self.tree.items() if tier in block.slots and block.putting is None}
            assert self.told[tier] == there, tier

    @invariant()
    def equal(self) -> None:
        self.steps += 1
        self.follow_events()
        self.engine.check_integrity()
        expected = {key: (block.slots, block.putting is not None) for key, block in self.tree.items()}
        assert self.actual() == expected
        assert self.engine.lease_count == len(self.live)
        assert self.engine.pools[Tier.SSD].quarantined_count == len(self.quarantined)
        for tier in TIERS:
            slots = [block.slots[tier] for block in self.tree.values() if tier in block.slots]
            assert len(set(slots)) == len(slots), "two blocks share a slot"
            must = set(slots) | self.held(tier)
            taken = set(np.flatnonzero(self.engine.pools[tier].taken()).tolist())
            if tier is Tier.SSD:
                must -= self.quarantined
                taken -= self.quarantined
            assert must <= taken, f"a slot of {tier.name} in use is free"
            assert self.live or must == taken, f"slots of {tier.name} are lost"
        for key, block in self.tree.items():
            if Tier.SSD in block.slots:
                assert self.records[block.slots[Tier.SSD]] == (key, block.parent or ROOT), (
                    "a record is missing"
                )

    def teardown(self) -> None:
        for live in list(self.live.values()):
            if isinstance(live.plan, PutPlan):
                self.engine.abort_put(live.plan)
            elif isinstance(live.plan, GetPlan):
                self.engine.finish_get(live.plan)
            else:
                self.engine.finish_write(live.plan, np.zeros(live.plan.count, np.bool_))
        self.engine.reset()
        if not self.engine.lease_count:
            self.engine.check_integrity()
            assert [self.engine.used(tier) for tier in TIERS] == [0, 0]
