"""The manager's side of the storage process: starts it, talks to it, notices its death, starts it again.

Whatever happens to the process, each batch that was accepted is reported to its end exactly once. What was under way when it died is
reported as dropped, which the manager counts as misses; what it had recorded stays recorded, so the index needs no rebuilding.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import CapacityError, ConfigError, FlexKVError, StorageError
from flexkv_core.storage.base import BlockStatus, Records, SsdSpec, Statuses, key_words
from flexkv_core.storage.catalog import record_dtype, records_of
from flexkv_core.storage.directory import slot_count
from flexkv_core.storage.memory import HostSegment, arrival_mark
from flexkv_core.transfer.ring import COMMAND, COMPLETION, Array, CommandKind, Ring
from flexkv_core.transfer.worker import WorkerSpec, attach_table
from flexkv_core.types import Slots

logger = logging.getLogger(__name__)

RING_RECORDS = 1 << 16
"""Blocks that may be under way: 4 MiB of commands. More are refused, which is a miss or a write that is tried later."""
FORGET_RECORDS = RING_RECORDS // 2
"""Sent at a time, so that the other side removes some while the next are waiting."""
START_TIMEOUT_S = 600.0  # allocating terabytes on a slow file system, loading a catalogue of many millions
RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0
"""A process that dies more often than this stays down: something is wrong that starting does not mend."""
BACKOFF_S = 0.1  # before the first start anew, then doubled
KILL_AFTER_S = 2.0  # beyond a stop's deadline
TICK_S = 0.5  # how late a write that is owed begins once it may; costs 20 us

# Not `-m`, which runs the module a second time: importing the package has imported it.
_RUN_WORKER = "from flexkv_core.transfer.worker import main; main()"
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_ERRORS: dict[str, type[FlexKVError]] = {"ConfigError": ConfigError, "CapacityError": CapacityError}


@dataclass(frozen=True)
class Progress:
    """Blocks of one batch that ended.

    ``indexes``: int64 [n], places in the batch as it was submitted. ``statuses``: uint32 [n], :class:`BlockStatus`. ``finished``: these
    are the last of the batch. ``is_lost``: the process ended before them, so they tell nothing about the tier.
    """

    op: int
    kind: CommandKind
    indexes: npt.NDArray[np.int64]
    statuses: Statuses
    finished: bool
    is_lost: bool = False


@dataclass
class _Pending:
    kind: CommandKind
    left: npt.NDArray[np.bool_]
    left_count: int
    host_slots: Slots
    is_own: bool = False  # the supervisor's: nobody else waits for it


class StorageProcess:
    """One storage process and its successors. Methods may be called from any thread; none of them waits for a disk.

    Args:
        spec: the tier.
        host: the host tier; this process must own it.
        on_progress: called on the supervisor's thread, for every block of every accepted read, write, flush and clear.
        on_corrupt: called on that thread with the SSD slots that the scrubber put into quarantine.
        on_tick: called on that thread whenever a process begins to take commands, and about every TICK_S while one does.
    """

    def __init__(
        self,
        spec: SsdSpec,
        host: HostSegment,
        on_progress: Callable[[Progress], None],
        on_corrupt: Callable[[Slots], None] = lambda slots: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        assert host.handle.pid == os.getpid(), "the host segment belongs to another process"
        self.slot_count = slot_count(spec)
        self.restarts = 0
        self._spec = spec
        self._host = host
        self._on_progress = on_progress
        self._on_corrupt = on_corrupt
        self._on_tick = on_tick
        self._lock = threading.Lock()  # guards what follows, and pushing
        self._pending: dict[int, _Pending] = {}
        self._records_under_way = 0
        self._link: _Link | None = None  # None while no process takes commands
        self._clear_owed = False
        self._closing = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._table_fd = -1
        self._table: Array = np.empty(0, record_dtype(spec.layout.shard_count))
        self._thread = threading.Thread(target=self._watch, name="flexkv-storage", daemon=True)

    def start(self) -> Records:
        """Start the process and wait until it serves; what the tier holds from before. Call once.

        Raises:
            ConfigError: a directory cannot be used, or is in use.
            CapacityError: the disk is too small.
            StorageError: the process cannot be started, or said something else.
        """
        size = self.slot_count * self._table.dtype.itemsize
        self._table_fd = os.memfd_create("flexkv-catalog", os.MFD_CLOEXEC)
        os.ftruncate(self._table_fd, size)
        self._table = attach_table(self._table_fd, self.slot_count, self._spec.layout.shard_count)
        link = _Link(self._spec, self._host, self._table_fd)
        try:
            link.wait_ready(self._wake_fd)
        except FlexKVError:
            link.end()
            raise
        records = records_of(self._table)
        self._link = link
        self._thread.start()
        logger.info("SSD tier: %d blocks, %d of them warm", self.slot_count, len(records))
        return records

    @property
    def is_up(self) -> bool:
        """Whether commands are taken now."""
        return self._link is not None

    @property
    def pid(self) -> int:
        """Of the process; -1 while there is none."""
        link = self._link
        return -1 if link is None else link.process.pid

    def read(self, op: int, keys: bytes, ssd_slots: Slots, host_slots: Slots) -> bool:
        """Read blocks into host slots; False when nothing was accepted. Each host slot's ``arrivals`` is marked with ``op``, OK or not,
        before its progress is reported.

        ``op``: > 0, of no other batch that is under way. ``keys``: ``16 * n`` bytes. The caller keeps the SSD slots unchanged and the
        host slots for itself until they are reported.
        """
        commands = _commands(CommandKind.READ, op, ssd_slots, host_slots)
        commands["key"] = key_words(keys)
        return self._send(commands, CommandKind.READ, op)

    def write(self, op: int, keys: bytes, parents: bytes, ssd_slots: Slots, host_slots: Slots) -> bool:
        """Write blocks; False when nothing was accepted. ``parents``: the key before each block in its chain, ``16 * n`` bytes."""
        commands = _commands(CommandKind.WRITE, op, ssd_slots, host_slots)
        commands["key"], commands["parent"] = key_words(keys), key_words(parents)
        return self._send(commands, CommandKind.WRITE, op)

    def forget(self, ssd_slots: Slots, timeout_s: float = 0.0) -> bool:
        """Remove records, in order with the writes. Not answered; one that is lost costs nothing but a record that is still right.

        Any number: what the ring has no room for is sent as it empties, for up to ``timeout_s``. False: not all were sent.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            for start in range(0, len(ssd_slots), FORGET_RECORDS):
                part = ssd_slots[start : start + FORGET_RECORDS]
                commands = _commands(CommandKind.FORGET, 0, part, part)
                if self._link is None or not self._link.commands.push(commands, deadline - time.monotonic()):
                    return False
        return True

    def flush(self, op: int) -> bool:
        """Report ``op`` when all writes before it have been reported."""
        return self._send(_commands(CommandKind.FLUSH, op, _ONE, _ONE), CommandKind.FLUSH, op)

    def clear(self, op: int) -> bool:
        """Remove all records. Reads that overtake it still find what they ask for. Kept in mind while the process is down: it happens
        before any write then, and ``op`` is dropped."""
        with self._lock:
            self._clear_owed = True
        return self._send(_commands(CommandKind.CLEAR, op, _ONE, _ONE), CommandKind.CLEAR, op)

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop: what was accepted is written within ``timeout_s``, the rest is reported as dropped. May be called twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            link = self._link
            if link is not None:
                stop = _commands(CommandKind.STOP, 0, _ONE, _ONE)
                stop["index"] = int(timeout_s * 1000)
                link.commands.push(stop)
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join(timeout_s + KILL_AFTER_S)
            if self._thread.is_alive() and link is not None:
                logger.error(
                    "storage process %d did not stop within %.0f s; killed", link.process.pid, timeout_s
                )
                link.process.kill()
                self._thread.join(KILL_AFTER_S)
        if (
            self._thread.is_alive()
        ):  # the kernel holds a process that waits for a dead disk; it ends when the disk answers
            logger.error("storage process: still not gone; left behind")
            return
        for fd in (self._wake_fd, self._table_fd):
            if fd >= 0:
                os.close(fd)

    # Inside

    def _send(self, commands: Array, kind: CommandKind, op: int) -> bool:
        assert op > 0, op
        count = len(commands)
        with self._lock:
            assert op not in self._pending, op
            if (
                self._link is None
                or self._closing
                or not count
                or self._records_under_way + count > RING_RECORDS
            ):
                return False
            self._pending[op] = _Pending(kind, np.ones(count, np.bool_), count, commands["host_slot"].copy())
            self._records_under_way += count
            if self._link.commands.push(commands):
                return True
            self._forget_pending(op)
            return False

    def _forget_pending(self, op: int) -> None:
        self._records_under_way -= len(self._pending.pop(op).left)

    def _watch(self) -> None:
        """The supervisor's thread."""
        starts: deque[float] = deque()
        link = self._link
        while link is not None:
            self._serve(link)
            with self._lock:
                self._link = None
            self._take(link)  # what it said last
            code = link.end()
            if not self._closing:
                logger.error(
                    "storage process %d ended (%s); what it was doing is dropped",
                    link.process.pid,
                    _ending(code),
                )
            self._drop_pending()
            link = None if self._closing else self._restart(starts)

    def _serve(self, link: _Link) -> None:
        """Until the process has ended."""
        poll = select.poll()
        poll.register(link.completions.fileno(), select.POLLIN)
        poll.register(link.pid_fd, select.POLLIN)
        next_tick = 0.0
        while True:
            if (left_s := next_tick - time.monotonic()) <= 0:
                self._guard(self._on_tick)
                left_s, next_tick = TICK_S, time.monotonic() + TICK_S
            ready = {fd for fd, _ in poll.poll(left_s * 1000)}
            self._take(link)
            if link.pid_fd in ready:
                return

    def _guard(self, call: Callable[[], None]) -> None:
        """The thread's edge: a fault of the manager's must not leave other batches without an end."""
        try:
            call()
        except Exception:
            logger.exception("storage process: the manager did not take a report")

    def _take(self, link: _Link) -> None:
        done = link.completions.take()
        if not len(done):
            return
        unasked = done[done["op"] == 0]
        if len(unasked):
            self._guard(lambda: self._on_corrupt(unasked["index"].astype(np.int32)))
        done = done[np.argsort(done["op"], kind="stable")]
        for part in np.split(done, np.flatnonzero(np.diff(done["op"])) + 1):
            if part["op"][0]:
                self._report(int(part["op"][0]), part["index"].astype(np.int64), part["status"].copy())

    def _report(
        self, op: int, indexes: npt.NDArray[np.int64], statuses: Statuses, is_lost: bool = False
    ) -> None:
        with self._lock:
            pending = self._pending[op]
            pending.left[indexes] = False
            pending.left_count -= len(indexes)
            finished = pending.left_count == 0
            if finished:
                self._forget_pending(op)
            if pending.kind is CommandKind.CLEAR and statuses[0] == BlockStatus.OK:
                self._clear_owed = False
        if not pending.is_own:
            progress = Progress(op, pending.kind, indexes, statuses, finished, is_lost)
            self._guard(lambda: self._on_progress(progress))

    def _drop_pending(self) -> None:
        with self._lock:
            dropped = list(self._pending.items())
        for op, pending in dropped:
            indexes = np.flatnonzero(pending.left)
            if pending.kind is CommandKind.READ:
                self._host.arrivals[pending.host_slots[indexes]] = arrival_mark(op, ok=False)
            self._report(op, indexes, np.full(len(indexes), BlockStatus.DROPPED, np.uint32), is_lost=True)

    def _restart(self, starts: deque[float]) -> _Link | None:
        """The next process, serving; None when it is not to be had."""
        while True:
            now = time.monotonic()
            while starts and now - starts[0] > RESTART_WINDOW_S:
                starts.popleft()
            if len(starts) >= RESTARTS_MAX:
                logger.error(
                    "storage process ended %d times in %.0f s: the SSD tier stays off",
                    len(starts),
                    RESTART_WINDOW_S,
                )
                return None
            if self._wait_for_close(BACKOFF_S * 2 ** len(starts)):
                return None
            starts.append(now)
            self.restarts += 1
            link = _Link(self._spec, self._host, self._table_fd)
            try:
                link.wait_ready(self._wake_fd)
            except FlexKVError as error:
                logger.error("storage process cannot be started again: %s", error)
                link.end()
                if self._closing:
                    return None
                continue
            return self._bring_up(link)

    def _bring_up(self, link: _Link) -> _Link:
        with self._lock:
            if self._clear_owed:
                # Asked again under a number of its own; the one that asked first has been told that it was dropped.
                op = max(self._pending, default=0) + (1 << 62)
                self._pending[op] = _Pending(CommandKind.CLEAR, np.ones(1, np.bool_), 1, _ONE, is_own=True)
                self._records_under_way += 1
                link.commands.push(_commands(CommandKind.CLEAR, op, _ONE, _ONE))
            if self._closing:
                link.commands.push(_commands(CommandKind.STOP, 0, _ONE, _ONE))
            self._link = link
        logger.warning("storage process started again as %d", link.process.pid)
        return link

    def _wait_for_close(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.poll(seconds * 1000)
        return self._closing


class _Link:
    """One process and the rings to it."""

    def __init__(self, spec: SsdSpec, host: HostSegment, table_fd: int) -> None:
        self.commands = Ring.create(COMMAND, RING_RECORDS)
        self.completions = Ring.create(COMPLETION, RING_RECORDS)
        self._status_fd, status_fd = os.pipe2(os.O_CLOEXEC)
        worker = WorkerSpec(
            ssd=spec.as_dict(),
            host_fd=host.handle.fd,
            host_slots=host.slot_count,
            huge_pages=host.handle.huge_pages,
            table_fd=table_fd,
            commands=(*self.commands.handle.fds, RING_RECORDS),
            completions=(*self.completions.handle.fds, RING_RECORDS),
            status_fd=status_fd,
            parent_pid=os.getpid(),
            log_level=logger.getEffectiveLevel(),
        )
        fds = (host.handle.fd, table_fd, status_fd, *self.commands.handle.fds, *self.completions.handle.fds)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _RUN_WORKER, worker.to_json()],
                pass_fds=fds,
                cwd=_PACKAGE_ROOT,  # where the package is found, installed or not
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C at the engine's terminal is the manager's to act on
            )
        finally:
            os.close(status_fd)
        self.pid_fd = os.pidfd_open(self.process.pid)

    def wait_ready(self, wake_fd: int) -> None:
        """Wait for the first word of the process.

        Raises:
            ConfigError, CapacityError, StorageError: the one that ended its start, or why there was no word.
        """
        text = b""
        deadline = time.monotonic() + START_TIMEOUT_S
        poll = select.poll()
        poll.register(self._status_fd, select.POLLIN)
        poll.register(wake_fd, select.POLLIN)
        while not text.endswith(b"\n"):
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if self._status_fd not in ready:
                raise StorageError(
                    "storage process: closed while it started" if ready else "storage process: no word"
                )
            if not (chunk := os.read(self._status_fd, 65536)):
                raise StorageError(f"storage process ended while it started ({_ending(self.process.wait())})")
            text += chunk
        said: dict[str, Any] = json.loads(text)
        if "error" in said:
            raise _ERRORS.get(said["error"], StorageError)(said["message"])

    def end(self) -> int:
        """Make sure that the process has ended, and free what it was given; its exit code."""
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait()
        os.close(self.pid_fd)
        with contextlib.suppress(OSError):
            os.close(self._status_fd)
        self.commands.close()
        self.completions.close()
        return code


def _commands(kind: CommandKind, op: int, ssd_slots: Slots, host_slots: Slots) -> Array:
    commands = np.zeros(len(ssd_slots), COMMAND)
    commands["kind"], commands["op"] = kind, op
    commands["ssd_slot"], commands["host_slot"] = ssd_slots, host_slots
    commands["index"] = np.arange(len(ssd_slots))
    return commands


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


_ONE: Slots = np.zeros(1, np.int32)
