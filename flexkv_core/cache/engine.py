"""GlobalCacheEngine: one match over all tiers -> a plan; commit and abort."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from flexkv_core.cache import integrity
from flexkv_core.cache.chains import ROOT
from flexkv_core.cache.leases import Leases, Putting, Reading
from flexkv_core.cache.plans import NO_READS, NO_SLOTS, CacheStats, GetPlan, PutPlan, Reads, WritePlan
from flexkv_core.cache.radix_tree import PyRunIndex
from flexkv_core.cache.residency import Residency
from flexkv_core.cache.tier_events import TierEvent, TierEvents
from flexkv_core.cache.write_behind import WriteBehind
from flexkv_core.types import KEY_BYTES, Slots, Tier


class GlobalCacheEngine:
    """What is cached where. Knows slots and keys, never bytes.

    The caller holds one lock around every call. Every plan ends with exactly one of ``finish_get``, ``commit_put``, ``abort_put`` or
    ``finish_write``; a second end of the same plan does nothing. Until then none of its slots is handed out again, whatever happens
    to the tree. Expected outcomes (nothing found, no room) are values; nothing here raises for them.
    """

    def __init__(
        self,
        capacities: Mapping[Tier, int],
        eviction: str = "lru",
        index_factory: Callable[[bool], PyRunIndex] | None = None,
        track_events: bool = False,
    ) -> None:
        """``capacities``: slots of each tier that exists; the host tier must be among them.

        ``eviction``: a name of ``flexkv_core.cache.eviction.POLICIES`` (ConfigError otherwise); each tier has an order of its own.
        ``index_factory`` makes the index (argument: whether removed keys are tracked); the native one by default. ``track_events``:
        collect what :meth:`take_events` gives.
        """
        assert Tier.HOST in capacities, "the host tier is not optional"
        self.stats = CacheStats()
        self.residency = Residency(capacities, eviction, index_factory, track_events)
        self.pools = self.residency.pools
        self.index = self.residency.index
        self._events = TierEvents(self.index, self.pools, track_events)
        self._leases = Leases()
        self._write_behind = WriteBehind(self.residency, self._leases, self.stats, self._events)

    # ---- looking -------------------------------------------------------------------------------------------------------------

    def match(self, keys: bytes | memoryview) -> int:
        """Blocks of the longest published prefix over all tiers. Takes no lease and does not count as a use."""
        return self.index.match(keys, 0, None, Tier.HOST, False)[0]

    def holds(self, keys: bytes, start_block: int, tier: Tier = Tier.HOST) -> bool:
        """Whether a tier has every block of ``keys`` from ``start_block`` on, published. As :meth:`match`."""
        total = len(keys) // KEY_BYTES
        slots: Slots = np.empty(max(0, total - start_block), dtype=np.int32)
        return self.index.match(keys, start_block, slots, tier, False)[0] == total and bool(
            (slots >= 0).all()
        )

    @property
    def lease_count(self) -> int:
        """Plans that have not ended."""
        return len(self._leases)

    def capacity(self, tier: Tier = Tier.HOST) -> int:
        """Slots of a tier."""
        return self.pools[tier].capacity

    def used(self, tier: Tier = Tier.HOST) -> int:
        """Slots of a tier that are taken: in the tree, being written, or kept by a lease."""
        return self.pools[tier].used_count

    # ---- get -----------------------------------------------------------------------------------------------------------------

    def plan_get(self, keys: bytes, start_block: int = 0, fetch: bool = True) -> GetPlan:
        """Find the longest published prefix, lease it, count it as used.

        ``keys``: 16 bytes a block, from the sequence's first block on. ``start_block``: blocks that the caller has already; their slots
        are not given. ``fetch``: blocks that only the SSD has get host slots, evicting others, to be read into (``GetPlan.reads``); where
        there is no room the plan ends. Without it the plan ends at the first of them.
        """
        keys = bytes(keys)
        asked = len(keys) // KEY_BYTES
        out: Slots = np.empty(max(0, asked - start_block), dtype=np.int32)
        blocks, run, at = self.index.match(keys, start_block, out, Tier.HOST, False)
        stats = self.stats
        stats.get_plans += 1
        stats.blocks_asked += asked
        if run < 0:
            return GetPlan(None, start_block, 0, NO_SLOTS, keys)
        stats.get_hits += 1
        stats.blocks_hit += blocks
        self.residency.touch(run)
        if blocks <= start_block:
            return GetPlan(None, start_block, blocks, NO_SLOTS, keys)
        self.index.pin(run)
        out = out[: blocks - start_block]
        reads = NO_READS
        if len(self.pools) > 1 and out.min() < 0:
            out, reads = self._plan_reads(keys, start_block, out, fetch)
            if not len(out):
                self.residency.release(run)
                return GetPlan(None, start_block, start_block, NO_SLOTS, keys)
        lease = self._leases.new()
        # What was cut off between the plan's last block and the run's end counts as well.
        skip = self.index.info(run)[1] - at + blocks - start_block - len(out) if len(reads) else 0
        self._leases.gets[lease.lease_id] = Reading(run, skip, _own_slots(out, reads))
        return GetPlan(lease, start_block, start_block + len(out), out, keys, reads)

    def finish_get(self, plan: GetPlan, read_ok: npt.NDArray[np.bool_] | None = None) -> None:
        """The blocks have been copied, or the copy has failed: give the lease back.

        ``read_ok``: bool, one for each of ``plan.reads``: whether its bytes are in its host slot, and right; these blocks are in
        the host tier from now on. None: none was read.
        """
        if plan.lease is None:
            return
        reading = self._leases.gets.pop(plan.lease.lease_id, None)
        if reading is None:
            return
        if len(plan.reads):
            self._settle_reads(plan, reading, read_ok)
        self.residency.release(reading.run)
        self._free_unused()

    def invalidate(self, plan: GetPlan, block: int, tier: Tier = Tier.HOST, quarantine: bool = True) -> int:
        """A tier's copy of a block failed its checksum, or is not there: it is dropped. Call before ``finish_get``.

        ``block`` counts from the sequence's first block and lies in the plan; for the SSD it is one of the plan's reads. If no other
        tier has the block, it leaves the tree with everything below it. If the copy is no longer the plan's (dropped already, perhaps
        stored anew since), the tree stays as it is. ``quarantine``: a slot of the SSD is never used again. Returns how many blocks left.
        """
        assert plan.start_block <= block < plan.blocks, (
            f"block {block} is not in a plan of {plan.start_block}..{plan.blocks}"
        )
        bad = _slot_of(plan, block, tier)
        if tier is not Tier.HOST and quarantine and plan.lease and plan.lease.lease_id in self._leases.gets:
            self.pools[tier].quarantine(bad)
        keys = plan.sequence_keys[: KEY_BYTES * (block + 1)]
        slots, run, at = self._slots_of_last(keys)
        if bad < 0 or slots[tier] != bad:
            return 0
        if any(slot >= 0 for other, slot in slots.items() if other != tier):
            self._drop_copy(run, at - 1, tier, bad)
            return 0
        if at > 1:
            self.residency.split(run, at - 1)
        before = self.index.blocks
        self.residency.detach(run)
        removed = before - self.index.blocks
        self.stats.blocks_invalidated += removed
        return removed

    def expel(self, plan: GetPlan, block: int, tier: Tier) -> Slots:
        """A block's bytes are not what its key says, whatever their checksum: it leaves the tree in all tiers, with everything below it.

        ``block`` and ``plan`` as for :meth:`invalidate`; ``tier`` is where the plan found it, and that slot is never used again. Call before
        ``finish_get``. Returns the block's slot on the SSD (int32, none or one), whose record must be forgotten before anything else is
        written: a restart would find the block again.
        """
        bad = _slot_of(plan, block, tier)
        if bad >= 0 and plan.lease and plan.lease.lease_id in self._leases.gets:
            self.pools[tier].quarantine(bad)
        slots, run, at = self._slots_of_last(plan.sequence_keys[: KEY_BYTES * (block + 1)])
        if bad < 0 or slots[tier] != bad:
            return NO_SLOTS
        if at > 1:
            self.residency.split(run, at - 1)
        before = self.index.blocks
        self.residency.detach(run)
        self.stats.blocks_invalidated += before - self.index.blocks
        on_ssd = slots.get(Tier.SSD, -1)
        return NO_SLOTS if on_ssd < 0 else np.array([on_ssd], dtype=np.int32)

    def drop_slots(self, tier: Tier, slots: Slots) -> int:
        """The bytes in ``slots`` (int32) of a tier are not what was written there: no block is found there any more, and what holds a
        block now is never used again.

        Blocks that another tier has stay, and wait to be written anew; the others leave the tree with everything below them. Returns how
        many left. Costs a look at all slots of the tier, about 1 ms a million.
        """
        places = np.frombuffer(self.index.locate(tier, slots), np.int32).reshape(-1, 3)
        for slot in places[:, 2].tolist():
            self.pools[tier].quarantine(slot)
        before = self.index.blocks
        last = rest = -1
        for run, at, slot in places[::-1].tolist():  # from a run's end: a cut moves nothing that comes later
            rest = self._drop_block(rest if run == last else run, at, tier, slot)
            last = run
        self._free_unused()
        removed = before - self.index.blocks
        self.stats.blocks_invalidated += removed
        return removed

    # ---- put -----------------------------------------------------------------------------------------------------------------

    def plan_put(self, keys: bytes, first: int = 0) -> PutPlan:
        """Take slots for the blocks that are not known yet; evict if there are too few. The caller does not have the blocks before
        ``first``: with one of them unknown, nothing is planned.

        Blocks that are being written by another plan count as known. What does not fit is left out, from the end; never evicted
        are leased blocks and the blocks that the new ones follow. The new blocks are in the tree at once, for other puts to see,
        and can be found by a get after the commit.
        """
        keys = bytes(keys)
        total = len(keys) // KEY_BYTES
        index, stats = self.index, self.stats
        known, parent, at = index.match(keys, 0, None, Tier.HOST, True)
        stats.put_plans += 1
        stats.blocks_known += known
        if parent >= 0:
            self.residency.touch(parent)
        if known == total or known < first:
            return PutPlan(None, known, NO_SLOTS, b"")
        if parent >= 0:
            parent = self._branch_at(parent, at)
        slots = self._take(Tier.HOST, total - known)
        stats.blocks_no_room += total - known - len(slots)
        if not len(slots):
            self._unpin_branch(parent)
            return PutPlan(None, known, slots, b"")
        new_keys = keys[KEY_BYTES * known : KEY_BYTES * (known + len(slots))]
        run = index.insert(parent, new_keys, Tier.HOST, slots)
        self._unpin_branch(parent)
        lease = self._leases.new()
        self._leases.puts[lease.lease_id] = Putting(run, len(slots))
        return PutPlan(lease, known, slots, new_keys)

    def commit_put(self, plan: PutPlan, blocks: int | None = None) -> int:
        """The first ``blocks`` blocks of the plan (None: all) are written: publish them. The rest is dropped.

        Returns how many were published: 0 when the tree lost the plan's place meanwhile (a reset, or an abort above it).
        """
        keep = plan.count if blocks is None else blocks
        assert 0 <= keep <= plan.count, f"cannot commit {keep} blocks of a plan of {plan.count}"
        putting = self._end_put(plan)
        if putting is None:
            return 0
        if self._is_detached(putting.run):
            keep = 0
        elif keep == putting.blocks:
            self._publish(self._pieces(putting))
        else:
            self._drop_tail(putting, keep)
        self.residency.release(putting.run)
        if keep == putting.blocks:
            self.residency.merge(putting.run)
        self._free_unused()
        self.stats.blocks_published += keep
        self.stats.blocks_dropped += putting.blocks - keep
        return keep

    def disown_put(self, plan: PutPlan) -> None:
        """It takes too long: the plan's blocks leave as with ``abort_put``, so that others may put them anew, but the slots stay the plan's
        until it ends, and nothing is published then."""
        putting = None if plan.lease is None else self._leases.puts.get(plan.lease.lease_id)
        if putting is not None and not self._is_detached(putting.run):
            self._drop_tail(putting, 0)

    def abort_put(self, plan: PutPlan) -> None:
        """Nothing was written, or not all: the plan's blocks leave, with whatever was put below them, and the slots return."""
        putting = self._end_put(plan)
        if putting is None:
            return
        if not self._is_detached(putting.run):
            self._drop_tail(putting, 0)
        self.residency.release(putting.run)
        self._free_unused()
        self.stats.blocks_dropped += putting.blocks

    def evict(self, want: int, tier: Tier = Tier.HOST) -> int:
        """Let go of up to ``want`` slots of a tier, by the policy's order, each run from its tail; returns how many.

        Plans do this by themselves when they need room. Leased blocks, blocks that are being written, and what these follow stay. A
        block that no tier holds any more leaves the tree, with what follows it.
        """
        freed = self.residency.evict(want, tier)
        self._count_evicted(tier, freed)
        return freed

    # ---- write-behind --------------------------------------------------------------------------------------------------------

    def plan_write(self, limit_blocks: int) -> WritePlan | None:
        """The blocks of the host tier that wait longest for the SSD, with room there; None: nothing waits, or no room can be made.

        At most ``limit_blocks``. Blocks that they follow and that the SSD lacks come first. All are pinned until ``finish_write``.
        """
        return self._write_behind.plan(limit_blocks)

    def finish_write(self, plan: WritePlan, ok: npt.NDArray[np.bool_], retry: bool = False) -> Slots:
        """The writes have ended. ``ok``: bool, one a block: the block is durable in its slot.

        Those are on the SSD from now on; the slots of the others return, and they wait anew with ``retry``, or are owed (see
        :meth:`queue_owed_writes`). Returns the slots (int32) that were written for blocks that have left the tree meanwhile: the store should
        forget them before it is given anything else to write.
        """
        forget = self._write_behind.finish(plan, ok, retry)
        self._free_unused()
        return forget

    def drop_oldest_writes(self, blocks: int) -> int:
        """Give up at least ``blocks`` blocks that wait to be written, if there are so many; returns how many. They are owed from now on,
        and are written earlier with what follows them, if that is."""
        return self._write_behind.drop_oldest(blocks)

    def queue_owed_writes(self, blocks: int) -> int:
        """Back-fill: let at least ``blocks`` blocks that are owed to the SSD wait to be written again, if there are so many; returns how
        many. Owed is what failed or was given up, and is still in host memory only."""
        return self._write_behind.queue_owed(blocks)

    @property
    def waiting_writes(self) -> int:
        """Blocks that wait for ``plan_write``, at most."""
        return self.residency.queue.blocks

    def load(
        self,
        slots: Slots,
        keys: bytes,
        parents: bytes,
        ages: npt.NDArray[np.int64] | None = None,
        tier: Tier = Tier.SSD,
    ) -> Slots:
        """Warm start: what a tier holds, into the empty tree.

        ``slots``: int32 [n], in any order; ``keys``, ``parents``: 16 * n bytes, as they were in write plans; ``ages``: int64 [n], larger is
        newer (None: in the order given). Returns the slots (int32) that were not taken, because no chain connects the block to a beginning, its
        key occurs twice, or the tier is smaller now: they are free, and the store should forget them.
        """
        assert len(self.index) == 0, "load() needs an empty tree"
        if ages is None:
            ages = np.arange(len(slots), dtype=np.int64)
        fits = (slots >= 0) & (slots < self.capacity(tier))
        if not fits.all():
            words = fits.nonzero()[0]
            keys, parents = (np.frombuffer(raw, "V16")[words].tobytes() for raw in (keys, parents))
        taken = slots if fits.all() else slots[fits]
        dropped, runs = self.residency.load(
            tier, taken, keys, parents, ages[fits] if len(taken) < len(slots) else ages
        )
        self._events.loaded(tier, runs.tolist())
        self.stats.blocks_loaded += len(taken) - len(dropped)
        return np.concatenate([slots[~fits], taken[dropped]])

    # ---- all of it -----------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything. Slots of plans that have not ended return when these end."""
        self.residency.detach_all()
        self._events.clear()  # the caller knows that all are gone
        self.stats.resets += 1

    def take_events(self, blocks_max: int = 1 << 30) -> list[TierEvent]:
        """What came to each tier and left it since the last call (a reset is none), oldest first, at most about ``blocks_max`` blocks; nothing
        unless tracked."""
        return self._events.take(blocks_max)

    def check_integrity(self) -> None:
        """Recount everything; AssertionError says what differs. Costs time in proportion to what is cached: for tests."""
        own = {tier: self._leases.own_slots(tier) for tier in self.pools}
        integrity.check(self.residency, self._leases.pinned_runs(), own)

    # ---- helpers: get --------------------------------------------------------------------------------------------------------

    def _plan_reads(self, keys: bytes, start: int, host_slots: Slots, fetch: bool) -> tuple[Slots, Reads]:
        """Host slots for blocks that have none; what finds no room is cut off, with all behind it. The path is pinned."""
        index = np.flatnonzero(host_slots < 0)
        if not fetch:
            return host_slots[: index[0]], NO_READS
        new = self._take(Tier.HOST, len(index))
        if len(new) < len(index):
            host_slots = host_slots[: index[len(new)]]
            index = index[: len(new)]
        if not len(new):
            return host_slots, NO_READS
        host_slots[index] = new
        count = start + len(host_slots)
        ssd_slots: Slots = np.empty(len(host_slots), dtype=np.int32)
        self.index.match(keys[: KEY_BYTES * count], start, ssd_slots, Tier.SSD, False)
        self.stats.blocks_planned_reads += len(new)
        return host_slots, Reads(index.astype(np.int32), ssd_slots[index])

    def _settle_reads(self, plan: GetPlan, reading: Reading, read_ok: npt.NDArray[np.bool_] | None) -> None:
        own = reading.own_slots
        failed = NO_SLOTS
        if read_ok is None:
            failed, own = own[own >= 0], own[:0]
        else:
            assert len(read_ok) == len(plan.reads), f"{len(read_ok)} results of {len(plan.reads)} reads"
            bad = plan.reads.index[~np.asarray(read_ok, np.bool_)]
            failed = own[bad]
            own[bad] = -1
        if len(own):
            self.stats.blocks_read += int((own >= 0).sum())
            before = own.copy()
            self.residency.fill(reading.run, reading.skip, Tier.HOST, own)
            self._note_read(plan, (before >= 0) & (own < 0))
        # What the tree did not take: another plan was first, or the block has left.
        back = np.concatenate([failed, own[own >= 0]])
        if len(back):
            self.pools[Tier.HOST].free(back)

    def _note_read(self, plan: GetPlan, taken: npt.NDArray[np.bool_]) -> None:
        if self._events.enabled:
            start = KEY_BYTES * plan.start_block
            before = plan.sequence_keys[start - KEY_BYTES : start] if start else ROOT
            self._events.stored(Tier.HOST, plan.keys, before + plan.keys[:-KEY_BYTES], taken)

    def _slots_of_last(self, keys: bytes) -> tuple[dict[Tier, int], int, int]:
        """The slots of the last of ``keys`` in each tier (none if it is not found), its run, and its place there + 1."""
        last = len(keys) // KEY_BYTES - 1
        slot: Slots = np.empty(1, dtype=np.int32)
        slots, run, at = {}, -1, 0
        for tier in self.pools:
            found, run, at = self.index.match(keys, last, slot, tier, False)
            slots[tier] = int(slot[0]) if found > last else -1
        return slots, run, at

    def _drop_copy(self, run: int, at: int, tier: Tier, slot: int) -> None:
        """One tier loses its copy of a block that another one has. Other plans may still be using the slot."""
        gone = np.array([slot], dtype=np.int32)
        self.index.set_slots(run, tier, at, np.array([-1], dtype=np.int32))
        self._leases.park(tier, gone)
        self._events.removed(tier, self.index.segment(run, tier, at, 1)[1])
        if tier is Tier.SSD:
            self.residency.queue.add(run, 1)
        self.stats.copies_invalidated += 1

    def _drop_block(self, run: int, at: int, tier: Tier, slot: int) -> int:
        """As :meth:`drop_slots`, one block; the run that has what lies before it."""
        held = self._slots_at(run, at)
        if held.get(tier) != slot:
            return run  # it left with one above it, and the id may be another's now
        if any(other >= 0 for place, other in held.items() if place != tier):
            self._drop_copy(run, at, tier, slot)
            return run
        head = self.residency.split(run, at) if at else -1
        self.residency.detach(run)
        return head

    def _slots_at(self, run: int, at: int) -> dict[Tier, int]:
        """A block's slots by tier; nothing if there is no such block in the tree."""
        try:
            _, length, _, detached, *_ = self.index.info(run)
        except KeyError:
            return {}
        if detached or at >= length:
            return {}
        raw = {tier: self.index.slots(run, tier) for tier in self.pools}
        return {tier: int(np.frombuffer(held, np.int32)[at]) for tier, held in raw.items() if held}

    # ---- helpers: put --------------------------------------------------------------------------------------------------------

    def _end_put(self, plan: PutPlan) -> Putting | None:
        return None if plan.lease is None else self._leases.puts.pop(plan.lease.lease_id, None)

    def _is_detached(self, run: int) -> bool:
        return self.index.info(run)[3]

    def _branch_at(self, run: int, at: int) -> int:
        """The run that ends after the first ``at`` blocks of ``run``, pinned so that making room does not take it."""
        if at < self.index.info(run)[1]:
            run = self.residency.split(run, at)
        self.index.pin(run)
        return run

    def _unpin_branch(self, run: int) -> None:
        if run >= 0:
            self.residency.release(run)

    def _pieces(self, putting: Putting) -> list[int]:
        """The runs of a put, deepest first: other puts that branch off inside it have split it."""
        run, blocks = putting.run, putting.blocks
        pieces = []
        while blocks > 0:
            pieces.append(run)
            run, length, *_ = self.index.info(run)
            blocks -= length
        assert blocks == 0, "a put's runs do not add up to its blocks"
        return pieces

    def _publish(self, pieces: list[int]) -> None:
        for run in reversed(pieces):
            self.residency.publish(run)
        self._events.stored_runs(Tier.HOST, reversed(pieces))
        if pieces:
            self.residency.touch(pieces[0])

    def _drop_tail(self, putting: Putting, keep: int) -> None:
        """Publish the first ``keep`` blocks of a put; the others leave with what is below them."""
        pieces = self._pieces(putting)
        kept: list[int] = []
        while keep:
            run = pieces.pop()
            length = self.index.info(run)[1]
            if length > keep:
                pieces.append(run)
                run, length = self.residency.split(run, keep), keep
            kept.append(run)
            keep -= length
        self._publish(kept[::-1])
        self.residency.detach(pieces[-1])

    # ---- helpers: slots ------------------------------------------------------------------------------------------------------

    def _take(self, tier: Tier, want: int) -> Slots:
        slots, evicted = self.residency.take(tier, want)
        self._count_evicted(tier, evicted)
        return slots

    def _count_evicted(self, tier: Tier, slots: int) -> None:
        if tier is Tier.HOST:
            self.stats.blocks_evicted += slots
        else:
            self.stats.ssd_blocks_evicted += slots

    def _free_unused(self) -> None:
        """A plan has ended: slots that waited for it return."""
        for tier, slots in self._leases.unused():
            self.pools[tier].free(slots)


def _own_slots(host_slots: Slots, reads: Reads) -> Slots:
    """int32 like ``host_slots``, -1 where the slot is the tree's."""
    if not len(reads):
        return NO_SLOTS
    own: Slots = np.full(len(host_slots), -1, dtype=np.int32)
    own[reads.index] = host_slots[reads.index]
    return own


def _slot_of(plan: GetPlan, block: int, tier: Tier) -> int:
    """Where a plan found a block in a tier. -1: the host slot was the plan's own to read into, so the tree's copy is another."""
    at = block - plan.start_block
    read = int(np.searchsorted(plan.reads.index, at))
    is_read = read < len(plan.reads) and int(plan.reads.index[read]) == at
    if tier is Tier.HOST:
        return -1 if is_read else int(plan.host_slots[at])
    assert is_read, f"block {block} is not read from the SSD by this plan"
    return int(plan.reads.ssd_slots[read])
