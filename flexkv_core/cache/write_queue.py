"""Which runs wait to be written to the SSD, oldest first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class WriteQueue:
    """Runs with an estimate of how many of their blocks wait.

    A hint, not the truth: that is in the tree, and whoever takes a run from here looks there. So a run that is gone, or written
    already, does no harm; only what is missing here would never be written. Each operation costs O(1).
    """

    def __init__(self) -> None:
        self._runs: OrderedDict[int, int] = OrderedDict()
        self.blocks = 0
        """Blocks that wait, at most."""

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, run: int, blocks: int) -> None:
        """At the end; a run that waits already keeps its place and waits with so many more."""
        if blocks > 0:
            self._runs[run] = self._runs.get(run, 0) + blocks
            self.blocks += blocks

    def discard(self, run: int) -> int:
        """The run does not wait any more; returns with how many blocks it did."""
        blocks = self._runs.pop(run, 0)
        self.blocks -= blocks
        return blocks

    def subtract(self, run: int, blocks: int) -> None:
        """Some of a run's blocks are being written."""
        waiting = self._runs.get(run, 0)
        blocks = min(blocks, waiting)
        self.blocks -= blocks
        if waiting:
            self._runs[run] = waiting - blocks

    def split(self, head: int, head_blocks: int, tail: int) -> None:
        """``head`` was cut off ``tail``: both wait if that did, the head first of all, since what follows needs it."""
        waiting = self._runs.get(tail)
        if waiting is None:
            return
        moved = min(waiting, head_blocks)
        self._runs[tail] = waiting - moved
        self._runs[head] = moved
        self._runs.move_to_end(head, last=False)

    def merge(self, absorbed: int, run: int) -> None:
        """``absorbed`` is a part of ``run`` now."""
        waiting = self._runs.pop(absorbed, None)
        if waiting is not None:
            self._runs[run] = self._runs.get(run, 0) + waiting

    def oldest(self) -> int | None:
        """The run that waits longest."""
        return next(iter(self._runs), None)

    def runs(self) -> Iterable[int]:
        """All, the one that waits longest first. The queue must not change meanwhile."""
        return self._runs

    def clear(self) -> None:
        """Nothing waits."""
        self._runs.clear()
        self.blocks = 0
