"""What a transfer is: numbers only, so that it crosses a process boundary as a few flat buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import DeviceSegments
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.layers import LayerStatus
from flexkv_core.types import KEY_BYTES, BlockIds, Direction, Slots


class Delivery(Enum):
    """In which order an op brings its bytes."""

    WHOLE = "whole"  # block by block, checked on the way; the device may read when the op is reported
    # Checked first, then layer by layer: the device may read a layer while the next ones are still coming. A STORE: each layer as soon as
    # it is written, the checksums behind the last.
    LAYERWISE = "layerwise"
    TENTATIVE = "tentative"  # layer by layer at once, checked last: for a reader whose results are dropped if the op's say so


@dataclass(frozen=True)
class TransferOp:
    """Copies between device blocks and host slots.

    Attributes:
        op_id: unique in the manager that made it.
        direction: LOAD copies slot -> device, STORE device -> slot.
        keys: ``16 * n`` bytes, what each slot holds or will hold; seeds the checksums.
        slots: int32 [n], host slots.
        blocks: int64 [n * blocks_per_slot], device blocks, those of slot *i* at ``i * blocks_per_slot``; in a LOAD, -1
            leaves that part of the slot out.
        awaited: bool [n], in a LOAD: slots that are being read from a lower tier; each is copied when the segment's ``arrivals`` say so,
            unless delivery is WHOLE when all have arrived.
        delivery: of a LOAD. A STORE is WHOLE, or LAYERWISE where somebody says when each layer is written, see
            :meth:`~flexkv_core.transfer.engine.TransferEngine.layers_written`.
    """

    op_id: int
    direction: Direction
    keys: bytes
    slots: Slots
    blocks: BlockIds
    awaited: npt.NDArray[np.bool_] | None = None
    delivery: Delivery = Delivery.WHOLE

    def __post_init__(self) -> None:
        assert len(self.keys) == KEY_BYTES * len(self.slots), (len(self.keys), len(self.slots))
        assert len(self.slots) > 0
        assert len(self.blocks) % len(self.slots) == 0, (len(self.blocks), len(self.slots))
        assert self.awaited is None or len(self.awaited) == len(self.slots)
        assert self.delivery is not Delivery.TENTATIVE or self.direction is Direction.LOAD

    def part(self, indices: npt.NDArray[np.intp]) -> TransferOp:
        """The copies of some slots, in the order of ``indices``; nothing of it is awaited."""
        keys = np.frombuffer(self.keys, np.uint8).reshape(-1, KEY_BYTES)[indices].tobytes()
        blocks = self.blocks.reshape(len(self.slots), -1)[indices].ravel()
        slots = self.slots[indices]
        return TransferOp(self.op_id, self.direction, keys, slots, blocks, delivery=self.delivery)


class OpStatus(Enum):
    """How an op ended."""

    DONE = "done"  # every block; see OpResult.ok
    FAILED = "failed"  # nothing may be relied on
    CANCELLED = "cancelled"  # never started


@dataclass(frozen=True)
class OpResult:
    """The end of an op.

    ``ok`` is bool [n]: which blocks arrived whole (a LOAD leaves nothing of a block whose checksum does not match); all False
    unless ``status`` is DONE. ``seconds`` is the time the copy took, without its wait in the queue. ``wrong`` is bool [n] where the op
    compared instead of copying: the blocks that were looked at and are not what they should be.
    """

    op_id: int
    status: OpStatus
    ok: npt.NDArray[np.bool_]
    seconds: float = 0.0
    wrong: npt.NDArray[np.bool_] | None = None


class Executor(Protocol):
    """Runs ops somewhere: on threads of this process, or on an engine's workers.

    ``start`` comes first; ``host`` is the tier's memory. It comes again, with another segment, when the tiers' server was started again: what
    was not handed on is reported as cancelled, what runs elsewhere is reported when it ends. ``submit`` never blocks and takes ownership: it reports each op exactly once
    through ``on_result``, on any thread, possibly before it returns. ``cancel`` drops an op that has not started; its report still
    comes. After ``close`` returns no copy runs any more and every op has been reported.
    """

    def start(self, host: HostSegment, on_result: Callable[[OpResult], None]) -> None:
        """Begin to take ops."""

    def submit(self, op: TransferOp) -> None:
        """Take ``op``."""

    def cancel(self, op_id: int) -> None:
        """Drop an op that has not started."""

    def close(self) -> None:
        """End."""


@runtime_checkable
class LayerwiseExecutor(Executor, Protocol):
    """An executor whose copies run in this process, so that their layers can be awaited here."""

    def wait_layers(self, op_id: int, count: int, timeout_s: float) -> LayerStatus:
        """See :meth:`~flexkv_core.transfer.engine.TransferEngine.wait_layers`."""


STORE_PIECE_BYTES = 16 << 20
"""``store_piece_bytes`` of a copier in the host's memory: about 2 ms at 8 GB/s."""


class DeviceCopier(Protocol):
    """Moves blocks between one rank's device memory and the slots of a host segment. Made by the kernels' package.

    One thread calls ``gather`` and ``scatter`` at a time; where ``concurrent``, several may call ``scatter`` for different blocks. Both
    raise TransferError when the copy as a whole failed. A store comes in pieces of about ``store_piece_bytes``: a load waits at most for
    one of them.
    """

    segments: DeviceSegments
    concurrent: bool
    store_piece_bytes: int

    def bind(self, host: HostSegment, shard: int) -> None:
        """Use ``host`` from now on; this rank's bytes are shard ``shard`` of every slot. Pins memory where the device needs it."""

    def mark(self) -> object:
        """A point in the device's work: everything that the engine has submitted so far, on the calling thread's stream."""

    def gather(
        self, op: TransferOp, after: object, layers: range | None = None
    ) -> npt.NDArray[np.bool_] | None:
        """Device blocks -> slots, once the device has passed ``after``; writes the slots' checksums. Returns when the bytes are there: bool
        [n], False for a slot whose bytes must not be used; None: all may be.

        With ``layers``, of these layers of ``segments`` alone. A store layer by layer calls it for layer 0 and the next ones up to the last,
        in order; only with the last ones all bytes are there, the checksums written, and what is returned means anything."""

    def scatter(self, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        """Slots -> device blocks, once the device has passed ``after``; bool [n], False for a block whose bytes do not match their
        checksum (nothing of it stays in its device blocks). With ``verify`` False nothing is checked. Returns when the device may read the blocks."""

    def scatter_layers(self, op: TransferOp, after: object, on_layer: Callable[[object], None]) -> None:
        """Slots -> device blocks, once the device has passed ``after``, layer after layer of ``segments``: all blocks of layer 0, then of
        layer 1, …; checks nothing. ``on_layer`` is called once a layer, in order, on this thread, when its copies have been given to the
        device: with what :meth:`follow` takes, which stands for all layers so far (None where nothing is left to wait for). What it raises ends the copy. Returns when the device may read all of them, or when
        nothing writes to the blocks any more."""

    def follow(self, layer: object) -> None:
        """What the calling thread, the engine's, gives the device from now on runs after the copies of a layer. Does not block."""

    def close(self) -> None:
        """Give back what ``bind`` took; a second call does nothing. No copy runs any more, and ``host`` is still mapped."""
