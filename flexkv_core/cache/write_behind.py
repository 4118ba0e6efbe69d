"""Write-behind: which blocks of the host tier go to the SSD next, and what becomes of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flexkv_core.cache.leases import Leases, Stretch, Writing
from flexkv_core.cache.plans import NO_SLOTS, CacheStats, WritePlan
from flexkv_core.cache.residency import Residency
from flexkv_core.cache.tier_events import TierEvents
from flexkv_core.cache.write_queue import WriteQueue
from flexkv_core.types import KEY_BYTES, Slots, Tier

_Piece = tuple[int, int, int]
"""(run, first block in it, blocks)"""


class WriteBehind:
    """Part of :class:`~flexkv_core.cache.engine.GlobalCacheEngine`, which documents what its methods promise."""

    def __init__(self, residency: Residency, leases: Leases, stats: CacheStats, events: TierEvents) -> None:
        self._residency = residency
        self._index = residency.index
        self._leases = leases
        self._stats = stats
        self._events = events

    def plan(self, limit_blocks: int) -> WritePlan | None:
        """Of :meth:`GlobalCacheEngine.plan_write`."""
        assert limit_blocks > 0, f"cannot plan {limit_blocks} blocks"
        if Tier.SSD not in self._residency.pools:
            return None
        pieces = self._oldest(limit_blocks)
        if not pieces:
            return None
        for run, _, _ in pieces:  # so that making room does not take them, or what they follow
            self._index.pin(run)
        slots, evicted = self._residency.take(Tier.SSD, sum(count for *_, count in pieces))
        self._stats.ssd_blocks_evicted += evicted
        pieces = self._fit(pieces, len(slots))
        return self._begin(pieces, slots) if pieces else None

    def finish(self, plan: WritePlan, ok: npt.NDArray[np.bool_], retry: bool) -> Slots:
        """Of :meth:`GlobalCacheEngine.finish_write`."""
        writing = self._leases.writes.pop(plan.lease.lease_id, None)
        if writing is None:
            return NO_SLOTS
        ok = np.asarray(ok, dtype=np.bool_)
        assert len(ok) == plan.count, f"{len(ok)} results of {plan.count} writes"
        slots: Slots = np.where(ok, plan.ssd_slots, np.int32(-1))
        self._settle(writing, slots)
        self._events.stored(Tier.SSD, plan.keys, plan.parents, ok & (slots < 0))
        forget = slots[slots >= 0]
        back = np.concatenate([plan.ssd_slots[~ok], forget])
        if len(back):
            self._residency.pools[Tier.SSD].free(back)
        self._wait_again(writing, ok, self._residency.queue if retry else self._residency.owed)
        self._release(writing)
        self._stats.blocks_written += int(ok.sum()) - len(forget)
        self._stats.blocks_write_failed += len(ok) - int(ok.sum())
        return forget

    def drop_oldest(self, blocks: int) -> int:
        """Of :meth:`GlobalCacheEngine.drop_oldest_writes`."""
        queue, dropped = self._residency.queue, 0
        while dropped < blocks:
            run = queue.oldest()
            if run is None:
                break
            waiting = queue.discard(run)
            # How many is an estimate; that some are missing is not.
            self._residency.owed.add(run, max(1, waiting))
            dropped += waiting
        self._stats.writes_dropped += dropped
        return dropped

    def queue_owed(self, blocks: int) -> int:
        """Of :meth:`GlobalCacheEngine.queue_owed_writes`."""
        owed, moved = self._residency.owed, 0
        while moved < blocks and (run := owed.oldest()) is not None:
            waiting = max(1, owed.discard(run))
            self._residency.queue.add(run, waiting)
            moved += waiting
        return moved

    # ---- planning ------------------------------------------------------------------------------------------------------------

    def _oldest(self, limit: int) -> list[_Piece]:
        """Stretches of blocks that wait; a run leaves the queue when nothing of it is left to plan."""
        queue = self._residency.queue
        pieces: list[_Piece] = []
        stale = []
        for run in queue.runs():
            found = self._missing_above(run, limit, pieces)
            limit -= sum(count for *_, count in found)
            pieces += found
            if limit == 0:
                break
            stale.append(run)
        for run in stale:
            queue.discard(run)
        for run, _, count in pieces:
            queue.subtract(run, count)
        return pieces

    def _missing_above(self, run: int, limit: int, planned: list[_Piece]) -> list[_Piece]:
        """What the SSD lacks of a run and of all above it, from the root down: after a restart a block is found only with all that it
        follows."""
        found: list[_Piece] = []
        taken = {piece[0] for piece in planned}
        for step in self._published_path(run):
            at, count = 0, 1
            while step not in taken and count and limit:
                at, count = self._index.missing(step, Tier.HOST, Tier.SSD, at, limit)
                if count:
                    found.append((step, at, count))
                at, limit = at + count, limit - count
        return found

    def _published_path(self, run: int) -> list[int]:
        """The run and those above it that can be written; nothing if the run is not there any more: the queue is only a hint."""
        try:
            detached = self._index.info(run)[3]
        except KeyError:
            return []
        if detached:
            return []
        return [step for step in self._index.path(run) if not self._index.info(step)[2]]

    def _fit(self, pieces: list[_Piece], room: int) -> list[_Piece]:
        """The first pieces, cut down to ``room`` blocks; the others wait again."""
        fitting: list[_Piece] = []
        for run, at, count in pieces:
            taken = min(room, count)
            room -= taken
            if taken:
                fitting.append((run, at, taken))
            else:
                self._residency.release(run)
            self._residency.queue.add(run, count - taken)
        return fitting

    def _begin(self, pieces: list[_Piece], slots: Slots) -> WritePlan:
        keys, parents, host = [], [], []
        stretches = []
        for run, at, count in pieces:
            before, own, host_slots = self._index.segment(run, Tier.HOST, at, count)
            keys.append(own)
            parents += [before, own[:-KEY_BYTES]]
            host.append(host_slots)
            stretches.append(Stretch(run, self._index.info(run)[1] - at - count, count))
            self._residency.mark_on_way(run, at, count)
        for run in {run for run, _, _ in pieces}:
            self._residency.touch_in(Tier.SSD, run)
        lease = self._leases.new()
        self._leases.writes[lease.lease_id] = Writing(tuple(stretches), slots)
        host_slots_of_all: Slots = np.frombuffer(b"".join(host), dtype=np.int32)
        return WritePlan(lease, b"".join(keys), b"".join(parents), host_slots_of_all, slots)

    # ---- the end -------------------------------------------------------------------------------------------------------------

    def _settle(self, writing: Writing, slots: Slots) -> None:
        """The tree takes the slots of blocks that it still has, and -1 stands in their place."""
        begin = 0
        for stretch in writing.stretches:
            end = begin + stretch.blocks
            self._residency.fill(stretch.run, stretch.skip, Tier.SSD, slots[begin:end])
            begin = end

    def _wait_again(self, writing: Writing, ok: npt.NDArray[np.bool_], queue: WriteQueue) -> None:
        """Failed blocks wait anew, each under the run in which it lies now: that may have been split off meanwhile."""
        if ok.all():
            return
        begin = 0
        for stretch in writing.stretches:
            failed = ~ok[begin : begin + stretch.blocks]
            begin += stretch.blocks
            run, end = stretch.run, -stretch.skip
            while len(failed):
                parent, length, _, detached, *_ = self._index.info(run)
                end += length
                if end > 0:
                    own, failed = failed[-end:], failed[:-end]
                    end = 0
                    if not detached:
                        queue.add(run, int(own.sum()))
                run = parent

    def _release(self, writing: Writing) -> None:
        for stretch in writing.stretches:
            self._residency.release(stretch.run)
        # While they were pinned, a sequence that grows could not be joined.
        for stretch in writing.stretches:
            self._residency.merge_around(stretch.run)
