"""One run of the Python index: a stretch of consecutive blocks of one sequence. See radix_tree.py."""

from __future__ import annotations

import numpy as np

from flexkv_core.types import KEY_BYTES, Slots

TIERS = 3
SLOT_BYTES = 4


class Run:
    """Keys and slots are immutable ``bytes``, replaced when they change: a match reads them far more often than anything writes them,
    and joining bytes costs half of joining arrays.
    """

    __slots__ = (
        "children",
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

    def __init__(self, number: int, parent: Run | None, keys: bytes) -> None:
        self.number = number
        self.parent = parent
        self.children: dict[Run, None] = {}  # a set that keeps its order: the same calls give the same ids
        self.slots: list[bytes | None] = [
            None
        ] * TIERS  # int32 a block, -1 = not there; None: no block was ever there
        self.pins = 0
        self.writing = True
        self.detached = False
        self.set_keys(keys)

    @property
    def head(self) -> bytes:
        """The key of the first block, which names the run among all."""
        return self.keys[:KEY_BYTES]

    @property
    def evictable(self) -> bool:
        """Attached, published, not pinned, without children."""
        return not (self.writing or self.detached or self.pins or self.children)

    @property
    def idle(self) -> bool:
        """Out of the tree, and kept by nothing."""
        return self.detached and not self.pins and not self.children

    def set_keys(self, keys: bytes) -> None:
        """Replace the keys, and with them the length."""
        self.keys = keys
        self.length = len(keys) // KEY_BYTES
        self.tail = keys[-KEY_BYTES:]

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

    def blocks_in_some_tier(self) -> int:
        """How many blocks are left when the tail of blocks that no tier holds is cut off."""
        keep = 0
        for tier in range(TIERS):
            if self.slots[tier] is not None:
                held = np.flatnonzero(self.tier_slots(tier) >= 0)
                keep = max(keep, int(held[-1]) + 1 if len(held) else 0)
        return keep

    def agreement(self, keys: bytes, position: int, limit: int) -> int:
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
