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

Invariant: each block of a run that is attached to the tree is in at least one tier.

``RunIndex`` is the C class where the extension was built, else :class:`PyRunIndex`, its oracle; both have the same methods.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from flexkv_core.cache.run import SLOT_BYTES, TIERS, Run
from flexkv_core.types import KEY_BYTES, Slots


class PyRunIndex:
    """The index in Python. Not thread-safe; the caller holds a lock.

    Runs are named by ids >= 0; an id is used again once its run is gone. Unknown ids raise KeyError; -1 stands for "none".
    """

    def __init__(self, track_removed: bool = False) -> None:
        """``track_removed``: collect the keys of published blocks that leave the tree, for :meth:`drain_removed`."""
        self._runs: dict[int, Run] = {}
        self._unused: list[int] = []
        self._heads: dict[bytes, Run] = {}
        self._freed: list[list[Slots]] = [[] for _ in range(TIERS)]
        self._removed: list[bytes] | None = [] if track_removed else None
        self.blocks = 0
        """Blocks attached to the tree, being written or ready."""

    def __len__(self) -> int:
        """Runs attached to the tree."""
        return len(self._heads)

    # ---- finding -------------------------------------------------------------------------------------------------------------

    def match(
        self, keys: bytes, start: int, out: Slots | None, tier: int, through_writing: bool
    ) -> tuple[int, int, int]:
        """Walk down along ``keys``.

        Returns (blocks that were found, the deepest run touched or -1, how many of its blocks were found). The slots in ``tier`` of
        the found blocks from ``start`` on are written to ``out`` (int32, at least as long as the keys behind ``start``), -1 where the tier does
        not hold the block. A run that is being written ends the walk unless ``through_writing``.
        """
        total = len(keys) // KEY_BYTES
        if start < 0 or (out is not None and len(out) < total - start):
            raise ValueError(f"no room for the slots of blocks {start} to {total}")
        find = self._heads.get
        position = at = 0
        found: Run | None = None
        walked: list[Run] = []
        while position < total:
            begin = KEY_BYTES * position
            run = find(keys[begin : begin + KEY_BYTES])
            # A head whose parent is not the run just left: the caller's keys are not chained. Stop rather than jump.
            if run is None or run.parent is not found or (run.writing and not through_writing):
                break
            found = run
            walked.append(run)
            at = run.length
            end = begin + KEY_BYTES * at
            if keys[end - KEY_BYTES : end] != run.tail:
                at = run.agreement(keys, position, min(at, total - position))
            position += at
            if at < run.length:
                break
        if found is None:
            return 0, -1, 0
        if out is not None and position > start:
            joined = b"".join([run.slots[tier] or run.tier_bytes(tier) for run in walked])
            out[: position - start] = np.frombuffer(joined, np.int32, position - start, SLOT_BYTES * start)
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

    def evictable(self, run: int) -> bool:
        """Whether the run may lose blocks: attached, published, not pinned, without children."""
        return self._runs[run].evictable

    def runs(self) -> list[int]:
        """All ids, detached runs included."""
        return sorted(self._runs)

    def keys(self, run: int) -> bytes:
        """The keys of a run's blocks."""
        return self._runs[run].keys

    def slots(self, run: int, tier: int) -> bytes | None:
        """A run's slots in one tier, int32 as bytes; None when the tier never held any of it."""
        return self._runs[run].slots[tier]

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
        run = self._new(above, bytes(keys))
        run.slots[tier] = np.asarray(slots, dtype=np.int32).tobytes()
        run.pins = 1
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
        head = self._new(tail.parent, tail.keys[: KEY_BYTES * at])
        head.writing = tail.writing
        head.slots = [None if slots is None else slots[: SLOT_BYTES * at] for slots in tail.slots]
        if tail.parent is not None:
            del tail.parent.children[tail]
        tail.parent = head
        head.children[tail] = None
        tail.keep(at, tail.length)
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
        for tier in range(TIERS):
            if head.slots[tier] is not None or tail.slots[tier] is not None:
                tail.slots[tier] = head.tier_bytes(tier) + tail.tier_bytes(tier)
        tail.set_keys(head.keys + tail.keys)
        if head.parent is not None:
            del head.parent.children[head]
            head.parent.children[tail] = None
        tail.parent = head.parent
        self._heads[tail.head] = tail
        self._forget(head)
        return head.number

    def set_slots(self, run: int, tier: int, at: int, slots: Slots) -> None:
        """Write ``slots`` (int32; -1 = not there) over blocks ``at`` … of one tier. What stood there is the caller's."""
        r = self._runs[run]
        if at < 0 or at + len(slots) > r.length:
            raise ValueError(f"{len(slots)} slots at {at} do not fit a run of {r.length} blocks")
        changed = r.tier_slots(tier)
        changed[at : at + len(slots)] = slots
        r.slots[tier] = changed.tobytes()

    def publish(self, run: int) -> None:
        """WRITING -> ready."""
        self._runs[run].writing = False

    # ---- keeping and letting go ----------------------------------------------------------------------------------------------

    def pin(self, run: int) -> None:
        """Keep the run, and with it everything above it."""
        self._runs[run].pins += 1

    def release(self, run: int) -> int:
        """Take one pin away. Detached runs that nothing keeps any more are let go.

        Returns the run that may be evicted now (``run``, or an ancestor that lost its last child), or -1.
        """
        r = self._runs[run]
        if r.pins <= 0:
            raise ValueError(f"run {run} is not pinned")
        r.pins -= 1
        above = self._let_go(r)
        return above.number if above is not None and above.evictable else -1

    def evict(self, run: int, tier: int, want: int) -> tuple[int, int, int]:
        """Let go of up to ``want`` (at least 1) slots in ``tier``, from the run's tail; blocks that no tier holds any more are cut off.

        Returns (slots let go, or -1 and nothing happens if the run is not evictable; how many leading blocks may still have a
        slot in the tier; the parent if the run is gone and the parent may be evicted now, else -1).
        """
        r = self._runs[run]
        if want < 1:
            raise ValueError(f"cannot evict {want} slots")
        if not r.evictable:
            return -1, r.length, -1
        slots = r.tier_slots(tier)
        held = np.flatnonzero(slots >= 0)[-want:]
        if len(held):
            self._freed[tier].append(slots[held])
            slots[held] = -1
            r.slots[tier] = slots.tobytes()
        left = int(held[0]) if len(held) == want else 0
        self._cut_holes(r)
        if not r.detached:
            return len(held), left, -1
        parent = r.parent
        self._free(r)
        return len(held), 0, parent.number if parent is not None and parent.evictable else -1

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

    def drain_removed(self) -> bytes:
        """The keys of published blocks that left the tree since the last call; empty unless tracked."""
        if not self._removed:
            return b""
        removed, self._removed = self._removed, []
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

    def _new(self, parent: Run | None, keys: bytes) -> Run:
        run = Run(self._unused.pop() if self._unused else len(self._runs), parent, keys)
        self._runs[run.number] = run
        if parent is not None:
            parent.children[run] = None
        return run

    def _forget(self, run: Run) -> None:
        del self._runs[run.number]
        self._unused.append(run.number)

    def _cut_holes(self, run: Run) -> None:
        """Cut off the tail of blocks that are in no tier; of a run without any, only the entry is left."""
        keep = run.blocks_in_some_tier()
        if keep == run.length:
            return
        if self._removed is not None:
            self._removed.append(run.keys[KEY_BYTES * keep :])
        self.blocks -= run.length - keep
        if keep:
            run.keep(0, keep)
        else:
            del self._heads[run.head]
            run.slots = [None] * TIERS
            run.detached = True

    def _leave(self, run: Run) -> None:
        """Out of the table, so that nothing finds it."""
        del self._heads[run.head]
        run.detached = True
        self.blocks -= run.length
        if self._removed is not None and not run.writing:
            self._removed.append(run.keys)

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
                slots = run.tier_slots(tier)
                held = slots[slots >= 0]
                if len(held):
                    self._freed[tier].append(held)
        if run.parent is not None:
            del run.parent.children[run]
        self._forget(run)


def _pick() -> Any:
    from flexkv_core.native import NATIVE

    if NATIVE:
        from flexkv_core.native import _native

        return getattr(_native, "RunIndex", PyRunIndex)
    return PyRunIndex


RunIndex: type[PyRunIndex] = _pick()
