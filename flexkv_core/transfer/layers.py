"""How far loads that are delivered layer by layer have come: told by the thread that copies, awaited by the threads that read the layers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

ENDED_MAX = 1024
"""Loads that are remembered after their end: a reader may ask for the first layer only when the last one is there."""


class LayerStatus(Enum):
    """What a thread that waited for layers learns."""

    READY = "ready"  # they are there
    FAILED = "failed"  # a block did not or will not arrive; the op's result says which
    LATE = "late"  # not there yet when the time was over


@dataclass
class _Load:
    checked: bool = False
    layers: list[object] = field(
        default_factory=list
    )  # what the copier says of each layer that was published
    failed: bool = False
    ended: bool = False

    def reached(self, count: int) -> bool:
        return len(self.layers) >= count if count else self.checked


class LayerProgress:
    """Of the layerwise loads of one engine. Every method may be called from any thread.

    A load is FAILED as soon as one of its blocks is known to be missing, however many layers of the others are there.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._loads: OrderedDict[int, _Load] = OrderedDict()

    def begin(self, op_id: int) -> None:
        """A load was submitted."""
        with self._changed:
            self._loads[op_id] = _Load()

    def checked(self, op_id: int) -> None:
        """All blocks are whole in host memory."""
        with self._changed:
            self._loads[op_id].checked = True
            self._changed.notify_all()

    def publish(self, op_id: int, layer: object) -> None:
        """The next layer's copies were given to the device; ``layer`` is for :meth:`DeviceCopier.follow`."""
        with self._changed:
            self._loads[op_id].layers.append(layer)
            self._changed.notify_all()

    def fail(self, op_id: int) -> None:
        """A block of the load will be missing."""
        with self._changed:
            self._loads[op_id].failed = True
            self._changed.notify_all()

    def end(self, op_id: int, *, whole: bool) -> None:
        """The load was reported; ``whole``: with every block. Does nothing for an op that was not begun here."""
        with self._changed:
            load = self._loads.get(op_id)
            if load is None:
                return
            load.ended = True
            load.failed |= not whole
            self._loads.move_to_end(op_id)
            while len(self._loads) > ENDED_MAX:
                oldest, kept = next(iter(self._loads.items()))
                if not kept.ended:
                    break
                del self._loads[oldest]
            self._changed.notify_all()

    def wait(self, op_id: int, count: int, timeout_s: float) -> tuple[LayerStatus, object]:
        """Wait at most ``timeout_s`` for the first ``count`` layers, for the check with 0. With READY, what the copier said of the last of
        them, or None where there is nothing left to follow. An op that is not known has FAILED."""
        with self._changed:
            load = self._loads.get(op_id)
            if load is None:
                return LayerStatus.FAILED, None
            self._changed.wait_for(lambda: load.failed or load.ended or load.reached(count), timeout_s)
            if load.failed:
                return LayerStatus.FAILED, None
            if not load.ended and not load.reached(count):
                return LayerStatus.LATE, None
            follows = count and not load.ended
            return LayerStatus.READY, load.layers[count - 1] if follows else None
