"""What came to a tier and what left it, in the order in which it happened: replayed, it gives what each tier holds now."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from flexkv_core.cache.radix_tree import PyRunIndex
from flexkv_core.types import KEY_BYTES, Tier

EVENTS_MAX = 1 << 20
"""Events that are kept for who takes them; beyond it the oldest go. A warm start makes one for each run: a bounded number as well."""


class EventKind(Enum):
    """What happened."""

    STORED = "stored"
    REMOVED = "removed"


@dataclass(frozen=True)
class TierEvent:
    """Blocks came to a tier, or left it; they may be in others.

    ``keys``: 16 bytes a block. Stored: each follows the one before it, and the first follows ``parent`` (16 zero bytes: it begins a sequence).
    Removed: in no order, and ``parent`` is empty.
    """

    kind: EventKind
    tier: Tier
    keys: bytes
    parent: bytes = b""


class TierEvents:
    """Collects events until they are taken. Does nothing unless ``enabled``. Whoever changes a tier's content says what came, at
    once; what left, the index knows.

    Args:
        index: tracks what is removed if ``enabled``.
    """

    def __init__(self, index: PyRunIndex, tiers: Iterable[Tier], enabled: bool) -> None:
        self.enabled = enabled
        self._index = index
        self._tiers = tuple(tiers)
        # Made into objects only when they are taken: a warm start puts down a hundred thousand.
        self._log: deque[tuple[EventKind, Tier, bytes, bytes]] = deque(maxlen=EVENTS_MAX)

    def stored_runs(self, tier: Tier, runs: Iterable[int]) -> None:
        """All blocks of these runs, of which each follows the one before it, are in a tier now."""
        if not self.enabled:
            return
        self._collect_removed()
        parts = [self._index.segment(run, tier, 0, self._index.info(run)[1]) for run in runs]
        if parts:
            self._log.append((EventKind.STORED, tier, b"".join(keys for _, keys, _ in parts), parts[0][0]))

    def stored(self, tier: Tier, keys: bytes, parents: bytes, which: npt.NDArray[np.bool_]) -> None:
        """Of blocks with these keys and the keys before them (16 * n bytes each), ``which`` (bool [n]) are in a tier now."""
        if not self.enabled or not which.any():
            return
        self._collect_removed()
        own, above = (np.frombuffer(raw, "V16")[which] for raw in (keys, parents))
        cuts = np.flatnonzero(above[1:] != own[:-1]) + 1
        for part, before in zip(np.split(own, cuts), np.split(above, cuts), strict=True):
            self._log.append((EventKind.STORED, tier, part.tobytes(), before[0].tobytes()))

    def loaded(self, tier: Tier, runs: Iterable[int]) -> None:
        """A warm start brought these runs, parents before children. Costs about 1 us a run."""
        if not self.enabled:
            return
        segment, info, append = self._index.segment, self._index.info, self._log.append
        for run in runs:
            before, keys, _ = segment(run, tier, 0, info(run)[1])
            append((EventKind.STORED, tier, keys, before))

    def removed(self, tier: Tier, key: bytes) -> None:
        """A tier lost a block by another way than the index's."""
        if self.enabled:
            self._collect_removed()
            self._log.append((EventKind.REMOVED, tier, key, b""))

    def take(self, blocks_max: int) -> list[TierEvent]:
        """The oldest events: as many as have about ``blocks_max`` blocks together, but at least one."""
        self._collect_removed()
        taken, blocks = [], 0
        while self._log and blocks < blocks_max:
            kind, tier, keys, parent = self._log.popleft()
            taken.append(TierEvent(kind, tier, keys, parent))
            blocks += len(keys) // KEY_BYTES
        return taken

    def clear(self) -> None:
        """All tiers are empty now; whoever takes events is told so in another way."""
        self._collect_removed()
        self._log.clear()

    def _collect_removed(self) -> None:
        if not self.enabled:
            return
        for tier in self._tiers:
            if keys := self._index.drain_removed(tier):
                self._log.append((EventKind.REMOVED, tier, keys, b""))
