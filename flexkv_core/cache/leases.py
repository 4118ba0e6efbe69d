"""What each live plan keeps, and slots that wait for the plans of their time to end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexkv_core.cache.plans import Lease
from flexkv_core.types import Slots, Tier


@dataclass(frozen=True, eq=False)
class Reading:
    """A get under way: its deepest run; its last block lies ``skip`` blocks before the end of that run (which stays, see
    :meth:`PyRunIndex.fill`); how many blocks it covers, and the host slots of its own among them (-1: the tree's)."""

    run: int
    skip: int
    own_slots: Slots


@dataclass(frozen=True)
class Putting:
    """A put under way: the deepest run of its blocks, and how many blocks there are from there upwards."""

    run: int
    blocks: int


@dataclass(frozen=True)
class Stretch:
    """Consecutive blocks of a run that are being written to the SSD; the last lies ``skip`` blocks before the end of the run."""

    run: int
    skip: int
    blocks: int


@dataclass(frozen=True, eq=False)
class Writing:
    """Write-behind under way: each stretch is pinned once."""

    stretches: tuple[Stretch, ...]
    slots: Slots


class Leases:
    """Live plans by the id of their lease."""

    def __init__(self) -> None:
        self.gets: dict[int, Reading] = {}
        self.puts: dict[int, Putting] = {}
        self.writes: dict[int, Writing] = {}
        self._last = 0
        self._waiting: list[tuple[int, Tier, Slots]] = []  # newest lease that may use the slots; tier; slots

    def __len__(self) -> int:
        return len(self.gets) + len(self.puts) + len(self.writes)

    def new(self) -> Lease:
        """An id that was never used."""
        self._last += 1
        return Lease(self._last)

    def park(self, tier: Tier, slots: Slots) -> None:
        """Slots that left the tree while plans of now may still use them."""
        self._waiting.append((self._last, tier, slots))

    def unused(self) -> Iterator[tuple[Tier, Slots]]:
        """Parked slots whose plans have all ended, each once."""
        if not self._waiting:
            return
        oldest = min(
            (lease for table in (self.gets, self.puts, self.writes) for lease in table),
            default=self._last + 1,
        )
        ready = [entry for entry in self._waiting if entry[0] < oldest]
        self._waiting = [entry for entry in self._waiting if entry[0] >= oldest]
        for _, tier, slots in ready:
            yield tier, slots

    def pinned_runs(self) -> list[int]:
        """The run of each pin, repeated for each; for the recount."""
        runs = [get.run for get in self.gets.values()] + [put.run for put in self.puts.values()]
        return runs + [stretch.run for write in self.writes.values() for stretch in write.stretches]

    def own_slots(self, tier: Tier) -> list[Slots]:
        """Slots that plans have and the tree has not, negative ones among them; for the recount."""
        parked = [slots for _, of, slots in self._waiting if of is tier]
        if tier is Tier.HOST:
            return parked + [get.own_slots for get in self.gets.values()]
        return parked + [write.slots for write in self.writes.values()] if tier is Tier.SSD else parked
