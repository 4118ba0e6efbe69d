"""One client, seen from the server: its connection, its tasks, and the pipe that says whether any of its processes can touch a slot.

Death of a client. The processes of an engine that map the segment hold the writing end of the session's lifeline (see
:class:`~flexkv_core.storage.memory.SegmentHandle`). The connection may break, or the scheduler's process may die, while a worker still copies
into a slot; so a broken connection frees nothing. Only when the pipe is closed by all, and RELEASE_GRACE_S have passed for what a device
may still have under way, are the session's gets released and its puts aborted.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from flexkv_core.block_manager import BlockManager
from flexkv_core.serve.arena import Arena
from flexkv_core.serve.channel import Channel
from flexkv_core.serve.relay import RelayExecutor
from flexkv_core.serve.wire import (
    GREETING_BYTES_MAX,
    FrameReader,
    Kind,
    Planned,
    WireError,
    frame,
    pack_count,
    pack_done,
    unpack_asked,
    unpack_result,
    unpack_size,
)
from flexkv_core.tasks import Purpose, TaskDone
from flexkv_core.types import Slots

_NONE: Slots = np.empty(0, np.int32)

RELEASE_GRACE_S = 1.0
"""A process that is killed is out of its memory before its end of the pipe is closed; a copy that its device has under way is one piece of at
most 48 MiB, milliseconds."""
OVERDUE_S = 10.0
"""A put that has not ended for so long makes way for another client's of the same blocks. Most take milliseconds, but an engine plans a put
before it computes, and a step of a large prompt on a CPU takes longer than this."""
TASKS_MAX = 2048
"""Tasks of one session; more are refused, which makes misses. Times SESSIONS_MAX of the server this stays below what a manager keeps."""


@dataclass
class Tenant:
    """One identity: its manager, and the executor that stands for the clients' devices. ``overdue``: gets and puts that have not ended for
    OVERDUE_S, and the numbers of their sessions."""

    name: str
    manager: BlockManager
    relay: RelayExecutor
    overdue: dict[int, int] = field(default_factory=dict)


@dataclass
class _Open:
    """A get or put that has not ended."""

    blocks: int
    since: float  # time.monotonic()
    launched: bool = False


@dataclass
class Session:
    """See the module's text. All methods run on the server's thread but :meth:`_ended` and :meth:`_fetched`, which run under the manager's lock.

    ``calls`` carries requests and answers, ``events`` what the server says unasked; ``lifeline_fd`` is the reading end of the pipe, -1 before the
    client has introduced itself. ``wake``: has the server call :meth:`send_ended`.
    """

    number: int
    calls: Channel
    since: float
    wake: Callable[[Session], None]
    tenant: Tenant | None = None
    events: Channel | None = None
    arena: Arena | None = None
    lifeline_fd: int = -1
    is_connected: bool = True
    release_at: float | None = None
    name: str = ""
    requests: int = 0
    told_usage: tuple[int, int] = (-1, -1)
    reader: FrameReader = field(default_factory=lambda: FrameReader(GREETING_BYTES_MAX))
    tasks: dict[int, _Open] = field(default_factory=dict)  # gets and puts that have not ended
    prefetches: set[int] = field(default_factory=set)  # that have not ended
    fetches: set[int] = field(default_factory=set)  # that are waited for, by the client's numbers
    _answer: Callable[[], bool] | None = None
    _done: deque[TaskDone | int] = field(default_factory=deque)  # and fetches

    def is_answered(self) -> bool:
        """Whether all that has come was one question about a match, which was answered; it is in the order of what came before."""
        if not self.reader.is_empty or self.calls.is_blocked:
            return False
        if self._answer is None:
            assert self.tenant is not None
            assert self.arena is not None
            fd, memory = self.calls.socket.fileno(), self.arena.memory
            self._answer = partial(self.tenant.manager.answer_match, fd, Kind.MATCH, memory)
        answered = self._answer()
        self.requests += answered
        return answered

    def serve(self, kind: Kind, number: int, payload: memoryview) -> None:
        """Serve one frame of a client that has introduced itself.

        Raises:
            WireError: it makes no sense.
            OSError: the connection is broken.
        """
        assert self.tenant is not None
        assert self.arena is not None
        self.requests += 1
        manager = self.tenant.manager
        if kind is Kind.MATCH:
            blocks = manager.match_keys(self.arena.look(unpack_size(payload)))
            self.calls.send(frame(kind, number, pack_count(blocks)))
        elif kind in (Kind.GET, Kind.PREFETCH, Kind.PUT):
            self.calls.send(frame(kind, number, *self._plan(kind, payload).pack()))
        elif kind is Kind.FETCH:
            self.calls.send(frame(kind, number, pack_count(self._fetch(payload))))
        elif kind is Kind.LAUNCH:
            self._launch(number)
        elif kind is Kind.RESULT:
            self._take_result(number, payload)
        elif kind is Kind.CANCEL:
            self._cancel(number)
        elif kind is Kind.RESET:
            manager.reset()
            self.calls.send(frame(kind, number, pack_count(0)))
        else:
            raise WireError(f"{kind.name} may not come from a client now")

    def send_ended(self) -> None:
        """Tell the client of tasks that have ended; OSError or WireError if it cannot be told."""
        while self._done:
            done = self._done.popleft()
            if isinstance(done, int):
                self.fetches.discard(done)
                if self.events is not None and self.is_connected:
                    self.events.send(frame(Kind.FETCHED, done))
                continue
            is_known = self.tasks.pop(done.task_id, None) is not None or done.task_id in self.prefetches
            self.prefetches.discard(done.task_id)
            if is_known and self.events is not None and self.is_connected:
                self.events.send(frame(Kind.DONE, done.task_id, *pack_done(done)))

    def disconnect(self) -> None:
        """The connection is of no use any more. What the client's processes may still touch stays theirs."""
        if not self.is_connected:
            return
        self.is_connected = False
        self.calls.socket.close()
        if self.events is not None:
            self.events.socket.close()
        if self.arena is not None:
            self.arena.close()

    def lifeline_closed(self) -> None:
        """Every process of the client has closed its end."""
        self.disconnect()
        self.release_at = time.monotonic() + RELEASE_GRACE_S

    def release(self) -> int:
        """Nobody can touch the slots of the session any more: abort its puts and drop its leases; how many tasks that were."""
        if self.lifeline_fd >= 0:
            os.close(self.lifeline_fd)
            self.lifeline_fd = -1
        count = len(self.tasks)
        if self.tenant is not None:
            for task_id in list(self.tasks):
                self.tenant.relay.give_up(task_id)  # those that were launched
                self.tenant.manager.cancel(task_id)  # the others
        self.tasks.clear()
        return count

    def note_overdue(self, now: float) -> None:
        """Enter what has not ended for long into the tenant's ``overdue``."""
        for task_id, task in self.tasks.items():
            if now - task.since > OVERDUE_S:
                assert self.tenant is not None
                self.tenant.overdue[task_id] = self.number

    def _plan(self, kind: Kind, payload: memoryview) -> Planned:
        assert self.tenant is not None
        assert self.arena is not None
        manager = self.tenant.manager
        size, start, purpose = unpack_asked(payload)
        keys = self.arena.read(size if len(self.tasks) + len(self.prefetches) < TASKS_MAX else 0)
        if kind is Kind.PREFETCH:
            return self._prefetch(keys, start)
        if purpose is Purpose.PREFETCH:
            raise WireError("a prefetch has a kind of its own")
        if kind is Kind.PUT:
            self._push_aside(keys)
            task_id, start, count = manager.put_keys(keys, self._ended, start)
        else:
            task_id, count = manager.get_keys(keys, start, self._ended, purpose)
        if not count:
            return Planned(task_id, start, _NONE, _NONE)
        self.tasks[task_id] = _Open(count, time.monotonic())
        slots, reads = manager.slots_of(task_id)
        return Planned(task_id, start, slots, reads)

    def _push_aside(self, keys: bytes) -> None:
        """Have others' overdue puts of the same blocks make way: a client that is stopped must not keep others from storing. Its own stay:
        they may only be slow, and what they copy is good."""
        assert self.tenant is not None
        for task_id, owner in self.tenant.overdue.items():
            if owner != self.number:
                self.tenant.manager.disown(task_id, keys)

    def _prefetch(self, keys: bytes, start: int) -> Planned:
        """Its answer names no slots, only how many blocks are read; with none, how many are there, in the place of the first block."""
        assert self.tenant is not None
        task_id, reads = self.tenant.manager.prefetch_keys(keys, start, self._ended)
        if reads:
            self.prefetches.add(task_id)
            return Planned(task_id, 0, _NONE, np.arange(reads, dtype=np.int32))
        ended = (done for done in self._done if isinstance(done, TaskDone))
        there = next((len(done.ok) for done in ended if done.task_id == task_id), 0)
        return Planned(task_id, there, _NONE, _NONE)

    def _fetch(self, payload: memoryview) -> bool:
        assert self.tenant is not None
        assert self.arena is not None
        size, number, _ = unpack_asked(payload)
        if number in self.fetches or len(self.fetches) >= TASKS_MAX:
            return False
        self.fetches.add(number)
        waits = self.tenant.manager.fetch_keys(self.arena.read(size), partial(self._fetched, number))
        if not waits:
            self.fetches.discard(number)
        return waits

    def _launch(self, task_id: int) -> None:
        assert self.tenant is not None
        task = self.tasks.get(task_id)
        if task is None or task.launched:
            raise WireError(f"task {task_id} cannot be launched: it is not there, or was launched already")
        task.launched = True
        layout = self.tenant.manager.layout
        self.tenant.manager.launch_blocks(task_id, np.zeros(task.blocks * layout.blocks_per_slot, np.int64))

    def _take_result(self, task_id: int, payload: memoryview) -> None:
        assert self.tenant is not None
        result = unpack_result(task_id, payload)
        if task_id not in self.tasks or self.tenant.relay.blocks_of(task_id) != len(result.ok):
            raise WireError(
                f"a result of {len(result.ok)} blocks for task {task_id}, which is no copy of that many"
            )
        self.tenant.relay.report(result)

    def _cancel(self, task_id: int) -> None:
        """Of one that was launched, only the client knows the end; a prefetch ends by itself."""
        assert self.tenant is not None
        if task_id in self.tasks and not self.tasks[task_id].launched:
            self.tenant.manager.cancel(task_id)
            del self.tasks[task_id]

    def _ended(self, done: TaskDone) -> None:
        self._done.append(done)
        self.wake(self)

    def _fetched(self, number: int) -> None:
        self._done.append(number)
        self.wake(self)
