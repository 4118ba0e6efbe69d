"""The recount behind ``GlobalCacheEngine.check_integrity``: derives every redundant piece of state again and compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from flexkv_core.cache.eviction import EvictionPolicy
from flexkv_core.cache.mempool import Mempool
from flexkv_core.cache.radix_tree import PyRunIndex
from flexkv_core.cache.residency import Residency
from flexkv_core.types import KEY_BYTES, Slots, Tier


def check(
    residency: Residency, pinned_runs: Iterable[int], own_slots: Mapping[Tier, Sequence[Slots]]
) -> None:
    """AssertionError that says what differs.

    ``pinned_runs``: the run of each pin, repeated for each. ``own_slots``: those that plans have and the tree has not; negative ones are none.
    """
    index = residency.index
    runs = index.runs()
    _check_tree(index, runs)
    _check_pins(index, runs, Counter(pinned_runs))
    for tier, pool in residency.pools.items():
        _check_slots(index, runs, tier, pool, own_slots[tier])
    _check_holes(index, runs)
    busy = _with_ancestors(index, (run for run in runs if index.info(run)[4]))
    for tier, policy in residency.policies.items():
        _check_policy(index, runs, tier, policy, busy)


def _check_tree(index: PyRunIndex, runs: list[int]) -> None:
    children: Counter[int] = Counter()
    attached = blocks = 0
    for run in runs:
        parent, length, _, detached, _, _ = index.info(run)
        keys = index.keys(run)
        children[parent] += 1
        assert length > 0, f"run {run} is empty"
        assert len(keys) == KEY_BYTES * length, f"run {run} has {length} blocks and {len(keys)} bytes of keys"
        if detached:
            assert index.find(keys[:KEY_BYTES]) != run, f"run {run} is detached and can still be found"
            continue
        attached += 1
        blocks += length
        assert index.find(keys[:KEY_BYTES]) == run, f"run {run} is not found by its head"
        assert parent < 0 or not index.info(parent)[3], (
            f"run {run} hangs in the tree below detached run {parent}"
        )
        assert index.path(run)[-1] == run, f"the path of run {run} does not end in it"
    assert attached == len(index), f"{len(index)} heads in the table, {attached} runs in the tree"
    assert blocks == index.blocks, f"{index.blocks} blocks counted, {blocks} in the tree"
    for run in runs:
        counted = index.info(run)[5]
        assert counted == children[run], f"run {run} counts {counted} children and has {children[run]}"


def _check_pins(index: PyRunIndex, runs: list[int], leases: Counter[int]) -> None:
    for run in runs:
        _, _, writing, detached, pins, children = index.info(run)
        assert pins == leases[run], f"run {run} has {pins} pins and {leases[run]} leases"
        assert not detached or pins or children, f"run {run} is detached and nothing keeps it"
        assert not writing or pins or children, f"run {run} is being written by nobody"
    gone = set(leases) - set(runs)
    assert not gone, f"leases on runs that are gone: {sorted(gone)}"


def _with_ancestors(index: PyRunIndex, runs: Iterable[int]) -> set[int]:
    found: set[int] = set()
    for run in runs:
        while run >= 0 and run not in found:
            found.add(run)
            run = index.info(run)[0]
    return found


def _check_slots(
    index: PyRunIndex, runs: list[int], tier: Tier, pool: Mempool, own_slots: Sequence[Slots]
) -> None:
    seen: Slots = np.zeros(pool.capacity, dtype=np.int32)
    for run in runs:
        raw = index.slots(run, tier)
        if raw is None:
            continue
        slots = np.frombuffer(raw, dtype=np.int32)
        assert len(slots) == index.info(run)[1], f"run {run} has {len(slots)} slots in {tier.name}"
        np.add.at(seen, slots[slots >= 0], 1)
    for slots in own_slots:
        np.add.at(seen, slots[slots >= 0], 1)
    twice = np.flatnonzero(seen > 1)
    assert not len(twice), f"slots of {tier.name} that two hold: {twice[:8].tolist()}"
    differ = np.flatnonzero((seen > 0) != pool.taken())
    assert not len(differ), (
        f"slots of {tier.name} that the pool and the tree or plans see differently: {differ[:8].tolist()}"
    )
    assert pool.used_count == int(seen.sum()), (
        f"{tier.name} counts {pool.used_count} used slots, there are {int(seen.sum())}"
    )


def _check_holes(index: PyRunIndex, runs: list[int]) -> None:
    for run in runs:
        if index.info(run)[3]:
            continue  # its plans know what they use
        held = np.zeros(index.info(run)[1], dtype=bool)
        for tier in Tier:
            raw = index.slots(run, tier)
            if raw is not None:
                held |= np.frombuffer(raw, dtype=np.int32) >= 0
        assert held.all(), f"run {run} has blocks in no tier: {np.flatnonzero(~held)[:8].tolist()}"


def _check_policy(
    index: PyRunIndex, runs: list[int], tier: Tier, policy: EvictionPolicy, busy: set[int]
) -> None:
    ordered, parked = (list(ids) for ids in policy.members())
    known = Counter(ordered) + Counter(parked)
    infos = {run: index.info(run) for run in runs}
    inside = [run for run in runs if index.slots(run, tier) is not None]
    assert inside == [run for run in runs if index.holds(run) >> tier & 1], "holds() and slots() differ"
    published = Counter(run for run in inside if not (infos[run][2] or infos[run][3]))
    assert known == published, (
        f"{tier.name}: in the policy only: {known - published}; in the tree only: {published - known}"
    )
    above = _with_ancestors(index, (infos[run][0] for run in inside))
    for run, (_, _, writing, detached, _, _) in infos.items():
        may = not (writing or detached or run in busy or run in above)
        assert index.evictable(run, tier) == may, f"run {run} may lose slots of {tier.name}: {may}"
    stuck = [run for run in parked if index.evictable(run, tier)]
    assert not stuck, f"runs that may be evicted from {tier.name} and are parked: {stuck[:8]}"
