"""TransferEngine: runs ops of one rank on a thread of its own, loads before stores.

A request waits for its load; nobody waits for a store. So a load that arrives while a large store runs is let in between two of the
store's pieces. A load whose slots are still being filled from a lower tier is copied slot by slot as they arrive, while other ops run.
A thread that has nothing to do but to wait for a load may copy pieces of it itself, see :meth:`TransferEngine.help`.
A load may be delivered layer by layer, checked in host memory before or after; see :meth:`TransferEngine.wait_layers`. A store may be copied
layer by layer while the device computes the next ones; see :meth:`TransferEngine.layers_written`.
The queue is bounded: what does not fit is reported as failed at once, which is a miss.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from flexkv_core.storage.memory import HostSegment, arrival_mark
from flexkv_core.transfer.layered_stores import LayerCopy, LayeredStores
from flexkv_core.transfer.layers import LayerProgress, LayerStatus
from flexkv_core.transfer.pieces import Pieces
from flexkv_core.transfer.plan import Delivery, DeviceCopier, OpResult, OpStatus, TransferOp
from flexkv_core.types import Direction

logger = logging.getLogger(__name__)

LOAD_PIECE_BYTES = 4 << 20
"""A load is copied in pieces of this size where threads may share it: half a millisecond each, so they end about together."""

LAYER_POLL_S = 1.0
"""How often stores layer by layer are looked at that nobody speaks of any more; they have a deadline of many seconds."""

ARRIVAL_POLL_S = 0.0002
"""How often a load looks for slots that arrive, when nothing else is to be done: a fifth of the time that a 1 MiB read takes."""


_Gather = Callable[[TransferOp], npt.NDArray[np.bool_] | None]


@dataclass(frozen=True)
class _Queued:
    op: TransferOp
    after: object
    deadline: float  # time.monotonic()


@dataclass
class _Arriving:
    """A load under way, of which the slots at ``pending`` (indices) have not arrived."""

    item: _Queued
    pending: npt.NDArray[np.intp]
    ok: npt.NDArray[np.bool_]
    seconds: float = 0.0
    arrived: npt.NDArray[np.intp] = field(
        default_factory=lambda: np.empty(0, np.intp)
    )  # not WHOLE: not copied yet


class TransferEngine:
    """Implements :class:`~flexkv_core.transfer.plan.Executor` on a thread of this process.

    Args:
        copier: of this rank's device.
        shard: which part of each slot is this rank's.
        queue_ops_max: ops that may wait; more are refused.
        timeout_s: an op that has not started after this long is reported as failed.
        verify: check the checksum of each block that is loaded.
    """

    def __init__(
        self,
        copier: DeviceCopier,
        *,
        shard: int = 0,
        queue_ops_max: int = 1024,
        timeout_s: float = 20.0,
        verify: bool = True,
    ) -> None:
        self._copier = copier
        self._shard = shard
        self._queue_ops_max = queue_ops_max
        self._timeout_s = timeout_s
        self._verify = verify
        self._changed = threading.Condition()
        self._loads: OrderedDict[int, _Queued] = OrderedDict()
        self._stores: OrderedDict[int, _Queued] = OrderedDict()
        self._arriving: list[_Arriving] = []  # the thread's own
        self._unfinished: set[int] = set()
        self._pieces: Pieces | None = None  # of the load that is copied now
        self._layers = LayerProgress()
        self._layered = LayeredStores(copier.segments.layer_count, timeout_s)
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self, host: HostSegment, on_result: Callable[[OpResult], None]) -> None:
        """Bind the copier to ``host`` and start the thread; ``on_result`` is called on it. Again, with another segment: end first, as
        :meth:`close` does."""
        if self._thread is not None:
            self.close()
            self._closed, self._arriving = False, []
        self._copier.bind(host, self._shard)
        self._piece_blocks = max(1, self._copier.store_piece_bytes // host.layout.shard_bytes)
        self._load_piece_blocks = max(1, LOAD_PIECE_BYTES // host.layout.shard_bytes)
        self._host = host
        self._on_result = on_result
        self._thread = threading.Thread(target=self._work, name="flexkv-transfer", daemon=True)
        self._thread.start()

    def submit(self, op: TransferOp) -> None:
        """Queue ``op`` behind what the device has been given so far."""
        queue = self._loads if op.direction is Direction.LOAD else self._stores
        is_layered = op.direction is Direction.STORE and op.delivery is not Delivery.WHOLE
        now = time.monotonic()
        queued = _Queued(op, None if is_layered else self._copier.mark(), now + self._timeout_s)
        with self._changed:
            waiting = len(self._layered) if is_layered else len(queue)
            accepted = not self._closed and waiting < self._queue_ops_max
            if accepted:
                assert op.op_id not in self._unfinished, op.op_id
                self._unfinished.add(op.op_id)
                if is_layered:
                    self._layered.begin(op, now)
                else:
                    queue[op.op_id] = queued
                if op.direction is Direction.LOAD and op.delivery is not Delivery.WHOLE:
                    self._layers.begin(op.op_id)
                self._changed.notify_all()
        if not accepted:
            self._on_result(_failed(op, OpStatus.FAILED))

    def layers_written(self, op_ids: Collection[int], count: int) -> None:
        """Of these LAYERWISE stores, the device has been given the work that writes the first ``count`` layers.

        To be called on the thread that gives the device its work, with rising counts. What is written is copied while the device goes on;
        with the last layer a store is complete. Until then it may be given up by :meth:`abandon`; one that hears of no layer for
        ``timeout_s`` seconds has failed. Stores that have ended are passed over.
        """
        mark = self._copier.mark()
        with self._changed:
            self._layered.written(op_ids, count, mark, time.monotonic())
            self._changed.notify_all()

    def abandon(self, op_ids: Collection[int]) -> None:
        """Let LAYERWISE stores of which not every layer was written fail; passes over what has ended."""
        with self._changed:
            self._layered.abandon(op_ids)
            self._changed.notify_all()

    def cancel(self, op_id: int) -> None:
        """Drop an op that still waits; it is reported as cancelled. A store layer by layer does not wait."""
        with self._changed:
            queued = self._loads.pop(op_id, None) or self._stores.pop(op_id, None)
        if queued is not None:
            self._report(_failed(queued.op, OpStatus.CANCELLED))

    def drain(self, op_ids: Collection[int], timeout_s: float) -> bool:
        """Wait until none of ``op_ids`` is queued or running; False when ``timeout_s`` passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._unfinished.isdisjoint(op_ids), timeout_s)

    @property
    def layer_count(self) -> int:
        """Layers of a layerwise load."""
        return self._copier.segments.layer_count

    def wait_layers(self, op_id: int, count: int, timeout_s: float) -> LayerStatus:
        """Wait until the first ``count`` layers of a LAYERWISE or TENTATIVE load may be read, at most ``timeout_s`` seconds.

        To be called on the thread that gives the device its work, any number of times for a load, also when it has ended (the last
        1,024 are remembered; of older ones and of ops that were refused the answer is FAILED). With READY, what that thread gives the
        device from now on reads the layers' bytes, which of a LAYERWISE load are all checked; on a GPU the device waits for that, not the
        thread. With FAILED or LATE nothing may be read; a load that is LATE goes on to write to its blocks until it is reported. ``count``
        0 waits until all blocks have passed their check. While it waits, the thread takes a hand in what is checked or copied in pieces.
        """
        deadline = time.monotonic() + timeout_s
        status, layer = self._layers.wait(op_id, count, 0)
        pieces = self._pieces
        if status is LayerStatus.LATE:
            if pieces is not None:
                pieces.work()  # blocks that are checked before the first layer comes: two threads are done earlier
            status, layer = self._layers.wait(op_id, count, deadline - time.monotonic())
        if layer is not None:
            self._copier.follow(layer)
        return status

    def help(self, timeout_s: float) -> None:
        """Lend the calling thread to the load that runs or starts within ``timeout_s``; returns as well when an op has ended.

        For a thread that would only wait: memory feeds two cores faster than one.
        """
        with self._changed:
            before = len(self._unfinished)
            self._changed.wait_for(
                lambda: self._pieces is not None or len(self._unfinished) < before or not before, timeout_s
            )
            pieces = self._pieces
        if pieces is not None:
            pieces.work()

    def close(self) -> None:
        """Report what is queued as cancelled and wait for the op that runs (a copy cannot be interrupted; it takes milliseconds)."""
        with self._changed:
            self._closed = True
            queued = [*self._loads.values(), *self._stores.values()]
            self._loads.clear()
            self._stores.clear()
            self._changed.notify_all()
        for item in queued:
            self._report(_failed(item.op, OpStatus.CANCELLED))
        if self._thread is not None:
            self._thread.join()
        self._copier.close()

    def _work(self) -> None:
        _leave_pinned_core()
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work, self._poll_s())
                if self._closed:
                    break
                queue = self._loads or self._stores
                item = queue.popitem(last=False)[1] if queue else None
            if item is not None:
                self._run(item)
            self._advance_arriving()
            self._advance_layered()
        for op in [*(arriving.item.op for arriving in self._arriving), *self._layered.ops()]:
            self._report(_failed(op, OpStatus.CANCELLED))

    def _has_work(self) -> bool:
        is_queued = self._closed or self._loads or self._stores
        return bool(is_queued) or self._layered.next(time.monotonic()) is not None

    def _poll_s(self) -> float | None:
        if self._arriving:
            return ARRIVAL_POLL_S
        return LAYER_POLL_S if len(self._layered) else None

    def _run(self, item: _Queued) -> None:
        op = item.op
        if time.monotonic() > item.deadline:
            logger.warning(
                "%s of %d blocks waited longer than %.1f s: dropped",
                op.direction.value,
                len(op.slots),
                self._timeout_s,
            )
            self._report(_failed(op, OpStatus.FAILED))
        elif op.direction is Direction.STORE:
            self._store(item)
        else:
            awaited = np.zeros(len(op.slots), np.bool_) if op.awaited is None else op.awaited
            load = _Arriving(item, np.flatnonzero(awaited), np.zeros(len(op.slots), np.bool_))
            if self._copy_in(load, np.flatnonzero(~awaited)):
                self._arriving.append(load)

    def _store(self, item: _Queued) -> None:
        started = time.monotonic()
        ok = self._gather(item.op, lambda part: self._copier.gather(part, item.after), self._piece_blocks)
        if ok is not None:
            self._report(OpResult(item.op.op_id, OpStatus.DONE, ok, time.monotonic() - started))

    def _gather(self, op: TransferOp, gather: _Gather, piece_blocks: int) -> npt.NDArray[np.bool_] | None:
        """Copy piece by piece, letting loads in between; None when that failed and was reported."""
        ok = np.ones(len(op.slots), np.bool_)

        def copy(indices: npt.NDArray[np.intp]) -> None:
            kept = gather(op.part(indices))
            if kept is not None:
                ok[indices] = kept

        for start in range(0, len(op.slots), piece_blocks):
            piece = np.arange(start, min(start + piece_blocks, len(op.slots)))
            if not self._attempt(op, partial(copy, piece)):
                return None
            self._let_loads_in()
        return ok

    def _advance_layered(self) -> None:
        """Copy some layers of a store, or end it, if there is anything to do."""
        with self._changed:
            work = self._layered.next(time.monotonic())
        if isinstance(work, LayerCopy):
            self._store_layers(work)
        elif work is not None:
            op, end = work
            logger.warning("store of %d blocks, layer by layer: %s; dropped", len(op.slots), end.value)
            self._report(_failed(op, OpStatus.FAILED))

    def _store_layers(self, work: LayerCopy) -> None:
        store, layers, started = work.store, work.layers, time.monotonic()
        is_last = layers.stop == self.layer_count
        # The last ones come with a pass over all bytes, for the checksums.
        blocks = self._piece_blocks if is_last else self._piece_blocks * self.layer_count // len(layers)
        ok = self._gather(store.op, lambda part: self._copier.gather(part, work.after, layers), blocks)
        if ok is None:
            return
        store.copied, store.seconds = layers.stop, store.seconds + time.monotonic() - started
        if is_last:
            self._report(OpResult(store.op.op_id, OpStatus.DONE, ok, store.seconds))

    def _attempt(self, op: TransferOp, copy: Callable[[], None]) -> bool:
        """Run a copy; when the device raises, report the whole op as failed and return False."""
        try:
            copy()
        except Exception:  # the thread's edge: whatever a device raises is a miss, and the thread lives on
            logger.exception("%s of %d blocks failed", op.direction.value, len(op.slots))
            self._report(_failed(op, OpStatus.FAILED))
            return False
        return True

    def _let_loads_in(self) -> None:
        while True:
            with self._changed:
                if self._closed or not self._loads:
                    break
                item = self._loads.popitem(last=False)[1]
            self._run(item)
        self._advance_arriving()

    def _copy_in(self, load: _Arriving, indices: npt.NDArray[np.intp]) -> bool:
        """Copy the slots at ``indices`` to the device; report the load when nothing is pending. Whether it goes on."""
        op, started = load.item.op, time.monotonic()
        scatter = self._scatter
        if op.delivery is not Delivery.WHOLE:
            load.arrived = np.append(load.arrived, indices)
            if len(load.pending):
                return True
            indices, scatter = np.sort(load.arrived), self._scatter_layers
        if len(indices) and not self._attempt(op, partial(scatter, load, indices)):
            return False
        load.seconds += time.monotonic() - started
        if not len(load.pending):
            self._report(OpResult(op.op_id, OpStatus.DONE, load.ok, load.seconds))
        return bool(len(load.pending))

    def _scatter(self, load: _Arriving, indices: npt.NDArray[np.intp]) -> None:
        """Copy the slots at ``indices``, in pieces that a helping thread may take where the copier allows it."""
        op, after = load.item.op, load.item.after
        if not self._copier.concurrent:
            load.ok[indices] = self._copier.scatter(op.part(indices), after, self._verify)
            return

        def copy(some: npt.NDArray[np.intp]) -> None:
            load.ok[some] = self._copier.scatter(op.part(some), after, self._verify)

        self._share(indices, copy)

    def _scatter_layers(self, load: _Arriving, indices: npt.NDArray[np.intp]) -> None:
        """Check the slots at ``indices`` and copy what is whole layer by layer; a TENTATIVE load the other way round."""
        op, publish = load.item.op, partial(self._layers.publish, load.item.op.op_id)
        if op.delivery is Delivery.TENTATIVE:
            self._copier.scatter_layers(op.part(indices), load.item.after, publish)
            self._check(load, indices)
            return
        self._check(load, indices)
        whole = np.flatnonzero(load.ok)
        if len(whole):
            self._copier.scatter_layers(op.part(whole), load.item.after, publish)

    def _check(self, load: _Arriving, indices: npt.NDArray[np.intp]) -> None:
        """Compare the slots at ``indices`` with their checksums, in pieces that a helping thread may take, and tell those who wait."""
        op = load.item.op

        def check(some: npt.NDArray[np.intp]) -> None:
            part = op.part(some)
            load.ok[some] = self._host.matches(part.slots, part.keys, self._shard)

        if self._verify and self._host.checksum_threads == 1:
            self._share(indices, check)
        elif self._verify:
            check(indices)  # has threads of its own
        else:
            load.ok[indices] = True
        tell = self._layers.checked if load.ok.all() else self._layers.fail
        tell(op.op_id)

    def _share(self, indices: npt.NDArray[np.intp], work: Callable[[npt.NDArray[np.intp]], None]) -> None:
        """Call ``work`` with parts of ``indices``, here and on a thread that helps."""
        size = self._load_piece_blocks
        if len(indices) <= size:
            work(indices)
            return
        pieces = Pieces(
            -(-len(indices) // size), lambda piece: work(indices[piece * size : (piece + 1) * size])
        )
        self._offer(pieces)
        try:
            pieces.finish()
        finally:
            self._offer(None)

    def _offer(self, pieces: Pieces | None) -> None:
        with self._changed:
            self._pieces = pieces
            self._changed.notify_all()

    def _advance_arriving(self) -> None:
        self._arriving = [load for load in self._arriving if self._advance(load)]

    def _advance(self, load: _Arriving) -> bool:
        """Copy what has arrived since the last look; whether the load goes on."""
        op = load.item.op
        marks = self._host.arrivals[op.slots[load.pending]]
        arrived = marks == arrival_mark(op.op_id, ok=True)
        settled = arrived | (marks == arrival_mark(op.op_id, ok=False))
        late = time.monotonic() > load.item.deadline
        if not settled.any() and not late:
            return True
        if late:
            logger.warning("load of %d blocks: %d did not arrive in time", len(op.slots), (~settled).sum())
        indices = load.pending[arrived]
        load.pending = load.pending[:0] if late else load.pending[~settled]
        return self._copy_in(load, indices)

    def _report(self, result: OpResult) -> None:
        self._layers.end(result.op_id, whole=result.status is OpStatus.DONE and bool(result.ok.all()))
        try:
            self._on_result(result)
        finally:
            with self._changed:
                self._layered.end(result.op_id)
                self._unfinished.discard(result.op_id)
                self._changed.notify_all()


def _failed(op: TransferOp, status: OpStatus) -> OpResult:
    return OpResult(op.op_id, status, np.zeros(len(op.slots), np.bool_))


def _leave_pinned_core() -> None:
    """An engine may have pinned the thread that started this one to a core; copies run on any."""
    try:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    except OSError as error:
        logger.debug("transfer thread keeps its cores: %s", error)
