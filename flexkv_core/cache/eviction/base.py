"""The contract of an eviction policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence


class EvictionPolicy(ABC):
    """An order over runs (by their ids) that says which goes first.

    The engine owns the tree and knows what may go; the policy knows only the order. What stands first in the order but may not go
    now (it is leased, or has children) is *parked*: taken out of the way until the engine says that it may go after all. So each
    entry is stepped over once, and the cost of an eviction does not grow with the number of runs. A policy holds every run that
    is published, parked or not. Not thread-safe; the caller holds a lock.
    """

    @abstractmethod
    def add(self, run: int) -> None:
        """A run was published, or split off one that was. It must be unknown so far."""

    @abstractmethod
    def remove(self, run: int) -> None:
        """The run left the tree. Unknown runs are ignored: a run that was never published may leave too."""

    @abstractmethod
    def touch(self, path: Sequence[int]) -> None:
        """Runs were used, root first. A child must become a better victim than its parent. Unknown runs are ignored."""

    @abstractmethod
    def victims(self, limit: int) -> list[int]:
        """Up to ``limit`` runs that should go first, the first of all first, still in the order; none when all that is left is parked."""

    @abstractmethod
    def park(self, run: int) -> None:
        """A victim may not go now: leave it out of the order until :meth:`unpark` or a touch."""

    @abstractmethod
    def unpark(self, run: int) -> None:
        """The run may go now. If it was parked it becomes the first victim, as it was when it was parked; else nothing changes."""

    @abstractmethod
    def members(self) -> tuple[Iterable[int], Iterable[int]]:
        """The runs in the order, best victim first, and the parked ones; for the recount."""
