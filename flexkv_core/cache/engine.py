"""GlobalCacheEngine: one match over all tiers -> a plan; commit and abort."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from flexkv_core.cache import integrity
from flexkv_core.cache.eviction import make_policy
from flexkv_core.cache.mempool import Mempool
from flexkv_core.cache.plans import CacheStats, GetPlan, Lease, PutPlan
from flexkv_core.cache.radix_tree import PyRunIndex, RunIndex
from flexkv_core.types import KEY_BYTES, Slots, Tier

# Runs that follow each other are joined up to this length: a sequence that grows block by block becomes one run, and a join never
# moves more than 12 KiB, well under 1 µs.
_MERGE_BLOCKS_MAX = 512

_NO_SLOTS: Slots = np.empty(0, dtype=np.int32)
_NO_SLOTS.setflags(write=False)


@dataclass(frozen=True)
class _Writing:
    """A put under way: the deepest run of its blocks, and how many blocks there are from there upwards."""

    run: int
    blocks: int


class GlobalCacheEngine:
    """What is cached where. Knows slots and keys, never bytes.

    The caller holds one lock around every call. Every plan ends with exactly one of ``finish_get``, ``commit_put`` or ``abort_put``;
    a second end of the same plan does nothing. Until then none of its slots is handed out again, whatever happens to the tree.
    Expected outcomes (nothing found, no room) are values; nothing here raises for them.
    """

    def __init__(
        self,
        capacities: Mapping[Tier, int],
        eviction: str = "lru",
        index_factory: Callable[[bool], PyRunIndex] | None = None,
        track_removed: bool = False,
    ) -> None:
        """``capacities``: slots of each tier that exists; the host tier must be among them.

        ``eviction``: a name of ``flexkv_core.cache.eviction.POLICIES`` (ConfigError otherwise). ``index_factory`` makes the index
        (argument: whether removed keys are tracked); the native one by default. ``track_removed``: collect keys for
        :meth:`take_removed`.
        """
        assert Tier.HOST in capacities, "the host tier is not optional"
        self.pools = {tier: Mempool(count) for tier, count in capacities.items()}
        self.stats = CacheStats()
        self.index = (index_factory or RunIndex)(track_removed)
        self.policy = make_policy(eviction)
        self._eviction = eviction
        self._gets: dict[int, int] = {}  # lease id -> deepest run
        self._puts: dict[int, _Writing] = {}
        self._next_lease = 0

    # ---- looking -------------------------------------------------------------------------------------------------------------

    def match(self, keys: bytes) -> int:
        """Blocks of the longest published prefix over all tiers. Takes no lease and does not count as a use."""
        return self.index.match(keys, 0, None, Tier.HOST, False)[0]

    @property
    def lease_count(self) -> int:
        """Plans that have not ended."""
        return len(self._gets) + len(self._puts)

    def capacity(self, tier: Tier = Tier.HOST) -> int:
        """Slots of a tier."""
        return self.pools[tier].capacity

    def used(self, tier: Tier = Tier.HOST) -> int:
        """Slots of a tier that are taken: in the tree, being written, or kept by a lease."""
        return self.pools[tier].used_count

    # ---- get -----------------------------------------------------------------------------------------------------------------

    def plan_get(self, keys: bytes, start_block: int = 0) -> GetPlan:
        """Find the longest published prefix, lease it, count it as used.

        ``keys``: 16 bytes a block, from the sequence's first block on. ``start_block``: blocks that the caller has already; their slots
        are not given.
        """
        keys = bytes(keys)
        asked = len(keys) // KEY_BYTES
        out: Slots = np.empty(max(0, asked - start_block), dtype=np.int32)
        blocks, run, _ = self.index.match(keys, start_block, out, Tier.HOST, False)
        stats = self.stats
        stats.get_plans += 1
        stats.blocks_asked += asked
        if run < 0:
            return GetPlan(None, start_block, 0, _NO_SLOTS, keys)
        stats.get_hits += 1
        stats.blocks_hit += blocks
        self.policy.touch(self.index.path(run))
        if blocks <= start_block:
            return GetPlan(None, start_block, blocks, _NO_SLOTS, keys)
        self.index.pin(run)
        lease = self._lease()
        self._gets[lease.lease_id] = run
        return GetPlan(lease, start_block, blocks, out[: blocks - start_block], keys)

    def finish_get(self, plan: GetPlan) -> None:
        """The blocks have been copied, or the copy has failed: give the lease back."""
        if plan.lease is None:
            return
        run = self._gets.pop(plan.lease.lease_id, None)
        if run is not None:
            self._release(run)

    def invalidate(self, plan: GetPlan, block: int) -> int:
        """A block failed its checksum: it and everything below it leave the tree. Call before ``finish_get``.

        ``block`` counts from the sequence's first block and lies in the plan. If its slot is no longer the plan's (dropped already,
        perhaps stored anew since), nothing happens. Returns how many blocks left.
        """
        assert plan.start_block <= block < plan.blocks, (
            f"block {block} is not in a plan of {plan.start_block}..{plan.blocks}"
        )
        slot = np.empty(1, dtype=np.int32)
        keys = plan.sequence_keys[: KEY_BYTES * (block + 1)]
        found, run, at = self.index.match(keys, block, slot, Tier.HOST, False)
        if found <= block or slot[0] != plan.host_slots[block - plan.start_block]:
            return 0
        if at > 1:
            head = self.index.split(run, at - 1)
            self.policy.add(head)
        before = self.index.blocks
        self._detach(run)
        removed = before - self.index.blocks
        self.stats.blocks_invalidated += removed
        return removed

    # ---- put -----------------------------------------------------------------------------------------------------------------

    def plan_put(self, keys: bytes) -> PutPlan:
        """Take slots for the blocks that are not known yet; evict if there are too few.

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
            self.policy.touch(index.path(parent))
        if known == total:
            return PutPlan(None, known, _NO_SLOTS, b"")
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
        lease = self._lease()
        self._puts[lease.lease_id] = _Writing(run, len(slots))
        return PutPlan(lease, known, slots, new_keys)

    def commit_put(self, plan: PutPlan, blocks: int | None = None) -> int:
        """The first ``blocks`` blocks of the plan (None: all) are written: publish them. The rest is dropped.

        Returns how many were published: 0 when the tree lost the plan's place meanwhile (a reset, or an abort above it).
        """
        keep = plan.count if blocks is None else blocks
        assert 0 <= keep <= plan.count, f"cannot commit {keep} blocks of a plan of {plan.count}"
        writing = self._end_put(plan)
        if writing is None:
            return 0
        if self._is_detached(writing.run):
            keep = 0
        elif keep == writing.blocks:
            self._publish(self._pieces(writing))
        else:
            self._drop_tail(writing, keep)
        self._release(writing.run)
        if keep == writing.blocks:
            self._merge(writing.run)
        self.stats.blocks_published += keep
        self.stats.blocks_dropped += writing.blocks - keep
        return keep

    def abort_put(self, plan: PutPlan) -> None:
        """Nothing was written, or not all: the plan's blocks leave, with whatever was put below them, and the slots return."""
        writing = self._end_put(plan)
        if writing is None:
            return
        if not self._is_detached(writing.run):
            self._drop_tail(writing, 0)
        self._release(writing.run)
        self.stats.blocks_dropped += writing.blocks

    def evict(self, want: int, tier: Tier = Tier.HOST) -> int:
        """Let go of up to ``want`` blocks of a tier, by the policy's order, each run from its tail; returns how many.

        Puts do this by themselves when they need room. Leased blocks, blocks that are being written, and what these follow stay.
        """
        victim, remove, evict = self.policy.victim, self.policy.remove, self.index.evict
        freed = 0
        while freed < want:
            run = victim()
            if run is None:
                break
            count, left, leaf = evict(run, tier, want - freed)
            if count < 0:
                self.policy.park(run)
                continue
            freed += count
            if left == 0:
                remove(run)
                if leaf >= 0:
                    self.policy.unpark(leaf)
        self.stats.blocks_evicted += freed
        self._collect()
        return freed

    # ---- all of it -----------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything. Slots of plans that have not ended return when these end."""
        self.index.detach_all()
        self.index.drain_removed()  # the caller knows that all are gone
        self.policy = make_policy(self._eviction)
        self._collect()
        self.stats.resets += 1

    def take_removed(self) -> bytes:
        """Keys of published blocks that left the tree since the last call (not by a reset); empty unless tracked."""
        return self.index.drain_removed()

    def check_integrity(self) -> None:
        """Recount everything; AssertionError says what differs. Costs time in proportion to what is cached: for tests."""
        pins = list(self._gets.values()) + [writing.run for writing in self._puts.values()]
        integrity.check(self.index, self.pools, self.policy, pins)

    # ---- helpers -------------------------------------------------------------------------------------------------------------

    def _lease(self) -> Lease:
        self._next_lease += 1
        return Lease(self._next_lease)

    def _end_put(self, plan: PutPlan) -> _Writing | None:
        return None if plan.lease is None else self._puts.pop(plan.lease.lease_id, None)

    def _is_detached(self, run: int) -> bool:
        return self.index.info(run)[3]

    def _branch_at(self, run: int, at: int) -> int:
        """The run that ends after the first ``at`` blocks of ``run``, pinned so that making room does not take it."""
        _, blocks, writing, *_ = self.index.info(run)
        if at < blocks:
            run = self.index.split(run, at)
            if not writing:
                self.policy.add(run)
        self.index.pin(run)
        return run

    def _unpin_branch(self, run: int) -> None:
        if run >= 0:
            self._release(run)

    def _take(self, tier: Tier, want: int) -> Slots:
        """Up to ``want`` slots, after evicting what is needed and possible."""
        pool = self.pools[tier]
        if pool.free_count < want:
            self.evict(want - pool.free_count, tier)
        slots = pool.allocate(min(want, pool.free_count))
        assert slots is not None
        return slots

    def _pieces(self, writing: _Writing) -> list[int]:
        """The runs of a put, deepest first: other puts that branch off inside it have split it."""
        run, blocks = writing.run, writing.blocks
        pieces = []
        while blocks > 0:
            pieces.append(run)
            run, length, *_ = self.index.info(run)
            blocks -= length
        assert blocks == 0, "a put's runs do not add up to its blocks"
        return pieces

    def _publish(self, pieces: list[int]) -> None:
        for run in reversed(pieces):
            self.index.publish(run)
            self.policy.add(run)
        if pieces:
            self.policy.touch(self.index.path(pieces[0]))

    def _merge(self, run: int) -> None:
        absorbed = self.index.merge(run, _MERGE_BLOCKS_MAX)
        if absorbed >= 0:
            self.policy.remove(absorbed)

    def _drop_tail(self, writing: _Writing, keep: int) -> None:
        """Publish the first ``keep`` blocks of a put; the others leave with what is below them."""
        pieces = self._pieces(writing)
        kept: list[int] = []
        while keep:
            run = pieces.pop()
            length = self.index.info(run)[1]
            if length > keep:
                pieces.append(run)
                run, length = self.index.split(run, keep), keep
            kept.append(run)
            keep -= length
        self._publish(kept[::-1])
        self._detach(pieces[-1])

    def _detach(self, run: int) -> None:
        """Take a run and all below it out of the tree, and make its parent a victim again if that has become a leaf."""
        parent = self.index.info(run)[0]
        for left in self.index.detach(run):
            self.policy.remove(left)
        if parent >= 0 and self.index.evictable(parent):
            self.policy.unpark(parent)
        self._collect()

    def _release(self, run: int) -> None:
        leaf = self.index.release(run)
        if leaf >= 0:
            self.policy.unpark(leaf)
        self._collect()

    def _collect(self) -> None:
        """Bring slots that the index let go back to their pools."""
        for tier, pool in self.pools.items():
            freed = self.index.drain(tier)
            if freed:
                pool.free(np.frombuffer(freed, dtype=np.int32))
