"""One connection of a client to its server: introduction, calls with a deadline, and what the server says unasked.

A call costs its caller at most its deadline, once: when an answer does not come in time the link is *suspended*, and calls return nothing at
once until the late answer is there. What a late answer has reserved is given back. A link that is broken stays so; the client makes
another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flexkv_core.errors import FlexKVError
from flexkv_core.native import ask_match
from flexkv_core.serve.address import connect
from flexkv_core.serve.arena import ARENA_BYTES, Arena
from flexkv_core.serve.channel import Channel
from flexkv_core.serve.tenants import Greeting
from flexkv_core.serve.wire import (
    GREETING_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    SLOTS_MAX,
    FrameReader,
    Kind,
    Planned,
    WireError,
    frame,
    pack_asked,
    unpack_count,
)
from flexkv_core.storage.memory import HostSegment
from flexkv_core.tasks import Purpose

logger = logging.getLogger(__name__)

GREETING_TIMEOUT_S = 60.0
"""For the server's answer to the introduction: it may have to open disks first."""
SUSPENDED_MAX_S = 10.0
"""A server that has not answered for so long is given up; another connection is tried."""
OUTBOX_BYTES_MAX = 8 << 20
"""What may wait for a suspended server to read; beyond it the link is broken."""
_DESCRIPTORS = 4
_WORDS_BYTES_MAX = 4096

_Answer = TypeVar("_Answer")


class Refused(FlexKVError, RuntimeError):
    """The server has no place for this client, and says why."""


class Link:
    """See the module's text. Any thread may call; one call is under way at a time.

    Args:
        calls, events: connected sockets.
        arena: the memory for keys.
        has_remote: whether the server has a remote tier.
        host: the server's segment, which this link's user closes when nothing uses it any more.
        on_event: called with each frame that the server sends unasked, on a thread of the link's own.
        on_broken: called once, on any thread, when the link is of no use any more.
    """

    def __init__(
        self,
        calls: socket.socket,
        events: socket.socket,
        arena: Arena,
        host: HostSegment,
        has_remote: bool,
        on_event: Callable[[Link, Kind, int, memoryview], None],
        on_broken: Callable[[Link], None],
    ) -> None:
        self.has_remote = has_remote
        self.host = host
        self._arena = arena
        self._calls, self._events = Channel(calls, OUTBOX_BYTES_MAX), events
        self._on_event, self._on_broken = on_event, on_broken
        self._lock = threading.RLock()
        self._fd = calls.fileno()
        self._reader = FrameReader(PAYLOAD_BYTES_MAX)
        self._poll = select.poll()
        self._poll.register(calls, select.POLLIN)
        self._calls.on_blocked = self._watch
        self._number = 0
        self._awaited: Kind | None = None  # of an answer that is late
        self._suspended_at = 0.0
        self.is_broken = False
        """Whether it is of no use any more; never false again."""
        self._thread = threading.Thread(target=self._listen, name="flexkv-serve-events", daemon=True)
        self._thread.start()

    def call(
        self,
        kind: Kind,
        keys: bytes,
        deadline_s: float,
        unpack: Callable[[memoryview], _Answer],
        start_block: int = 0,
        purpose: Purpose = Purpose.GET,
    ) -> _Answer | None:
        """Ask, and wait ``deadline_s`` for the answer, which ``unpack`` takes from its payload; None if there is none.

        ``keys``: at most ARENA_BYTES of them are asked for.
        """
        deadline = time.monotonic() + deadline_s
        if not self._lock.acquire(timeout=deadline_s):
            return None
        try:
            if not self._is_usable():
                return None
            self._number += 1
            self._awaited = kind
            self._ask(kind, keys[:ARENA_BYTES], start_block, purpose)
            answer = self._wait_or_suspend(deadline, deadline_s)
            return None if answer is None else unpack(answer)
        except (OSError, FlexKVError) as error:
            self._break(error)
            return None
        finally:
            self._lock.release()

    def match(self, keys: bytes, deadline_s: float) -> int | None:
        """The answer to MATCH, as :meth:`call`; where nothing else is under way, in one step of C."""
        deadline = time.monotonic() + deadline_s
        if not self._lock.acquire(timeout=deadline_s):
            return None
        try:
            if (self._awaited is not None or self.is_broken) and not self._is_usable():
                return None
            self._number += 1
            self._awaited = Kind.MATCH
            memory, keys = self._arena.memory, keys[:ARENA_BYTES]
            found = -1
            if self._calls.is_blocked:
                self._ask(Kind.MATCH, keys)
            else:
                timeout_s = max(0.0, deadline - time.monotonic())
                try:
                    found = ask_match(self._fd, memory, keys, Kind.MATCH, self._number, timeout_s)
                except BlockingIOError:
                    self._ask(Kind.MATCH, keys)
            if found < 0:
                answer = self._wait_or_suspend(deadline, deadline_s)
                return None if answer is None else unpack_count(answer)
            self._awaited = None
            return found
        except (OSError, FlexKVError) as error:
            self._break(error)
            return None
        finally:
            self._lock.release()

    def tell(self, kind: Kind, number: int, *parts: bytes) -> None:
        """Say something that is not answered; it is sent when the server reads. Lost where the link breaks."""
        with self._lock:
            if self.is_broken:
                return
            try:
                self._calls.send(frame(kind, number, *parts))
            except (OSError, FlexKVError) as error:
                self._break(error)

    def close(self) -> None:
        """End the connection; ``on_broken`` is called if it was not. The segment stays mapped."""
        with self._lock:
            self._break(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # Under the lock

    def _is_usable(self) -> bool:
        """Whether a call may be made: takes in a late answer, if there is one now."""
        if self.is_broken:
            return False
        if self._awaited is None:
            return True
        self._calls.flush()
        if self._wait(0.0) is not None:
            logger.info("server: it answers again")
            return True
        if time.monotonic() - self._suspended_at > SUSPENDED_MAX_S:
            raise WireError(f"no answer for {SUSPENDED_MAX_S:.0f} s")
        return False

    def _ask(self, kind: Kind, keys: bytes, start_block: int = 0, purpose: Purpose = Purpose.GET) -> None:
        """Send a question; it waits where the server does not read."""
        self._arena.memory[: len(keys)] = keys
        self._calls.send(frame(kind, self._number, pack_asked(len(keys), start_block, purpose)))

    def _wait_or_suspend(self, deadline: float, deadline_s: float) -> memoryview | None:
        """:meth:`_wait`; what begins when nothing comes is said with the seconds that were waited."""
        answer = self._wait(deadline)
        if answer is None:
            self._suspended_at = time.monotonic()
            logger.warning(
                "server: no answer within %.0f ms; requests are computed meanwhile", 1e3 * deadline_s
            )
        return answer

    def _wait(self, deadline: float) -> memoryview | None:
        """The answer that is awaited, unless it comes too late; ``deadline`` 0: only what is there. A late one gives back what it has
        reserved."""
        while True:
            timeout_s = max(0.0, deadline - time.monotonic())
            for _, events in self._poll.poll(1e3 * timeout_s):
                if events & select.POLLOUT:
                    self._calls.flush()
                if events & ~select.POLLOUT and (answer := self._receive()) is not None:
                    if not deadline:
                        self._give_back(answer)
                    self._awaited = None
                    return answer
            if time.monotonic() >= deadline:
                return None

    def _watch(self, is_blocked: bool) -> None:
        self._poll.modify(self._calls.socket, select.POLLIN | (select.POLLOUT if is_blocked else 0))

    def _receive(self) -> memoryview | None:
        try:
            count = self._calls.socket.recv_into(self._reader.space())
        except BlockingIOError:
            return None
        if not count:
            raise ConnectionResetError("the server has closed the connection")
        self._reader.received(count)
        if (answer := self._reader.next()) is None:
            return None
        kind, number, payload = answer
        if kind is Kind.ERROR:
            raise Refused(_words(payload))
        if kind is not self._awaited or number != self._number:
            raise WireError(f"answer {number} of kind {kind.name} was not asked for")
        return payload

    def _give_back(self, answer: memoryview) -> None:
        if self._awaited in (Kind.GET, Kind.PUT, Kind.PREFETCH):
            planned = Planned.unpack(answer)
            if len(planned.slots):
                self._calls.send(frame(Kind.CANCEL, planned.task_id))

    def _break(self, error: Exception | None) -> None:
        if self.is_broken:
            return
        self.is_broken = True
        if error is not None:
            logger.warning("server: connection lost: %s", error)
        self._calls.socket.close()
        self._events.shutdown(socket.SHUT_RDWR)  # ends the thread
        self._on_broken(self)

    # The thread

    def _listen(self) -> None:
        """However it ends, the link is broken then: without this thread no task would ever end."""
        error: Exception | None = RuntimeError("what the server said could not be taken in")
        try:
            self._take_events()
            error = None
        except (OSError, FlexKVError) as caught:
            error = caught
        finally:
            with self._lock:
                self._break(error)
                self._arena.close()
            self._events.close()

    def _take_events(self) -> None:
        reader = FrameReader(PAYLOAD_BYTES_MAX)
        while not self.is_broken:
            count = self._events.recv_into(reader.space())
            if not count:
                raise ConnectionResetError("the server has closed the connection")
            reader.received(count)
            for kind, number, payload in reader.frames():
                self._on_event(self, kind, number, payload)


def open_link(
    path: Path,
    greeting: Greeting,
    on_event: Callable[[Link, Kind, int, memoryview], None],
    on_broken: Callable[[Link], None],
) -> Link:
    """Connect, introduce oneself, map the server's segment. Takes up to GREETING_TIMEOUT_S.

    Raises:
        OSError: there is no server, or it went away.
        Refused: it does not want this client.
        FlexKVError: what it says makes no sense, or its memory cannot be mapped.
    """
    deadline = time.monotonic() + GREETING_TIMEOUT_S
    calls = connect(path, GREETING_TIMEOUT_S)
    fds: list[int] = []
    with contextlib.ExitStack() as undo:
        undo.callback(calls.close)
        undo.callback(_close_all, fds)
        calls.sendall(frame(Kind.HELLO, 0, greeting.pack()))
        terms = _greeted(calls, fds, deadline)
        memory, lifeline, events_fd, keys = fds
        fds[:] = [events_fd, keys]
        host = HostSegment.adopt(memory, lifeline, terms.slot_count, greeting.model.layout, terms.huge_pages)
        undo.callback(host.close)  # else its lifeline would stay open, and the server hold a place for nobody
        arena = Arena(fds.pop())
        undo.callback(arena.close)
        events = socket.socket(fileno=events_fd)
        fds.clear()
        undo.pop_all()
    return Link(calls, events, arena, host, terms.has_remote, on_event, on_broken)


def ask_status(path: Path, timeout_s: float) -> dict[str, object]:
    """What ``flexkv status`` shows.

    Raises:
        OSError: there is no server, or it does not answer in time.
        FlexKVError: what it says makes no sense.
    """
    deadline = time.monotonic() + timeout_s
    with connect(path, timeout_s) as calls:
        calls.sendall(frame(Kind.STATUS, 1))
        reader = FrameReader(PAYLOAD_BYTES_MAX)
        while True:
            calls.settimeout(_left(deadline))
            count = calls.recv_into(reader.space())
            if not count:
                raise ConnectionResetError("the server has closed the connection")
            reader.received(count)
            for kind, _, payload in reader.frames():
                if kind is not Kind.STATUS:
                    raise Refused(_words(payload))
                return _json(payload)


@dataclass(frozen=True)
class _Terms:
    """What the server's greeting says."""

    slot_count: int
    huge_pages: bool
    has_remote: bool

    @classmethod
    def unpack(cls, payload: memoryview) -> _Terms:
        """WireError if it is something else."""
        values = _json(payload)
        slots, huge_pages, has_remote = (
            values.get(name) for name in ("slot_count", "huge_pages", "has_remote")
        )
        if type(slots) is not int or not 0 < slots < SLOTS_MAX:
            raise WireError(f"the server's greeting cannot be read: slot_count = {slots!r}")
        return cls(slots, bool(huge_pages), bool(has_remote))


def _greeted(calls: socket.socket, fds: list[int], deadline: float) -> _Terms:
    """The server's answer to HELLO; its descriptors go into ``fds`` as they come."""
    reader = FrameReader(GREETING_BYTES_MAX)
    while True:
        calls.settimeout(_left(deadline))
        with memoryview(bytearray(4096)) as space:
            count, ancillary, _, _ = calls.recvmsg_into(
                [space], socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind_of, data in ancillary:
                if level == socket.SOL_SOCKET and kind_of == socket.SCM_RIGHTS:
                    fds.extend(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4))
            if not count:
                raise ConnectionResetError("the server has closed the connection")
            if len(fds) > _DESCRIPTORS:
                raise WireError(f"{len(fds)} descriptors; {_DESCRIPTORS} are expected")
            reader.space()[:count] = space[:count]
        reader.received(count)
        for kind, _, payload in reader.frames():
            if kind is Kind.ERROR:
                raise Refused(_words(payload))
            if kind is not Kind.HELLO or len(fds) != _DESCRIPTORS:
                raise WireError(f"{kind.name} with {len(fds)} descriptors is no greeting")
            return _Terms.unpack(payload)


def _left(deadline: float) -> float:
    """Seconds until ``deadline``; TimeoutError if it is over, however much came until now."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the server's answer did not come in time")
    return left


def _words(payload: memoryview) -> str:
    """What the server says of an error, for people."""
    return payload[:_WORDS_BYTES_MAX].tobytes().decode(errors="replace")


def _json(payload: memoryview) -> dict[str, Any]:
    try:
        values = json.loads(payload.tobytes())
    except (ValueError, RecursionError) as error:
        raise WireError(f"the server's answer cannot be read: {error!r}") from error
    if not isinstance(values, dict):
        raise WireError(f"the server's answer is a {type(values).__name__}")
    return values


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
