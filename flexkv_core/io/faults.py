"""For tests: disks that fail, at three heights.

- :class:`FaultyEngine` around any engine, for what stands above: errors, torn writes, slow and reordered completions
- :class:`FaultySyscalls` below :class:`~flexkv_core.io.threads.ThreadEngine`, and :func:`injections` below
  :class:`~flexkv_core.io.uring.UringEngine`, for the engines themselves: calls that are cut short or interrupted

All of it is drawn from a seed. What a power loss leaves in the files is in ``power_loss.py``.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import ClosedError
from flexkv_core.io.base import PAGE_BYTES, Completions, IoEngine, IoKind, IoOps, check_ops, make_ops
from flexkv_core.io.power_loss import PowerLossLog

SECTOR_BYTES = 512
_TRUTH = np.iinfo(np.int32).max
_POLL_S = 0.0005


class Fault(Enum):
    """What may happen to one operation."""

    SHORT = auto()  # done in two pieces, with others between them
    INTERRUPTED = auto()  # starts later
    IO_ERROR = auto()  # -EIO; a write may have left some of its bytes
    NO_SPACE = auto()  # -ENOSPC, writes only; the same
    SLOW = auto()  # completes `slow_s` late


@dataclass(frozen=True)
class FaultPlan:
    """How often each fault strikes (shares of the operations, together at most 1), and whether completions change their order."""

    rates: dict[Fault, float] = field(default_factory=dict)
    slow_s: float = 0.02
    reorder: bool = False
    seed: int = 0

    def draw(self, rng: random.Random, kind: IoKind) -> Fault | None:
        """The fault of one operation."""
        at = rng.random()
        for fault, rate in self.rates.items():
            at -= rate
            if at < 0:
                return None if fault is Fault.NO_SPACE and kind is not IoKind.WRITE else fault
        return None


_ERRNO = {
    Fault.IO_ERROR: errno.EIO,
    Fault.NO_SPACE: errno.ENOSPC,
    Fault.INTERRUPTED: errno.EINTR,
}


@dataclass
class _Op:
    """One operation of the caller, and what is still to be done for it."""

    number: int
    batch: int
    kind: IoKind
    tag: int
    file: int
    offset: int
    address: int
    length: int
    deadline: float | None
    fault: Fault | None
    moved: int = 0  # bytes that the inner engine has moved
    under_way: int = 0  # bytes that it is moving


class FaultyEngine(IoEngine):
    """The contract, kept over ``inner`` while ``plan`` strikes. Owns ``inner``.

    With a :class:`PowerLossLog` every write and sync is entered there.
    """

    name = "faulty"

    def __init__(self, inner: IoEngine, plan: FaultPlan, log: PowerLossLog | None = None) -> None:
        self.struck: dict[Fault, int] = dict.fromkeys(Fault, 0)
        self._inner = inner
        self._plan = plan
        self._log = log
        self._rng = random.Random(plan.seed)
        self._batches = 0
        self._numbers = 0
        self._waiting: list[_Op] = []  # to be started at the next wait()
        self._running: dict[int, _Op] = {}  # by the tag that the inner engine knows
        self._inner_batches: dict[int, list[int]] = {}
        self._held: list[tuple[float, _Op, int]] = []  # finished, and when it may be told
        self._event_fd = os.eventfd(
            1
        )  # always readable, which the contract allows: completions here need no event of their own
        self._is_open = True

    def submit(self, kind: IoKind, ops: IoOps, length: int = 0, deadline_s: float | None = None) -> int:
        """Draw a fault for each operation, and pass on what starts now."""
        if not self._is_open:
            raise ClosedError("the I/O engine was closed")
        check_ops(kind, ops, length, 1 << 31)
        self._batches += 1
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        now: list[_Op] = []
        for tag, offset, address, file, _ in ops.tolist():
            fault = self._plan.draw(self._rng, kind)
            self._numbers += 1
            op = _Op(self._numbers, self._batches, kind, tag, file, offset, address, length, deadline, fault)
            if fault is not None:
                self.struck[fault] += 1
            (self._waiting if fault is Fault.INTERRUPTED else now).append(op)
        self._start(now)
        return self._batches

    def wait(self, min_count: int = 1, timeout_s: float | None = None) -> Completions:
        """Poll the inner engine; tell what is due."""
        if not self._is_open:
            raise ClosedError("the I/O engine was closed")
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            waiting, self._waiting = self._waiting, []
            self._start(waiting)
            tags, results = self._inner.wait(1 if self._inner.pending else 0, _POLL_S)
            for number, result in zip(tags.tolist(), results.tolist(), strict=True):
                self._settle(self._running.pop(number), result)
            due = [entry for entry in self._held if entry[0] <= time.monotonic()]
            if len(due) >= min(min_count, self.pending) or (end is not None and time.monotonic() >= end):
                return self._tell(due)
            if not self._inner.pending:
                time.sleep(_POLL_S)

    def cancel(self, batch: int) -> None:
        """Withdraw here and below."""
        for inner_batch in self._inner_batches.get(batch, ()):
            self._inner.cancel(inner_batch)
        for op in [op for op in self._waiting if op.batch == batch]:
            self._waiting.remove(op)
            self._hold(op, -errno.ECANCELED)

    @property
    def pending(self) -> int:
        """Here and below."""
        return len(self._waiting) + len(self._running) + len(self._held)

    def fileno(self) -> int:
        """Always readable."""
        return self._event_fd

    def close(self) -> None:
        """Close the inner engine too."""
        if self._is_open:
            self._is_open = False
            self._inner.close()
            os.close(self._event_fd)

    def _start(self, ops: list[_Op]) -> None:
        for op in ops:
            late = op.deadline is not None and time.monotonic() >= op.deadline
            op.under_way = self._piece_bytes(op)
            if late or (op.under_way == 0 and op.kind is not IoKind.SYNC):
                self._hold(op, -errno.ETIMEDOUT if late else -_ERRNO[op.fault or Fault.IO_ERROR])
                continue
            if self._log is not None and op.moved == 0:
                self._log.started(op.number, op.kind, op.file, op.offset, op.address, op.length)
            self._running[op.number] = op
            inner_op = make_ops(op.file, op.offset + op.moved, op.address + op.moved, op.number)
            left_s = None if op.deadline is None else max(0.0, op.deadline - time.monotonic())
            inner_batch = self._inner.submit(op.kind, inner_op, op.under_way, left_s)
            self._inner_batches.setdefault(op.batch, []).append(inner_batch)

    def _piece_bytes(self, op: _Op) -> int:
        """How much of an operation the inner engine is asked for now; less than all where a fault wants it."""
        left = op.length - op.moved
        pages = left // PAGE_BYTES
        if op.fault is Fault.SHORT and op.moved == 0 and pages > 1:
            return self._rng.randrange(1, pages) * PAGE_BYTES
        if op.fault in (Fault.IO_ERROR, Fault.NO_SPACE) and op.kind is not IoKind.SYNC:
            return self._rng.randint(0, pages) * PAGE_BYTES if op.kind is IoKind.WRITE else 0
        return left

    def _settle(self, op: _Op, result: int) -> None:
        if (
            self._log is not None
            and op.kind is IoKind.SYNC
            and op.fault is not Fault.IO_ERROR
            and result == 0
        ):
            self._log.synced(op.number)
        if result < 0:
            self._hold(op, result)
        elif op.fault in (Fault.IO_ERROR, Fault.NO_SPACE):
            self._hold(op, -_ERRNO[op.fault])
        elif op.moved + op.under_way < op.length:
            op.moved += op.under_way
            self._waiting.append(op)
        else:
            self._hold(op, 0 if op.kind is IoKind.SYNC else op.length)

    def _hold(self, op: _Op, result: int) -> None:
        late_s = self._plan.slow_s if op.fault is Fault.SLOW else 0.0
        self._held.append((time.monotonic() + late_s, op, result))

    def _tell(self, due: list[tuple[float, _Op, int]]) -> Completions:
        if self._plan.reorder:
            self._rng.shuffle(due)
        told = {op.number for _, op, _ in due}
        self._held = [entry for entry in self._held if entry[1].number not in told]
        for _, op, result in due:
            if self._log is not None and op.kind is IoKind.WRITE and result >= 0:
                self._log.told(op.number)
        if not self.pending:
            self._inner_batches.clear()
        return Completions(
            np.array([op.tag for _, op, _ in due], np.int64),
            np.array([result for *_, result in due], np.int32),
        )


class FaultySyscalls:
    """System calls that move less than they were asked to, or fail. Used by many threads."""

    def __init__(self, plan: FaultPlan) -> None:
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._lock = threading.Lock()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """As :func:`os.preadv`."""
        return os.preadv(fd, [self._strike(IoKind.READ, buffers[0])], offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """As :func:`os.pwritev`."""
        return os.pwritev(fd, [self._strike(IoKind.WRITE, buffers[0])], offset)

    def fdatasync(self, fd: int) -> None:
        """As :func:`os.fdatasync`."""
        self._strike(IoKind.SYNC, memoryview(b""))
        os.fdatasync(fd)

    def _strike(self, kind: IoKind, buffer: memoryview) -> memoryview:
        with self._lock:
            fault = self._plan.draw(self._rng, kind)
            sectors = self._rng.randint(1, max(1, buffer.nbytes // SECTOR_BYTES))
        if fault in _ERRNO:
            raise OSError(_ERRNO[fault], os.strerror(_ERRNO[fault]))
        if fault is Fault.SLOW:
            time.sleep(self._plan.slow_s)
        if fault is Fault.SHORT and buffer.nbytes > SECTOR_BYTES:
            return buffer[: sectors * SECTOR_BYTES]
        return buffer


def injections(plan: FaultPlan, kind: IoKind, count: int, length: int) -> npt.NDArray[np.int32]:
    """The same faults (without SLOW) for :meth:`UringEngine.inject`: what the next ``count`` completions shall report."""
    rng = random.Random(plan.seed)
    results = np.full(count, _TRUTH, np.int32)
    for i in range(count):
        fault = plan.draw(rng, kind)
        if fault in _ERRNO:
            results[i] = -_ERRNO[fault]
        elif fault is Fault.SHORT:
            results[i] = rng.randint(1, max(1, length // SECTOR_BYTES)) * SECTOR_BYTES
    return results
