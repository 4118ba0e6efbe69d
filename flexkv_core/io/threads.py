"""I/O by ``preadv``/``pwritev`` on threads: for hosts where io_uring is refused, and the plainest form of the contract.

Each operation costs a hand-over between threads and a few Python objects, so bandwidth falls when other Python threads of the process
are busy (to 0.14 of the idle figure at 256 KiB, where io_uring keeps 0.90).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flexkv_core.errors import ClosedError
from flexkv_core.io.base import PAGE_BYTES, Completions, IoEngine, IoKind, IoOps, check_ops

THREADS_MAX = 16  # enough for a disk's bandwidth at 256 KiB an operation; more only fight for the interpreter
STALLS_MAX = 8  # attempts without progress (EINTR, EAGAIN, a cut below a page) until an operation fails


class Syscalls(Protocol):
    """What the threads ask of the system; a test's stand-in may do less than it was asked."""

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """As :func:`os.preadv`."""

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """As :func:`os.pwritev`."""

    def fdatasync(self, fd: int) -> None:
        """As :func:`os.fdatasync`."""


class SystemCalls:
    """The real ones."""

    preadv = staticmethod(os.preadv)
    pwritev = staticmethod(os.pwritev)
    fdatasync = staticmethod(os.fdatasync)


@dataclass(frozen=True)
class _Batch:
    number: int
    kind: IoKind
    length: int
    deadline: float | None  # time.monotonic()


@dataclass(frozen=True)
class _Op:
    batch: _Batch
    tag: int
    file: int
    offset: int
    address: int


class ThreadEngine(IoEngine):
    """The contract over a pool of at most :data:`THREADS_MAX` threads, one operation each."""

    name = "threads"

    def __init__(self, files: Sequence[int], depth: int, syscalls: Syscalls | None = None) -> None:
        """``files``: open descriptors, indexed by ``file`` of the operations. ``depth``: operations under way at most, >= 1."""
        assert depth >= 1, depth
        self._files = tuple(files)
        self._syscalls: Syscalls = syscalls or SystemCalls()
        self._changed = threading.Condition()  # guards all below
        self._queue: deque[_Op] = deque()
        self._done: list[tuple[int, int]] = []
        self._active = 0
        self._batches = 0
        self._cancelled: set[int] = set()
        self._deadlines: dict[int, float] = {}  # of batches that may still have something to withdraw
        self._closed = False
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._threads = [
            threading.Thread(target=self._serve, name=f"flexkv-io-{i}", daemon=True)
            for i in range(min(depth, THREADS_MAX))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, kind: IoKind, ops: IoOps, length: int = 0, deadline_s: float | None = None) -> int:
        """Queue the batch for the threads."""
        check_ops(kind, ops, length, len(self._files))
        with self._changed:
            self._check_open()
            self._batches += 1
            deadline = None if deadline_s is None else time.monotonic() + deadline_s
            batch = _Batch(self._batches, kind, length, deadline)
            if deadline is not None:
                self._deadlines[batch.number] = deadline
            columns = (ops[name].tolist() for name in ("tag", "file", "offset", "address"))
            self._queue.extend(_Op(batch, *row) for row in zip(*columns, strict=True))
            self._changed.notify_all()
            return batch.number

    def wait(self, min_count: int = 1, timeout_s: float | None = None) -> Completions:
        """Wait on the threads; see the contract."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            self._check_open()
            while True:
                self._withdraw_late()
                now = time.monotonic()
                if len(self._done) >= min(min_count, self._pending()) or (end is not None and now >= end):
                    return self._take_done()
                until = min((*self._deadlines.values(), *(() if end is None else (end,))), default=None)
                self._changed.wait(None if until is None else max(0.0, until - now))

    def cancel(self, batch: int) -> None:
        """Empty the queue of this batch, and stop its operations between two attempts."""
        with self._changed:
            self._check_open()
            self._cancelled.add(batch)
            self._withdraw({batch}, errno.ECANCELED)
            if not self._active:
                self._cancelled.clear()

    @property
    def pending(self) -> int:
        """Queued, under way, or not yet fetched."""
        with self._changed:
            return self._pending()

    def fileno(self) -> int:
        """An eventfd that each completion writes to."""
        return self._event_fd

    def close(self) -> None:
        """Let the threads end what they do."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        os.close(self._event_fd)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the I/O engine was closed")

    def _pending(self) -> int:
        return len(self._queue) + self._active + len(self._done)

    def _take_done(self) -> Completions:
        with contextlib.suppress(BlockingIOError):  # nothing finished since the last call
            os.eventfd_read(self._event_fd)
        done, self._done = self._done, []
        table = np.array(done, np.int64).reshape(-1, 2)
        return Completions(table[:, 0].copy(), table[:, 1].astype(np.int32))

    def _complete(self, tag: int, result: int) -> None:
        self._done.append((tag, result))
        os.eventfd_write(self._event_fd, 1)
        self._changed.notify_all()

    def _withdraw(self, batches: set[int], error: int) -> None:
        kept = deque[_Op]()
        for op in self._queue:
            if op.batch.number in batches:
                self._complete(op.tag, -error)
            else:
                kept.append(op)
        self._queue = kept

    def _withdraw_late(self) -> None:
        now = time.monotonic()
        if late := {number for number, deadline in self._deadlines.items() if deadline <= now}:
            self._withdraw(late, errno.ETIMEDOUT)
            for number in late:
                del self._deadlines[number]

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                op = self._queue.popleft()
                self._active += 1
            result = self._perform(op)
            with self._changed:
                self._active -= 1
                if not self._active and not self._queue:
                    self._cancelled.clear()
                    self._deadlines.clear()
                self._complete(op.tag, result)

    def _perform(self, op: _Op) -> int:
        done, stalls = 0, 0
        while True:
            if op.batch.number in self._cancelled:
                return -errno.ECANCELED
            if op.batch.deadline is not None and time.monotonic() >= op.batch.deadline:
                return -errno.ETIMEDOUT
            moved = self._attempt(op, done)
            if moved in (-errno.EINTR, -errno.EAGAIN):
                moved = 0
            elif moved < 0:
                return moved
            elif done + moved >= op.batch.length or op.batch.kind is IoKind.SYNC:
                return done + moved
            elif moved == 0:
                return -errno.ENODATA if op.batch.kind is IoKind.READ else -errno.EIO
            # O_DIRECT takes whole pages only, so what was moved of the last page is moved again.
            progress = (done + moved) // PAGE_BYTES * PAGE_BYTES - done
            done += progress
            stalls = 0 if progress else stalls + 1
            if stalls >= STALLS_MAX:
                return -errno.ENODATA if op.batch.kind is IoKind.READ and moved else -errno.EIO

    def _attempt(self, op: _Op, done: int) -> int:
        """Bytes moved by one call from ``done`` on, or a negative errno."""
        fd = self._files[op.file]
        try:
            if op.batch.kind is IoKind.SYNC:
                self._syscalls.fdatasync(fd)
                return 0
            raw = (ctypes.c_char * (op.batch.length - done)).from_address(op.address + done)
            call = self._syscalls.preadv if op.batch.kind is IoKind.READ else self._syscalls.pwritev
            return call(fd, [memoryview(raw)], op.offset + done)
        except OSError as error:
            return -(error.errno or errno.EIO)
