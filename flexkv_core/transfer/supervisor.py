"""The manager's side of a process of its own: starts it, talks to it, notices its death, starts it again.

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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import CapacityError, ConfigError, FlexKVError, StorageError
from flexkv_core.storage.base import BlockStatus, Statuses
from flexkv_core.storage.memory import HostSegment, arrival_mark
from flexkv_core.transfer.alarm import Alarm
from flexkv_core.transfer.child import WorkerSpec
from flexkv_core.transfer.ring import COMMAND, COMPLETION, Array, CommandKind, Ring
from flexkv_core.types import Slots

logger = logging.getLogger(__name__)

RING_RECORDS = 1 << 16
"""Blocks that may be under way: 4 MiB of commands. More are refused, which is a miss or a write that is tried later."""
START_TIMEOUT_S = 600.0  # allocating terabytes on a slow file system, loading a catalogue of many millions
RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0
"""A process that dies more often than this stays down: something is wrong that starting does not mend."""
BACKOFF_S = 0.1  # before the first start anew, then doubled
KILL_AFTER_S = 2.0  # beyond a stop's deadline
TICK_S = 0.5  # how late a write that is owed begins once it may; costs 20 us

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
class Pending:
    """A batch that was accepted and has not ended."""

    kind: CommandKind
    left: npt.NDArray[np.bool_]
    left_count: int
    host_slots: Slots
    is_own: bool = False  # the supervisor's: nobody else waits for it


class Supervised:
    """One process and its successors. Methods may be called from any thread; none of them waits for a disk or a network.

    Args:
        name: of the process, in messages.
        worker: the module whose ``main`` the process runs.
        settings: what it is told on its stdin, JSON-serialisable.
        host: the host tier; this process must own it.
        on_progress: called on the supervisor's thread, for every block of every accepted batch.
        on_tick: called on that thread whenever a process begins to take commands, and while one does about every TICK_S, and when
            :meth:`wake` says.
        environment: of the process; None for this one's.
        cpus: where the process runs; None: where the thread runs that starts it.
    """

    def __init__(
        self,
        name: str,
        worker: str,
        settings: Mapping[str, Any],
        host: HostSegment,
        on_progress: Callable[[Progress], None],
        on_tick: Callable[[], None],
        environment: Mapping[str, str] | None = None,
        cpus: Collection[int] | None = None,
    ) -> None:
        assert host.handle.memory.pid == os.getpid(), "the host segment belongs to another process"
        self.restarts = 0
        self._name = name
        self._worker = worker
        self._settings = settings
        self._environment = environment
        self._cpus = cpus
        self._host = host
        self._on_progress = on_progress
        self._on_tick = on_tick
        self._lock = threading.Lock()  # guards what follows, and pushing
        self._pending: dict[int, Pending] = {}
        self._records_under_way = 0
        self._link: ProcessLink | None = None  # None while no process takes commands
        self._closing = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._alarm = Alarm()
        self._tick_at = 0.0  # when it rings, time.monotonic()
        self._table_fd = -1
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)

    @property
    def is_up(self) -> bool:
        """Whether commands are taken now."""
        return self._link is not None

    @property
    def pid(self) -> int:
        """Of the process; -1 while there is none."""
        link = self._link
        return -1 if link is None else link.process.pid

    def wake(self, at: float) -> None:
        """Have on_tick called at that ``time.monotonic()``, or earlier, while a process takes commands. Wakes no thread before."""
        with self._lock:
            if at < self._tick_at and not self._closing:
                self._set_tick(at)

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop: what was accepted is written within ``timeout_s``, the rest is reported as dropped. May be called twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            link = self._link
            if link is not None:
                stop = make_commands(CommandKind.STOP, 0, ONE, ONE)
                stop["index"] = int(timeout_s * 1000)
                link.commands.push(stop)
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join(timeout_s + KILL_AFTER_S)
            if self._thread.is_alive() and link is not None:
                logger.error(
                    "%s: process %d did not stop within %.0f s; killed",
                    self._name,
                    link.process.pid,
                    timeout_s,
                )
                link.process.kill()
                self._thread.join(KILL_AFTER_S)
        if (
            self._thread.is_alive()
        ):  # the kernel holds a process that waits for a dead disk; it ends when the disk answers
            logger.error("%s: still not gone; left behind", self._name)
            return
        self._alarm.close()
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
            self._pending[op] = Pending(kind, np.ones(count, np.bool_), count, commands["host_slot"].copy())
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
        link = self._link or self._first()
        while link is not None:
            self._serve(link)
            with self._lock:
                self._link = None
            self._take(link)  # what it said last
            code = link.end()
            if not self._closing:
                logger.error(
                    "%s: process %d ended (%s); what it was doing is dropped",
                    self._name,
                    link.process.pid,
                    _ending(code),
                )
            self._drop_pending()
            link = None if self._closing else self._restart(starts)

    def _first(self) -> ProcessLink | None:
        """The first process, where nobody waited for it; None when there is none."""
        link = self._open()
        if link is not None:
            return self._bring_up(link)
        return None if self._closing else self._restart(deque([time.monotonic()]))

    def _serve(self, link: ProcessLink) -> None:
        """Until the process has ended."""
        poll = select.poll()
        for fd in (link.completions.fileno(), link.pid_fd, self._alarm.fileno()):
            poll.register(fd, select.POLLIN)
        self._tick()
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._alarm.fileno() in ready:
                self._alarm.silence()
                self._tick()
            self._take(link)
            if link.pid_fd in ready:
                return

    def _tick(self) -> None:
        with self._lock:
            self._set_tick(time.monotonic() + TICK_S)
        self._guard(self._on_tick)

    def _set_tick(self, at: float) -> None:
        """Under the lock."""
        self._tick_at = at
        self._alarm.set(at)

    def _guard(self, call: Callable[[], None]) -> None:
        """The thread's edge: a fault of the manager's must not leave other batches without an end."""
        try:
            call()
        except Exception:
            logger.exception("%s: the manager did not take a report", self._name)

    def _take(self, link: ProcessLink) -> None:
        done = link.completions.take()
        if not len(done):
            return
        unasked = done[done["op"] == 0]
        if len(unasked):
            self._guard(lambda: self._take_unasked(unasked))
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
            self._note(pending.kind, statuses)
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

    def _restart(self, starts: deque[float]) -> ProcessLink | None:
        """The next process, serving; None when it is not to be had."""
        while True:
            now = time.monotonic()
            while starts and now - starts[0] > RESTART_WINDOW_S:
                starts.popleft()
            if self._gives_up(len(starts)):
                logger.error(
                    "%s: its process ended %d times in %.0f s: the tier stays off",
                    self._name,
                    len(starts),
                    RESTART_WINDOW_S,
                )
                return None
            if self._wait_for_close(BACKOFF_S * 2 ** len(starts)):
                return None
            starts.append(now)
            self.restarts += 1
            link = self._open()
            if link is not None:
                logger.warning("%s: started again as process %d", self._name, link.process.pid)
                return self._bring_up(link)
            if self._closing:
                return None

    def _open(self) -> ProcessLink | None:
        """A process that has said that it is ready; None when it did not."""
        link = self._new_link()
        try:
            link.wait_ready(self._wake_fd)
        except FlexKVError as error:
            logger.error("%s: its process cannot be started: %s", self._name, error)
            link.end()
            return None
        return link

    def _new_link(self) -> ProcessLink:
        return ProcessLink(
            self._worker, self._settings, self._host, self._table_fd, self._environment, self._cpus
        )

    def _bring_up(self, link: ProcessLink) -> ProcessLink:
        with self._lock:
            self._prepare(link)
            if self._closing:
                link.commands.push(make_commands(CommandKind.STOP, 0, ONE, ONE))
            self._link = link
        return link

    # What a kind of process may add

    def _prepare(self, link: ProcessLink) -> None:
        """A process that was started anew is about to take commands; under the lock."""

    def _note(self, kind: CommandKind, statuses: Statuses) -> None:
        """Blocks of a batch of this kind have ended; under the lock."""

    def _take_unasked(self, records: Array) -> None:
        """Completions that belong to no batch."""

    def _gives_up(self, starts: int) -> bool:
        """Whether a process that was started ``starts`` times within RESTART_WINDOW_S is not started again."""
        return starts >= RESTARTS_MAX

    def _wait_for_close(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.poll(seconds * 1000)
        return self._closing


class ProcessLink:
    """One process and the rings to it."""

    def __init__(
        self,
        worker: str,
        settings: Mapping[str, Any],
        host: HostSegment,
        table_fd: int,
        environment: Mapping[str, str] | None,
        cpus: Collection[int] | None,
    ) -> None:
        self.commands = Ring.create(COMMAND, RING_RECORDS)
        self.completions = Ring.create(COMPLETION, RING_RECORDS)
        self._status_fd, status_fd = os.pipe2(os.O_CLOEXEC)
        spec = WorkerSpec(
            settings=dict(settings),
            host_fd=host.handle.memory.fd,
            host_slots=host.slot_count,
            huge_pages=host.handle.huge_pages,
            table_fd=table_fd,
            commands=(*self.commands.handle.fds, RING_RECORDS),
            completions=(*self.completions.handle.fds, RING_RECORDS),
            status_fd=status_fd,
            parent_pid=os.getpid(),
            log_level=logger.getEffectiveLevel(),
            cpus=None if cpus is None else sorted(cpus),
        )
        fds = {
            host.handle.memory.fd,
            table_fd,
            status_fd,
            *self.commands.handle.fds,
            *self.completions.handle.fds,
        }
        try:
            self.process = subprocess.Popen(
                # Not `-m`, which runs the module a second time: importing the package has imported it.
                [sys.executable, "-c", f"from {worker} import main; main()"],
                pass_fds=fds - {-1},
                env=environment,
                cwd=_PACKAGE_ROOT,  # where the package is found, installed or not
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C at the engine's terminal is the manager's to act on
            )
        finally:
            os.close(status_fd)
        self.pid_fd = os.pidfd_open(self.process.pid)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, as wait_ready() finds out
            # A pipe holds 64 KiB without a reader; what is told is a few hundred bytes.
            self.process.stdin.write(spec.to_json())
            self.process.stdin.close()

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
                    "the process was closed while it started" if ready else "no word of the process"
                )
            if not (chunk := os.read(self._status_fd, 65536)):
                raise StorageError(f"the process ended while it started ({_ending(self.process.wait())})")
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


def make_commands(kind: CommandKind, op: int, ssd_slots: Slots, host_slots: Slots) -> Array:
    """Commands of one batch, int32 slots; the caller fills in keys."""
    commands = np.zeros(len(ssd_slots), COMMAND)
    commands["kind"], commands["op"] = kind, op
    commands["ssd_slot"], commands["host_slot"] = ssd_slots, host_slots
    commands["index"] = np.arange(len(ssd_slots))
    return commands


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


ONE: Slots = np.zeros(1, np.int32)
"""For commands about no slot."""
