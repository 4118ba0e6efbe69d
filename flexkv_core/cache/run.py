"""One run of the Python index: a stretch of consecutive blocks of one sequence. See radix_tree.py."""

from __future__ import annotations

import numpy as np

from flexkv_core.types import KEY_BYTES, Slots

TIERS = 3
SLOT_BYTES = 4
NOT_THERE = -1
ON_ITS_WAY = -2
"""In place of a slot: the block is being written to the tier, by a plan that owns the slot."""


class Run:
    """Keys and slots are immutable ``bytes``, replaced when they change: a match reads them far more often than anything writes them,
    and joining bytes costs half of joining arrays.

    ``children_in[tier]`` counts the children that hold something in the tier, themselves or below them; ``children_busy`` those that are
    pinned, themselves or below them. They are kept right as arrays, pins and links change (:meth:`set_tier`, :meth:`set_pins`,
    :meth:`link`, :meth:`unlink`), and each change climbs only as far as it makes a difference.
    """

    __slots__ = (
        "children",
        "children_busy",
        "children_in",
        "detached",
        "keys",
        "length",
        "number",
        "parent",
        "pins",
        "slots",
        "tail",
        "writing",
    )

    def __init__(self, number: int, keys: bytes) -> None:
        self.number = number
        self.parent: Run | None = None
        self.children: dict[Run, None] = {}  # a set that keeps its order: the same calls give the same ids
        self.slots: list[bytes | None] = [
            None
        ] * TIERS  # int32 a block, negative = not there; None: no block of it is there
        self.children_in = [0] * TIERS
        self.children_busy = 0
        self.pins = 0
        self.writing = True
        self.detached = False
        self.set_keys(keys)

    @property
    def head(self) -> bytes:
        """The key of the first block, which names the run among all."""
        return self.keys[:KEY_BYTES]

    @property
    def busy(self) -> bool:
        """Pinned, or above something that is."""
        return bool(self.pins or self.children_busy)

    def holds(self, tier: int) -> bool:
        """Whether the run or something below it has slots in the tier."""
        return self.slots[tier] is not None or self.children_in[tier] > 0

    def evictable(self, tier: int) -> bool:
        """Whether the run may lose slots in the tier: attached, published, not busy, nothing below it in the tier."""
        return not (self.writing or self.detached or self.busy or self.children_in[tier])

    @property
    def idle(self) -> bool:
        """Out of the tree, and kept by nothing."""
        return self.detached and not self.pins and not self.children

    def set_keys(self, keys: bytes) -> None:
        """Replace the keys, and with them the length."""
        self.keys = keys
        self.length = len(keys) // KEY_BYTES
        self.tail = keys[-KEY_BYTES:]

    def link(self, parent: Run | None) -> None:
        """Become a child."""
        self.parent = parent
        if parent is None:
            return
        parent.children[self] = None
        for tier in range(TIERS):
            if self.holds(tier):
                parent._child_holds(tier, 1)
        if self.busy:
            parent._child_is_busy(1)

    def unlink(self) -> None:
        """Leave the parent."""
        parent, self.parent = self.parent, None
        if parent is None:
            return
        del parent.children[self]
        for tier in range(TIERS):
            if self.holds(tier):
                parent._child_holds(tier, -1)
        if self.busy:
            parent._child_is_busy(-1)

    def set_tier(self, tier: int, slots: bytes | None) -> None:
        """Replace the slots of one tier."""
        before = self.holds(tier)
        self.slots[tier] = slots
        if self.parent is not None and before != self.holds(tier):
            self.parent._child_holds(tier, -1 if before else 1)

    def set_pins(self, pins: int) -> None:
        """Replace the number of pins."""
        before = self.busy
        self.pins = pins
        if self.parent is not None and before != self.busy:
            self.parent._child_is_busy(-1 if before else 1)

    def _child_holds(self, tier: int, change: int) -> None:
        step: Run | None = self
        while step is not None:
            before = step.holds(tier)
            step.children_in[tier] += change
            step = step.parent if before != step.holds(tier) else None

    def _child_is_busy(self, change: int) -> None:
        step: Run | None = self
        while step is not None:
            before = step.busy
            step.children_busy += change
            step = step.parent if before != step.busy else None

    def tier_bytes(self, tier: int) -> bytes:
        """The slots of one tier, as they are kept."""
        slots = self.slots[tier]
        return b"\xff" * (SLOT_BYTES * self.length) if slots is None else slots

    def tier_slots(self, tier: int) -> Slots:
        """A copy of the slots of one tier, shape [length]."""
        slots: Slots = np.frombuffer(self.tier_bytes(tier), dtype=np.int32).copy()
        return slots

    def keep(self, begin: int, end: int) -> None:
        """Forget all blocks but ``begin`` … ``end - 1``."""
        self.set_keys(self.keys[KEY_BYTES * begin : KEY_BYTES * end])
        self.slots = [
            None if slots is None else slots[SLOT_BYTES * begin : SLOT_BYTES * end] for slots in self.slots
        ]

    def first_hole(self, begin: int) -> int:
        """The first block from ``begin`` on that no tier holds, or the length."""
        held = np.zeros(self.length - begin, dtype=bool)
        for tier in range(TIERS):
            if self.slots[tier] is not None:
                held |= self.tier_slots(tier)[begin:] >= 0
        holes = np.flatnonzero(~held)
        return begin + int(holes[0]) if len(holes) else self.length

    def agreement(self, keys: bytes | memoryview, position: int, limit: int) -> int:
        """How many of the first ``limit`` keys equal the query's from ``position`` on; the first one is known to be equal."""
        low, high = 1, limit
        while low < high:
            middle = (low + high + 1) // 2
            end = KEY_BYTES * middle
            theirs = KEY_BYTES * position + end
            if self.keys[end - KEY_BYTES : end] == keys[theirs - KEY_BYTES : theirs]:
                low = middle
            else:
                high = middle - 1
        return low
