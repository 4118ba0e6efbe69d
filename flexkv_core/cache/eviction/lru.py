"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from flexkv_core.cache.eviction.base import EvictionPolicy


class LRUPolicy(EvictionPolicy):
    """The run whose last use is longest ago goes first.

    An OrderedDict is a linked list: the oldest entry, a move to the newest end and a removal each cost O(1). (A plain dict would
    not do: finding its first entry walks over all that were deleted before it.)
    """

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()
        self._parked: set[int] = set()

    def add(self, run: int) -> None:
        """Newest."""
        assert run not in self._order, f"run {run} is in the order already"
        assert run not in self._parked, f"run {run} is parked already"
        self._order[run] = None

    def remove(self, run: int) -> None:
        """Out of the order, or of the parked."""
        if run in self._order:
            del self._order[run]
        else:
            self._parked.discard(run)

    def touch(self, path: Sequence[int]) -> None:
        """Each run becomes the newest in turn, the deepest first."""
        order = self._order
        for run in reversed(path):
            if run in order:
                order.move_to_end(run)
            elif run in self._parked:
                self._parked.remove(run)
                order[run] = None

    def victims(self, limit: int) -> list[int]:
        """The oldest."""
        return list(islice(self._order, limit))

    def park(self, run: int) -> None:
        """Aside, without a place in the order."""
        del self._order[run]
        self._parked.add(run)

    def unpark(self, run: int) -> None:
        """Back, as the oldest."""
        if run in self._parked:
            self._parked.remove(run)
            self._order[run] = None
            self._order.move_to_end(run, last=False)

    def members(self) -> tuple[Iterable[int], Iterable[int]]:
        """Oldest first; the parked ones in no order."""
        return self._order, self._parked
