"""The index: a radix tree of path-compressed runs, with slots per tier.

A *run* is a stretch of consecutive blocks of one sequence: an id, a parent, children, n keys, and per tier an int32 slot for each block
(-1 = not there). Keys are chained, so a key names its block and everything before it; two things follow:

- the key of a run's first block (its head) identifies the run among all: one table head -> run finds every child;
- where key i of a query equals key i of a run, all earlier keys agree too: one comparison of the run's tail decides on the whole
  run, and a binary search finds the place where the two part.

So a match costs one table look-up and one comparison a run, however many blocks the run has.

States. A run is inserted WRITING and becomes ready by ``publish``. It is pinned by leases and by the plan that writes it. A run that leaves
the tree while it, or something below it, is pinned is *detached*: it cannot be found any more, but it keeps its place below its
parent (which therefore keeps its slots as well) and its slots until the last pin below it goes. Slots and keys that are let go
collect inside the index until they are drained.

Tiers. A run has an array of slots for each tier in which some of its blocks are; where a tier lost the last of them, or a plan marked
blocks as on their way there and failed, the array may be empty until an eviction removes it. A run may lose slots in a tier when
nothing below it holds any there: so each tier keeps prefixes, and its least recently used leaves go first. Where the last copy of a block goes,
all that follows it leaves the tree: nothing can find it any more.

Invariant: each block of a run that is attached to the tree is in at least one tier.

``RunIndex`` is the C class where the extension was built, else :class:`PyRunIndex`, its oracle; both have the same methods.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.cache.chains import build_runs
from flexkv_core.cache.run import NOT_THERE, ON_ITS_WAY, SLOT_BYTES, TIERS, Run
from flexkv_core.types import KEY_BYTES, Slots


class PyRunIndex:
    """The index in Python. Not thread-safe; the caller holds a lock.

    Runs are named by ids >= 0; an id is used again once its run is gone. Unknown ids raise KeyError; -1 stands for "none".
    """

    def __init__(self, track_removed: bool = False) -> None:
        """``track_removed``: collect the keys of published blocks that a tier loses, for :meth:`drain_removed`."""
        self._runs: dict[int, Run] = {}
        self._unused: list[int] = []
        self._heads: dict[bytes, Run] = {}
        self._freed: list[list[Slots]] = [[] for _ in range(TIERS)]
        self._track_removed = track_removed
        self._removed: list[list[bytes]] = [[] for _ in range(TIERS)]
        self.blocks = 0
        """Blocks attached to the tree, being written or ready."""

    def __len__(self) -> int:
        """Runs attached to the tree."""
        return len(self._heads)

    # ---- finding -------------------------------------------------------------------------------------------------------------

    def match(
        self, keys: bytes | memoryview, start: int, out: Slots | None, tier: int, through_writing: bool
    ) -> tuple[int, int, int]:
        """Walk down along ``keys``.

        Returns (blocks that were found, the deepest run touched or -1, how many of its blocks were found). The slots in ``tier`` of
        the found blocks from ``start`` on are written to ``out`` (int32, at least as long as the keys behind ``start``), -1 where the tier does
        not hold the block. A run that is being written ends the walk unless ``through_writing``.
        """
        total = len(keys) // KEY_BYTES
        if start < 0 or (out is not None and len(out) < total - start):
            raise ValueError(f"no room for the slots of blocks {start} to {total}")
        keys = bytes(keys)  # the same object, where it is bytes already
        find = self._heads.get
        begin = at = 0
        end_of_keys = KEY_BYTES * total
        found: Run | None = None
        walked: list[bytes] = []
        while begin < end_of_keys:
            run = find(keys[begin : begin + KEY_BYTES])
            # A head whose parent is not the run just left: the caller's keys are not chained. Stop rather than jump.
            if run is None or run.parent is not found or (run.writing and not through_writing):
                break
            found = run
            at = run.length
            walked.append(run.slots[tier] or run.tier_bytes(tier))
            end = begin + KEY_BYTES * at
            if keys[end - KEY_BYTES : end] != run.tail:
                position = begin // KEY_BYTES
                at = run.agreement(keys, position, min(at, total - position))
                begin += KEY_BYTES * at
                break
            begin = end
        if found is None:
            return 0, -1, 0
        position = begin // KEY_BYTES
        if out is not None and position > start:
            out[: position - start] = np.frombuffer(
                b"".join(walked), np.int32, position - start, SLOT_BYTES * start
            )
        return position, found.number, at

    def find(self, head: bytes) -> int:
        """The attached run whose first key is ``head``, or -1."""
        run = self._heads.get(head)
        return -1 if run is None else run.number

    def path(self, run: int) -> list[int]:
        """Ids from the root's child down to ``run``."""
        step: Run | None = self._runs[run]
        path = []
        while step is not None:
            path.append(step.number)
            step = step.parent
        path.reverse()
        return path

    def info(self, run: int) -> tuple[int, int, bool, bool, int, int]:
        """(parent or -1, blocks, writing, detached, pins, children: detached ones included)."""
        r = self._runs[run]
        parent = -1 if r.parent is None else r.parent.number
        return parent, r.length, r.writing, r.detached, r.pins, len(r.children)

    def evictable(self, run: int, tier: int) -> bool:
        """Whether the run may lose slots in the tier: attached, published, nothing at or below it pinned, nothing below it in the tier."""
        return self._runs[run].evictable(tier)

    def holds(self, run: int) -> int:
        """The tiers in which the run has an array of slots, as bits ``1 << tier``."""
        return sum(1 << tier for tier, slots in enumerate(self._runs[run].slots) if slots is not None)

    def child(self, run: int) -> int:
        """The child, if the run has exactly one, else -1."""
        children = self._runs[run].children
        return next(iter(children)).number if len(children) == 1 else -1

    def leaves(self, run: int) -> tuple[int, ...]:
        """For each tier: the nearest run with slots there, from ``run`` upwards, if it may lose them, else -1.

        Whatever has changed at or below ``run``, these are the runs that may have become evictable.
        """
        return tuple(self._leaf(self._runs[run], tier) for tier in range(TIERS))

    def runs(self) -> list[int]:
        """All ids, detached runs included."""
        return sorted(self._runs)

    def keys(self, run: int) -> bytes:
        """The keys of a run's blocks."""
        return self._runs[run].keys

    def slots(self, run: int, tier: int) -> bytes | None:
        """A run's slots in one tier, int32 as bytes; None when the tier never held any of it."""
        return self._runs[run].slots[tier]

    def segment(self, run: int, tier: int, at: int, count: int) -> tuple[bytes, bytes, bytes]:
        """Of ``count`` blocks from ``at`` on: the key before the first (16 zero bytes: it begins a sequence), keys, slots as int32."""
        r = self._runs[run]
        if at < 0 or count < 1 or at + count > r.length:
            raise ValueError(f"{count} blocks at {at} are not in a run of {r.length}")
        above = b"" if r.parent is None else r.parent.tail
        before = r.keys[KEY_BYTES * (at - 1) : KEY_BYTES * at] if at else above or bytes(KEY_BYTES)
        end = at + count
        slots = r.tier_bytes(tier)[SLOT_BYTES * at : SLOT_BYTES * end]
        return before, r.keys[KEY_BYTES * at : KEY_BYTES * end], slots

    def missing(self, run: int, have: int, lack: int, at: int, limit: int) -> tuple[int, int]:
        """The first stretch, from block ``at`` on, of blocks that are in tier ``have`` and neither in ``lack`` nor on their way there.

        Returns (its first block, its length, at most ``limit``); a length of 0: there is none.
        """
        r = self._runs[run]
        if r.slots[have] is None:
            return r.length, 0
        wanted = (r.tier_slots(have) >= 0) & (r.tier_slots(lack) == NOT_THERE)
        places = np.flatnonzero(wanted[at:])
        if not len(places):
            return r.length, 0
        first = at + int(places[0])
        gaps = np.flatnonzero(~wanted[first : first + limit])
        return first, int(gaps[0]) if len(gaps) else min(limit, r.length - first)

    def locate(self, tier: int, slots: Slots) -> bytes:
        """Which blocks lie in ``slots`` (int32) of a tier: (run, place in it, slot) as int32, by run, then by place. Detached runs do not
        count. Costs a look at all slots."""
        wanted = set(slots.tolist())
        found = []
        for number in self.runs():
            r = self._runs[number]
            if not r.detached and r.slots[tier] is not None:
                held = r.tier_slots(tier).tolist()
                found += [(number, at, slot) for at, slot in enumerate(held) if slot >= 0 and slot in wanted]
        return np.array(found, np.int32).tobytes()

    # ---- growing and shaping -------------------------------------------------------------------------------------------------

    def insert(self, parent: int, keys: bytes, tier: int, slots: Slots) -> int:
        """Hang a new run, WRITING and pinned once, below ``parent`` (-1: the root). ``slots``: int32, one a key, all in ``tier``.

        ValueError: no keys, a count that differs, a head that is in the tree already.
        """
        if not keys or len(keys) % KEY_BYTES or len(slots) != len(keys) // KEY_BYTES:
            raise ValueError(f"{len(keys)} bytes of keys do not go with {len(slots)} slots")
        if keys[:KEY_BYTES] in self._heads:
            raise ValueError("a run with this head is in the tree already")
        above = None if parent < 0 else self._runs[parent]
        run = self._new(bytes(keys))
        run.slots[tier] = np.asarray(slots, dtype=np.int32).tobytes()
        run.pins = 1
        run.link(above)
        self._heads[run.head] = run
        self.blocks += run.length
        return run.number

    def split(self, run: int, at: int) -> int:
        """Cut a run before its block ``at``. The first part becomes a new run and the parent; returns its id.

        The second part keeps the id, the children and the pins: leases name the deepest run of their path.
        """
        tail = self._runs[run]
        if not 0 < at < tail.length or tail.detached:
            raise ValueError(f"cannot split {tail.length} blocks at {at}")
        above = tail.parent
        tail.unlink()
        head = self._new(tail.keys[: KEY_BYTES * at])
        head.writing = tail.writing
        head.slots = [None if slots is None else slots[: SLOT_BYTES * at] for slots in tail.slots]
        tail.keep(at, tail.length)
        head.link(above)
        tail.link(head)
        self._heads[head.head] = head
        self._heads[tail.head] = tail
        return head.number

    def merge(self, run: int, blocks_max: int) -> int:
        """Join a run with its parent if they are one stretch, unpinned above, published, and together at most ``blocks_max`` blocks.

        ``run`` keeps its id. Returns the parent's id, which is gone, or -1 when nothing was done.
        """
        tail = self._runs[run]
        head = tail.parent
        if (
            head is None
            or tail.detached
            or tail.writing
            or head.writing
            or head.pins
            or len(head.children) != 1
        ):
            return -1
        if head.length + tail.length > blocks_max:
            return -1
        del self._heads[tail.head]
        above = head.parent
        tail.unlink()
        head.unlink()
        for tier in range(TIERS):
            if head.slots[tier] is not None or tail.slots[tier] is not None:
                tail.slots[tier] = head.tier_bytes(tier) + tail.tier_bytes(tier)
        tail.set_keys(head.keys + tail.keys)
        tail.link(above)
        self._heads[tail.head] = tail
        self._forget(head)
        return head.number

    def set_slots(self, run: int, tier: int, at: int, slots: Slots) -> None:
        """Write ``slots`` (int32; -1 = not there, -2 = on its way) over blocks ``at`` … of one tier. What stood there is the caller's."""
        r = self._runs[run]
        if at < 0 or at + len(slots) > r.length:
            raise ValueError(f"{len(slots)} slots at {at} do not fit a run of {r.length} blocks")
        changed = r.tier_slots(tier)
        changed[at : at + len(slots)] = slots
        r.set_tier(tier, changed.tobytes())

    def fill(self, run: int, skip: int, tier: int, slots: Slots) -> list[int]:
        """Settle blocks that a plan brought to a tier: ``len(slots)`` blocks that end ``skip`` blocks before the end of ``run``, upwards.

        Where ``slots`` (int32) has a slot, the block is attached and the tier lacks it, the tree takes the slot and -1 is written to ``slots``;
        what is left in there stays the caller's. Where it has -1, a mark "on its way" is taken away. Counted from the end of the run
        because that stays: a split leaves the id to the tail, a join puts blocks in front. Returns the runs that had nothing in the tier so
        far, deepest first. ValueError: there are not so many blocks.
        """
        pieces = self._upwards(self._runs[run], skip, len(slots))
        gained = []
        done = len(slots)
        for r, begin, end in pieces:
            if self._fill_piece(r, begin, end, tier, slots[done - (end - begin) : done]):
                gained.append(r.number)
            done -= end - begin
        return gained

    def load(
        self, tier: int, slots: Slots, keys: bytes, parents: bytes, ages: npt.NDArray[np.int64]
    ) -> tuple[bytes, bytes, bytes]:
        """Build the tree of blocks that a tier holds; nothing may be attached yet.

        ``slots``: int32 [n]; ``keys``, ``parents``: 16 * n bytes, the parent of a sequence's first block being 16 zero bytes; ``ages``: int64 [n],
        larger is newer. The runs are ready and not pinned. Returns (positions of blocks that no chain connects to a beginning, or whose
        key came before, int32 as bytes; ids of the runs, parents before children, int32; the newest age at or below each, int64).
        ValueError: lengths differ, or the tree is not empty.
        """
        count = len(slots)
        if (
            self._heads
            or len(keys) != KEY_BYTES * count
            or len(parents) != KEY_BYTES * count
            or len(ages) != count
        ):
            raise ValueError(
                f"cannot load {count} slots, {len(keys)} bytes of keys, {len(parents)} of parents, {len(ages)} ages"
            )
        built, dropped = build_runs(bytes(keys), bytes(parents), ages.tolist())
        made: list[Run] = []
        for above, places, _ in built:
            run = self._new(b"".join([keys[KEY_BYTES * i : KEY_BYTES * (i + 1)] for i in places]))
            run.slots[tier] = np.asarray(slots, dtype=np.int32)[places].tobytes()
            run.writing = False
            run.link(None if above < 0 else made[above])
            self._heads[run.head] = run
            self.blocks += run.length
            made.append(run)
        ids = np.array([run.number for run in made], dtype=np.int32)
        return (
            np.array(dropped, np.int32).tobytes(),
            ids.tobytes(),
            np.array([age for *_, age in built], np.int64).tobytes(),
        )

    def publish(self, run: int) -> None:
        """WRITING -> ready."""
        self._runs[run].writing = False

    # ---- keeping and letting go ----------------------------------------------------------------------------------------------

    def pin(self, run: int) -> None:
        """Keep the run, and with it everything above it."""
        r = self._runs[run]
        r.set_pins(r.pins + 1)

    def release(self, run: int) -> int:
        """Take one pin away. Detached runs that nothing keeps any more are let go.

        Returns the run, or the nearest above it that is still there, or -1: whose :meth:`leaves` may be evictable now.
        """
        r = self._runs[run]
        if r.pins <= 0:
            raise ValueError(f"run {run} is not pinned")
        r.set_pins(r.pins - 1)
        above = self._let_go(r)
        return -1 if above is None else above.number

    def evict(self, runs: Sequence[int], tier: int, want: int) -> tuple[int, int, bool, list[int], int]:
        """Let go of up to ``want`` (at least 1) slots in ``tier``, of one run after the other, each from its tail. From the first block on
        that no tier holds any more, a run is cut off, with all that is below it.

        Ends at a run that is not evictable (or is gone meanwhile), and after one that let something above become evictable: that is for
        the caller to put in its place first. Returns (slots let go; how many of ``runs``, from the first, have no slot in the tier any more;
        whether the next of them is not evictable; ids of runs that left the tree; a run whose :meth:`leaves` may have changed, or -1).
        """
        if want < 1:
            raise ValueError(f"cannot evict {want} slots")
        freed = done = 0
        left_tree: list[int] = []
        for number in runs:
            if number not in self._runs and done:
                break
            run = self._runs[number]
            if not run.evictable(tier):
                return freed, done, True, left_tree, -1
            count, left, gone, above = self._evict_run(run, tier, want - freed)
            freed += count
            done += left == 0
            left_tree += gone
            if left or freed == want or above >= 0:
                return freed, done, False, left_tree, above
        return freed, done, False, left_tree, -1

    def detach(self, run: int) -> list[int]:
        """Take a run and everything below it out of the tree; what nothing keeps is let go at once.

        Returns the ids that left the tree (some may be in use again soon: forget them now).
        """
        stack = [self._runs[run]]
        order: list[Run] = []
        while stack:  # no recursion: a path may be thousands of runs deep
            r = stack.pop()
            order.append(r)
            stack.extend(r.children)
        left = [r for r in order if not r.detached]
        for r in left:
            self._leave(r)
        for r in reversed(order):
            self._free_if_idle(r)
        return [r.number for r in left]

    def detach_all(self) -> None:
        """Empty the tree."""
        for run in [r.number for r in self._heads.values() if r.parent is None]:
            self.detach(run)

    def drain(self, tier: int) -> bytes:
        """The slots that were let go in one tier since the last call, int32 as bytes."""
        freed = self._freed[tier]
        if not freed:
            return b""
        self._freed[tier] = []
        return freed[0].tobytes() if len(freed) == 1 else np.concatenate(freed).tobytes()

    def drain_removed(self, tier: int) -> bytes:
        """The keys of published blocks that a tier lost since the last call, by an eviction or because they left the tree; not by
        :meth:`set_slots`. Empty unless tracked."""
        removed, self._removed[tier] = self._removed[tier], []
        return b"".join(removed)

    def memory_bytes(self) -> int:
        """Bytes that the index holds, as far as Python tells."""
        total = sys.getsizeof(self._heads) + sys.getsizeof(self._runs)
        for r in self._runs.values():
            total += (
                sys.getsizeof(r) + sys.getsizeof(r.keys) + sys.getsizeof(r.tail) + sys.getsizeof(r.children)
            )
            total += sys.getsizeof(r.head) + sum(
                sys.getsizeof(slots) for slots in r.slots if slots is not None
            )
        return total

    # ---- helpers -------------------------------------------------------------------------------------------------------------

    def _new(self, keys: bytes) -> Run:
        run = Run(self._unused.pop() if self._unused else len(self._runs), keys)
        self._runs[run.number] = run
        return run

    def _forget(self, run: Run) -> None:
        del self._runs[run.number]
        self._unused.append(run.number)

    def _leaf(self, run: Run | None, tier: int) -> int:
        while run is not None and run.slots[tier] is None:
            run = run.parent
        return run.number if run is not None and run.evictable(tier) else -1

    def _upwards(self, run: Run, skip: int, count: int) -> list[tuple[Run, int, int]]:
        """The pieces (run, begin, end) of ``count`` blocks that end ``skip`` blocks before the end of ``run``, deepest first."""
        pieces = []
        step: Run | None = run
        end = run.length - skip
        while count > 0 and step is not None:
            if end > 0:
                begin = max(0, end - count)
                pieces.append((step, begin, end))
                count -= end - begin
                end = 0
            step = step.parent
            end += 0 if step is None else step.length
        if count > 0:
            raise ValueError(f"{count} blocks more than there are above run {run.number}")
        return pieces

    def _fill_piece(self, run: Run, begin: int, end: int, tier: int, slots: Slots) -> bool:
        """Returns whether the run had nothing in the tier."""
        if run.detached:
            return False
        had = run.slots[tier] is not None
        if not had and not (slots >= 0).any():
            return False
        array = run.tier_slots(tier)
        now = array[begin:end]
        now[(slots < 0) & (now == ON_ITS_WAY)] = NOT_THERE
        taken = (slots >= 0) & (now < 0)
        now[taken] = slots[taken]
        slots[taken] = NOT_THERE
        run.set_tier(tier, array.tobytes())
        return not had

    def _evict_run(self, run: Run, tier: int, want: int) -> tuple[int, int, list[int], int]:
        """Returns (slots let go, how many leading blocks may still have one in the tier, runs that left the tree, a run whose leaves may
        have changed)."""
        slots = run.tier_slots(tier)
        places = np.flatnonzero(slots >= 0)
        held = places[-want:]
        left = int(places[-want - 1]) + 1 if len(places) > want else 0
        if len(held):
            self._freed[tier].append(slots[held])
        self._note_removed(run, tier, left)
        slots[left:] = NOT_THERE
        run.set_tier(tier, slots.tobytes() if left else None)
        gone, above = self._cut_holes(run, left)
        return len(held), left, gone, above if gone or left else run.number

    def _cut_holes(self, run: Run, begin: int) -> tuple[list[int], int]:
        """Cut a run, which is not busy, before its first block from ``begin`` on that no tier holds; all that is below it leaves.

        Returns (runs that left, the run that is the lowest there now).
        """
        keep = run.first_hole(begin)
        if keep == run.length:
            return [], -1
        gone = [left for child in list(run.children) for left in self.detach(child.number)]
        if keep == 0:
            above = run.parent
            gone += self.detach(run.number)
            return gone, -1 if above is None else above.number
        self.blocks -= run.length - keep
        for tier in range(TIERS):
            self._note_removed(run, tier, keep)
            self._free_slots(run.tier_slots(tier)[keep:], tier)
        run.keep(0, keep)
        return gone, run.number

    def _free_slots(self, slots: Slots, tier: int) -> None:
        held = slots[slots >= 0]
        if len(held):
            self._freed[tier].append(held)

    def _leave(self, run: Run) -> None:
        """Out of the table, so that nothing finds it."""
        del self._heads[run.head]
        run.detached = True
        self.blocks -= run.length
        for tier in range(TIERS):
            self._note_removed(run, tier, 0)

    def _note_removed(self, run: Run, tier: int, begin: int) -> None:
        """A tier is about to lose what it has of a run from block ``begin`` on."""
        if self._track_removed and not run.writing and run.slots[tier] is not None:
            places = begin + np.flatnonzero(run.tier_slots(tier)[begin:] >= 0)
            self._removed[tier].append(
                b"".join(run.keys[KEY_BYTES * i : KEY_BYTES * (i + 1)] for i in places.tolist())
            )

    def _let_go(self, run: Run) -> Run | None:
        """Free detached runs that nothing keeps, upwards; returns the first that stays."""
        step: Run | None = run
        while step is not None:
            above = step.parent
            if not self._free_if_idle(step):
                return step
            step = above
        return None

    def _free_if_idle(self, run: Run) -> bool:
        if not run.idle:
            return False
        self._free(run)
        return True

    def _free(self, run: Run) -> None:
        for tier in range(TIERS):
            if run.slots[tier] is not None:
                self._free_slots(run.tier_slots(tier), tier)
        run.unlink()
        self._forget(run)


def _pick() -> Any:
    from flexkv_core.native import NATIVE

    if NATIVE:
        from flexkv_core.native import _native

        native_index = getattr(_native, "RunIndex", None)
        if hasattr(native_index, "locate"):
            return native_index
    return PyRunIndex


RunIndex: type[PyRunIndex] = _pick()
