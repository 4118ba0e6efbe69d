"""Stores layer by layer: which layers are written, told by the thread that gives the device its work, and what of them is to be copied next.

A store's bytes are complete only with its last layer. Until then it holds its slots, nothing of it can be found, and whatever goes wrong
ends it as a whole.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from flexkv_core.transfer.plan import TransferOp

LAYER_GROUPS_MIN = 4
"""A store is copied in so many parts at least: a device that is told of all its layers at once still works on the first ones, and a copy of
all would wait for the last."""


class StoreEnd(Enum):
    """Why a store ends before its last layer."""

    ABANDONED = "abandoned"
    LATE = "late"


@dataclass
class LayeredStore:
    """``marks``: one a layer that is written, what :meth:`DeviceCopier.mark` gave after it. ``copied``: layers."""

    op: TransferOp
    deadline: float  # for the next layer, time.monotonic()
    marks: list[object] = field(default_factory=list)
    copied: int = 0
    seconds: float = 0.0
    is_abandoned: bool = False


@dataclass(frozen=True)
class LayerCopy:
    """These layers of a store are to be copied once the device has passed ``after``."""

    store: LayeredStore
    layers: range
    after: object


class LayeredStores:
    """Those under way in one engine. The caller holds one lock around every call.

    Args:
        layer_count: of the device's segments.
        timeout_s: a store that waits longer for its next layer is late.
    """

    def __init__(self, layer_count: int, timeout_s: float) -> None:
        self._layer_count = layer_count
        self._group = max(1, layer_count // LAYER_GROUPS_MIN)
        self._timeout_s = timeout_s
        self._stores: dict[int, LayeredStore] = {}

    def __len__(self) -> int:
        return len(self._stores)

    def begin(self, op: TransferOp, now: float) -> None:
        """A store of which no layer is written yet."""
        self._stores[op.op_id] = LayeredStore(op, now + self._timeout_s)

    def written(self, op_ids: Collection[int], count: int, mark: object, now: float) -> None:
        """The first ``count`` layers are; what has ended is passed over."""
        for op_id in op_ids:
            store = self._stores.get(op_id)
            if store is not None:
                store.marks += [mark] * (min(count, self._layer_count) - len(store.marks))
                store.deadline = now + self._timeout_s

    def abandon(self, op_ids: Collection[int]) -> None:
        """Nothing of these is to be used."""
        for op_id in op_ids:
            if op_id in self._stores:
                self._stores[op_id].is_abandoned = True

    def end(self, op_id: int) -> None:
        """The store was reported; does nothing for others."""
        self._stores.pop(op_id, None)

    def ops(self) -> list[TransferOp]:
        """All that have not ended."""
        return [store.op for store in self._stores.values()]

    def next(self, now: float) -> LayerCopy | tuple[TransferOp, StoreEnd] | None:
        """What is to be done: of the store that waits longest, a copy or its end; None while all wait for layers."""
        for store in self._stores.values():
            if store.is_abandoned:
                return store.op, StoreEnd.ABANDONED
            if store.copied < len(store.marks):
                stop = min(len(store.marks), store.copied + self._group)
                return LayerCopy(store, range(store.copied, stop), store.marks[stop - 1])
            if now > store.deadline:
                return store.op, StoreEnd.LATE
        return None
