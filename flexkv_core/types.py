"""Words shared by every part: tiers, directions, and the arrays that cross boundaries.

``keys`` of *n* blocks are one bytes-like object of ``16 * n`` bytes; ``keys[16 * i : 16 * i + 16]`` is the BlockKey of block *i*.
Keys are chained: a BlockKey names its block and everything before it, so two sequences that agree in key *i* agree in all
earlier ones.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

KEY_BYTES = 16

Slots: TypeAlias = npt.NDArray[np.int32]
"""Slot ids of one tier, shape [blocks], -1 where the tier does not hold the block."""

BlockIds: TypeAlias = npt.NDArray[np.int64]
"""Block ids in the engine's paged cache, shape [blocks]."""

TokenIds: TypeAlias = npt.NDArray[np.integer[Any]]
"""Token ids, int32 or int64, shape [tokens], C-contiguous."""


class Tier(IntEnum):
    """Where a block's bytes may lie below the device, fastest first. The value indexes a run's slot arrays."""

    HOST = 0
    SSD = 1
    REMOTE = 2


class Direction(Enum):
    """Which way a transfer moves bytes, seen from the engine."""

    LOAD = "load"  # slot -> device
    STORE = "store"  # device -> slot
