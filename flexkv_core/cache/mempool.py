"""Fixed-size slots of one tier: which are free, which are taken."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flexkv_core.types import Slots

_FREE = -1

# Up to here a loop is quicker than ten calls of numpy (1 µs each), and single blocks are what decoding and eviction return.
_FEW = 16


class Mempool:
    """A stack of free slot ids.

    Slots come out ascending from a fresh pool, and slots that were returned together come out together in the order in which they
    were returned: neighbours in a tier can then be moved by one I/O. Not thread-safe; the caller holds a lock.
    """

    def __init__(self, capacity: int) -> None:
        """``capacity``: number of slots, ids 0 … capacity - 1; at most 2**31 - 1."""
        assert 0 <= capacity < 2**31, f"capacity of a pool must be in [0, 2**31), got {capacity}"
        self.capacity = capacity
        self._stack: Slots = np.arange(capacity - 1, -1, -1, dtype=np.int32)
        self._free = capacity
        # Per slot: _FREE, or any value >= 0 while taken. free() writes positions here to find a slot that is named twice.
        self._mark: Slots = np.full(capacity, _FREE, dtype=np.int32)
        self._mark_view = memoryview(self._mark.data)
        self._stack_view = memoryview(self._stack.data)
        self._bad: set[int] = set()  # quarantined and still in use
        self._retired: set[int] = set()  # quarantined and returned: never handed out again

    @property
    def free_count(self) -> int:
        """Slots that can be allocated now."""
        return self._free

    @property
    def used_count(self) -> int:
        """Slots that are taken; those in quarantine count as long as somebody has them."""
        return self.capacity - self._free - len(self._retired)

    @property
    def quarantined_count(self) -> int:
        """Slots that are not handed out any more."""
        return len(self._bad) + len(self._retired)

    def allocate(self, count: int) -> Slots | None:
        """Take ``count`` slots, all or nothing.

        Returns an int32 array of shape [count] that the caller owns, or None (and nothing changes) when fewer are free.
        """
        assert count >= 0, f"cannot allocate {count} slots"
        if count > self._free:
            return None
        top = self._free
        slots: Slots = self._stack[top - count : top][::-1].copy()
        self._free = top - count
        if count <= _FEW:
            for slot in slots.tolist():
                self._mark_view[slot] = 0
        else:
            lowest, highest = int(slots.min()), int(slots.max())
            # They are all different, so if they fill their range they are the range; a slice is ten times quicker than a list of places.
            whole = highest - lowest == count - 1
            self._mark[slice(lowest, highest + 1) if whole else slots.astype(np.intp)] = 0
        return slots

    def free(self, slots: Slots) -> None:
        """Return slots, int32 of shape [n]. Each must be taken and be named once: anything else is a programmer's error."""
        if self._bad:
            slots = self._retire(slots)
        if len(slots) <= _FEW:
            self._free_few(slots.tolist())
        else:
            self._free_many(slots)

    def _free_few(self, slots: list[int]) -> None:
        mark, stack, top = self._mark_view, self._stack_view, self._free
        for slot in reversed(slots):
            assert 0 <= slot < self.capacity, f"slot {slot} was returned to a pool of {self.capacity}"
            assert mark[slot] != _FREE, f"slot {slot} was returned and is free"
            mark[slot] = _FREE
            stack[top] = slot
            top += 1
        self._free = top

    def _free_many(self, slots: Slots) -> None:
        mark, count = self._mark, len(slots)
        lowest, highest = int(slots.min()), int(slots.max())
        assert lowest >= 0, f"slot {lowest} was returned to a pool"
        assert highest < self.capacity, f"slot {highest} was returned to a pool of {self.capacity}"
        if highest - lowest == count - 1 and bool((slots[1:] > slots[:-1]).all()):
            places: slice | npt.NDArray[np.intp] = slice(lowest, highest + 1)
            assert int(mark[places].min()) != _FREE, "a slot that is free was returned"
        else:
            places = slots.astype(np.intp)  # once, not in each of the following lines
            assert int(mark.take(places).min()) != _FREE, "a slot that is free was returned"
            positions = np.arange(count, dtype=np.int32)
            mark[places] = positions
            assert np.array_equal(mark.take(places), positions), "a slot was returned twice in one call"
        mark[places] = _FREE
        self._stack[self._free : self._free + count] = slots[::-1]
        self._free += count

    def quarantine(self, slot: int) -> None:
        """Never hand out this slot, which is taken, again; whoever has it returns it as usual."""
        assert 0 <= slot < self.capacity, f"slot {slot} of a pool of {self.capacity}"
        if slot not in self._retired:
            assert self._mark_view[slot] != _FREE, f"slot {slot} is free"
            self._bad.add(slot)

    def claim(self, slots: Slots) -> None:
        """Take these very slots (int32 [n], all free, each once) instead of any. Costs time in proportion to the capacity."""
        places = slots.astype(np.intp)
        assert not len(slots) or (slots.min() >= 0 and slots.max() < self.capacity), (
            "slots that the pool does not have"
        )
        assert (self._mark[places] == _FREE).all(), "slots that are taken already"
        self._mark[places] = 0
        left = self._stack[: self._free]
        left = left[self._mark[left] == _FREE]
        assert len(left) == self._free - len(slots), "slots that were named twice, or are in quarantine"
        self._stack[: len(left)] = left
        self._free = len(left)

    def _retire(self, slots: Slots) -> Slots:
        """Keeps back what is in quarantine; returns the others."""
        bad = np.isin(slots, list(self._bad))
        for slot in slots[bad].tolist():
            assert self._mark_view[slot] != _FREE, f"slot {slot} was returned and is free"
            self._mark_view[slot] = _FREE
            self._bad.remove(slot)
            self._retired.add(slot)
        return slots[~bad]

    def taken(self) -> npt.NDArray[np.bool_]:
        """Which slots somebody has, bool of shape [capacity]; for the recount."""
        taken: npt.NDArray[np.bool_] = self._mark != _FREE
        stacked = np.ones(self.capacity, dtype=bool)
        stacked[self._stack[: self._free]] = False
        stacked[list(self._retired)] = False
        assert np.array_equal(taken, stacked), "the free stack and the marks of a pool differ"
        return taken
