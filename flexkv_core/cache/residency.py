"""Residency: the index, and all that must agree with it: pools, eviction orders, the queue of writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from flexkv_core.cache.eviction import EvictionPolicy, make_policy
from flexkv_core.cache.mempool import Mempool
from flexkv_core.cache.radix_tree import PyRunIndex, RunIndex
from flexkv_core.cache.run import ON_ITS_WAY
from flexkv_core.cache.write_queue import WriteQueue
from flexkv_core.types import Slots, Tier

# Runs that follow each other are joined up to this length: a sequence that grows block by block becomes one run, and a join never
# moves more than 12 KiB, well under 1 µs.
_MERGE_BLOCKS_MAX = 512

# Runs that are evicted in one call of the index, as long as nothing else becomes the first to go meanwhile.
_VICTIMS_MAX = 16


class Residency:
    """Which block is in which tier's slot, and what goes first. Knows runs, not plans.

    A tier's eviction order holds exactly the published runs with an array of slots there; what the index lets go returns to
    the pools at the end of each operation.
    """

    def __init__(
        self,
        capacities: Mapping[Tier, int],
        eviction: str,
        index_factory: Callable[[bool], PyRunIndex] | None,
        track_removed: bool,
    ) -> None:
        self.pools = {tier: Mempool(count) for tier, count in capacities.items()}
        self.index = (index_factory or RunIndex)(track_removed)
        self.policies: dict[Tier, EvictionPolicy] = {}
        self.queue = WriteQueue()
        self.owed = WriteQueue()
        """What failed or was given up, and is to be written when nothing else waits."""
        self._eviction = eviction
        self._new_policies()

    def _new_policies(self) -> None:
        self.policies = {tier: make_policy(self._eviction) for tier in self.pools}

    # ---- use -----------------------------------------------------------------------------------------------------------------

    def touch(self, run: int) -> None:
        """The run and all above it were used."""
        path = self.index.path(run)
        for policy in self.policies.values():
            policy.touch(path)

    def touch_in(self, tier: Tier, run: int) -> None:
        """As :meth:`touch`, in one tier."""
        self.policies[tier].touch(self.index.path(run))

    def release(self, run: int) -> None:
        """Take a pin away; what may go now is a victim again."""
        self._unpark(self.index.release(run))
        self.collect()

    # ---- shape ---------------------------------------------------------------------------------------------------------------

    def publish(self, run: int) -> None:
        """The run can be found now, and waits to be written."""
        self.index.publish(run)
        self._add(run, self.index.holds(run))
        if Tier.SSD in self.pools:
            self.queue.add(run, self.index.info(run)[1])

    def split(self, run: int, at: int) -> int:
        """Cut a run before its block ``at``; returns the new run, which is the first part."""
        head = self.index.split(run, at)
        if not self.index.info(head)[2]:
            self._add(head, self.index.holds(head))
        for queue in (self.queue, self.owed):
            queue.split(head, at, run)
        return head

    def merge(self, run: int) -> bool:
        """Join a run with its parent if nothing speaks against it; the run keeps its id. Returns whether it was."""
        before = self.index.holds(run)
        absorbed = self.index.merge(run, _MERGE_BLOCKS_MAX)
        if absorbed < 0:
            return False
        for policy in self.policies.values():
            policy.remove(absorbed)
        for queue in (self.queue, self.owed):
            queue.merge(absorbed, run)
        gained = self.index.holds(run) & ~before
        if gained:
            self._add(run, gained)
            self.touch(run)
        return True

    def merge_around(self, run: int) -> None:
        """Join a run, which was pinned until now and may be gone, with the one above it and the one below it."""
        try:
            _, _, writing, detached, pins, _ = self.index.info(run)
        except KeyError:
            return
        if writing or detached:
            return
        self.merge(run)
        child = self.index.child(run) if not pins else -1
        if child >= 0:
            self.merge(child)

    # ---- slots ---------------------------------------------------------------------------------------------------------------

    def fill(self, run: int, skip: int, tier: Tier, slots: Slots) -> None:
        """:meth:`PyRunIndex.fill`, and the eviction order follows."""
        gained = self.index.fill(run, skip, tier, slots)
        policy = self.policies[tier]
        for new in gained:
            policy.add(new)
        policy.touch(self.index.path(run))

    def mark_on_way(self, run: int, at: int, count: int) -> None:
        """Blocks are being written to the SSD."""
        held = self.index.holds(run) & (1 << Tier.SSD)
        self.index.set_slots(run, Tier.SSD, at, np.full(count, ON_ITS_WAY, np.int32))
        if not held:
            self._add(run, 1 << Tier.SSD)

    def take(self, tier: Tier, want: int) -> tuple[Slots, int]:
        """Up to ``want`` slots, after evicting what is needed and possible; and how many slots were evicted for it."""
        pool, evicted = self.pools[tier], 0
        if pool.free_count < want:
            evicted = self.evict(want - pool.free_count, tier)
        slots = pool.allocate(min(want, pool.free_count))
        assert slots is not None
        return slots, evicted

    def evict(self, want: int, tier: Tier) -> int:
        """Let go of up to ``want`` slots of a tier; returns how many."""
        policy = self.policies[tier]
        victims, remove, evict = policy.victims, policy.remove, self.index.evict
        left_tree: list[int] = []
        left_tier: list[int] = []
        freed = 0
        while freed < want:
            runs = victims(min(want - freed, _VICTIMS_MAX))
            if not runs:
                break
            count, done, blocked, gone, above = evict(runs, tier, want - freed)
            freed += count
            left_tree += gone
            for run in runs[:done]:
                remove(run)
                left_tier.append(run)
            if blocked:
                policy.park(runs[done])
            if above >= 0:
                self._unpark(above)
        if (
            len(self.pools) > 1
        ):  # nothing below a victim is in its tier, so the other orders can wait until now
            self._forget(left_tree)
            if tier == Tier.HOST:
                self._discard_writes(left_tier)
        self.collect()
        return freed

    def detach(self, run: int) -> None:
        """Take a run and all below it out of the tree; what is pinned keeps its slots until it is not."""
        parent = self.index.info(run)[0]
        self._forget(self.index.detach(run))
        self._unpark(parent)
        self.collect()

    def detach_all(self) -> None:
        """Empty the tree."""
        self.index.detach_all()
        self._new_policies()
        self.queue.clear()
        self.owed.clear()
        self.collect()

    def load(
        self, tier: Tier, slots: Slots, keys: bytes, parents: bytes, ages: np.ndarray
    ) -> tuple[Slots, Slots]:
        """:meth:`PyRunIndex.load` into fresh slots; the order of eviction follows the ages. Returns the positions that were dropped, and
        the runs, parents before children."""
        dropped_raw, runs_raw, ages_raw = self.index.load(tier, slots, keys, parents, ages)
        runs, newest = np.frombuffer(runs_raw, np.int32), np.frombuffer(ages_raw, np.int64)
        add = self.policies[tier].add
        # Reversed, children come before their parents; the stable sort keeps that where ages are equal, and a parent is never older.
        for run in runs[::-1][np.argsort(newest[::-1], kind="stable")].tolist():
            add(run)
        dropped = np.frombuffer(dropped_raw, np.int32)
        self.pools[tier].claim(np.delete(slots, dropped))
        return dropped, runs

    def collect(self) -> None:
        """Bring slots that the index let go back to their pools."""
        for tier, pool in self.pools.items():
            freed = self.index.drain(tier)
            if freed:
                pool.free(np.frombuffer(freed, dtype=np.int32))

    # ---- helpers -------------------------------------------------------------------------------------------------------------

    def _add(self, run: int, tiers: int) -> None:
        for tier, policy in self.policies.items():
            if tiers >> tier & 1:
                policy.add(run)

    def _forget(self, runs: Iterable[int]) -> None:
        for policy in self.policies.values():
            remove = policy.remove
            for run in runs:
                remove(run)
        self._discard_writes(runs)

    def _discard_writes(self, runs: Iterable[int]) -> None:
        for run in runs:
            self.queue.discard(run)
            self.owed.discard(run)

    def _unpark(self, run: int) -> None:
        if run < 0:
            return
        leaves = self.index.leaves(run)
        for tier, policy in self.policies.items():
            if leaves[tier] >= 0:
                policy.unpark(leaves[tier])
