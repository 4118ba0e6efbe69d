"""Looks over the shoulder of a manager at its storage process: which SSD slot was reported as durable, with which key."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt

from flexkv_core import ssd_link
from flexkv_core.storage.base import BlockStatus, SsdSpec, key_words
from flexkv_core.storage.catalog import Table
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.ring import CommandKind
from flexkv_core.transfer.storage_process import StorageProcess
from flexkv_core.transfer.supervisor import Progress
from flexkv_core.types import Slots


class Observer:
    """Told what happens, on the thread on which it does; a slot's events come in their order. What is not overridden is ignored."""

    process: ObservedProcess | None = None

    def will_write(self, slots: Slots) -> None:
        """The slots' blocks were given up: others will be written there, or they are forgotten."""

    def did_write(self, slots: Slots, keys: npt.NDArray[np.uint64]) -> None:
        """The blocks (uint64 [n, 2]) were reported as durable; the manager is told next."""

    def found_corrupt(self, slots: Slots) -> None:
        """A read or the scrubber found other bytes than were written."""


class ObservedProcess(StorageProcess):
    """A storage process that tells an :class:`Observer`."""

    def __init__(
        self,
        observer: Observer,
        spec: SsdSpec,
        host: HostSegment,
        on_progress: Callable[[Progress], None],
        on_corrupt: Callable[[Slots], None],
        on_tick: Callable[[], None],
        cpus: Collection[int] | None,
    ) -> None:
        super().__init__(spec, host, self._observe, self._observe_corrupt, on_tick, cpus)
        self._observer = observer
        self._tell = on_progress
        self._tell_corrupt = on_corrupt
        self._asked: dict[int, tuple[Slots, npt.NDArray[np.uint64]]] = {}
        self._asking = threading.Lock()
        observer.process = self

    @property
    def table(self) -> Table:
        """The catalogue's records, as the storage process has them now."""
        return self._table

    def read(self, op: int, keys: bytes, ssd_slots: Slots, host_slots: Slots) -> bool:
        """As the base; remembers the slots."""
        self._remember(op, ssd_slots, keys)
        return self._accepted(op, super().read(op, keys, ssd_slots, host_slots))

    def write(self, op: int, keys: bytes, parents: bytes, ssd_slots: Slots, host_slots: Slots) -> bool:
        """As the base; what the slots held is given up before the storage process can know."""
        self._observer.will_write(ssd_slots)
        self._remember(op, ssd_slots, keys)
        return self._accepted(op, super().write(op, keys, parents, ssd_slots, host_slots))

    def forget(self, ssd_slots: Slots, timeout_s: float = 0.0) -> bool:
        """As the base."""
        self._observer.will_write(ssd_slots)
        return super().forget(ssd_slots, timeout_s)

    def _remember(self, op: int, slots: Slots, keys: bytes) -> None:
        with self._asking:
            self._asked[op] = (slots.copy(), key_words(keys))

    def _accepted(self, op: int, accepted: bool) -> bool:
        if not accepted:
            with self._asking:
                del self._asked[op]
        return accepted

    def _observe(self, progress: Progress) -> None:
        if progress.kind in (CommandKind.READ, CommandKind.WRITE):
            with self._asking:
                slots, keys = self._asked.pop(progress.op) if progress.finished else self._asked[progress.op]
            ok = progress.indexes[progress.statuses == BlockStatus.OK]
            corrupt = progress.indexes[progress.statuses == BlockStatus.CORRUPT]
            if progress.kind is CommandKind.WRITE:
                self._observer.did_write(slots[ok], keys[ok])
            elif len(corrupt):
                self._observer.found_corrupt(slots[corrupt])
        self._tell(progress)

    def _observe_corrupt(self, slots: Slots) -> None:
        self._observer.found_corrupt(slots)
        self._tell_corrupt(slots)


def install(observer: Observer, write_bytes: int) -> None:
    """Every manager that this process makes from now on is observed, and writes behind in plans of ``write_bytes``: small ones make
    many commits, and many places to be killed at."""

    def make(
        spec: SsdSpec,
        host: HostSegment,
        on_progress: Callable[[Progress], None],
        on_corrupt: Callable[[Slots], None],
        on_tick: Callable[[], None],
        cpus: Collection[int] | None,
    ) -> ObservedProcess:
        return ObservedProcess(observer, spec, host, on_progress, on_corrupt, on_tick, cpus)

    vars(ssd_link).update(StorageProcess=make, WRITE_BYTES=write_bytes)
