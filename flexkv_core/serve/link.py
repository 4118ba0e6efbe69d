"""One connection of a client to its server: introduction, calls with a deadline, and what the server says unasked.

A call costs its caller at most its deadline, once: when an answer does not come in time the link is *suspended*, and calls return nothing at
once until the late answer is there. What a late answer has reserved is given back. A link that is broken stays so; the client makes
another.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flexkv_core.errors import FlexKVError
from flexkv_core.serve.address import connect
from flexkv_core.serve.arena import ARENA_BYTES, Arena
from flexkv_core.serve.channel import Channel
from flexkv_core.serve.tenants import Greeting
from flexkv_core.serve.wire import (
    GREETING_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    FrameReader,
    Kind,
    Planned,
    WireError,
    frame,
    pack_asked,
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
        self._reader = FrameReader(PAYLOAD_BYTES_MAX)
        self._poll = select.poll()
        self._number = 0
        self._awaited: Kind | None = None  # of an answer that is late
        self._suspended_at = 0.0
        self._broken = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="flexkv-serve-events", daemon=True)
        self._thread.start()

    @property
    def is_broken(self) -> bool:
        """Whether it is of no use any more."""
        return self._broken.is_set()

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
            keys = keys[:ARENA_BYTES]
            self._arena.write(keys)
            self._calls.send(frame(kind, self._number, pack_asked(len(keys), start_block, purpose)))
            answer = self._wait(deadline)
            if answer is None:
                self._suspended_at = time.monotonic()
                logger.warning(
                    "server: no answer within %.0f ms; requests are computed meanwhile", 1e3 * deadline_s
                )
            return None if answer is None else unpack(answer)
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

    def _wait(self, deadline: float) -> memoryview | None:
        """The answer that is awaited, unless it comes too late; ``deadline`` 0: only what is there. A late one gives back what it has
        reserved."""
        while True:
            timeout_s = max(0.0, deadline - time.monotonic())
            wanted = select.POLLIN | (select.POLLOUT if self._calls.is_blocked else 0)
            self._poll.register(self._calls.socket, wanted)
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

    def _receive(self) -> memoryview | None:
        try:
            count = self._calls.socket.recv_into(self._reader.space())
        except BlockingIOError:
            return None
        if not count:
            raise ConnectionResetError("the server has closed the connection")
        self._reader.received(count)
        for kind, number, payload in self._reader.frames():
            if kind is Kind.ERROR:
                raise Refused(payload.tobytes().decode(errors="replace"))
            if kind is not self._awaited or number != self._number:
                raise WireError(f"answer {number} of kind {kind.name} was not asked for")
            return payload
        return None

    def _give_back(self, answer: memoryview) -> None:
        if self._awaited in (Kind.GET, Kind.PUT, Kind.PREFETCH):
            planned = Planned.unpack(answer)
            if len(planned.slots):
                self._calls.send(frame(Kind.CANCEL, planned.task_id))

    def _break(self, error: Exception | None) -> None:
        if self.is_broken:
            return
        self._broken.set()
        if error is not None:
            logger.warning("server: connection lost: %s", error)
        self._calls.socket.close()
        self._events.shutdown(socket.SHUT_RDWR)  # ends the thread
        self._on_broken(self)

    # The thread

    def _listen(self) -> None:
        reader = FrameReader(PAYLOAD_BYTES_MAX)
        error: Exception | None = None
        while not self.is_broken:
            try:
                count = self._events.recv_into(reader.space())
                if not count:
                    raise ConnectionResetError("the server has closed the connection")
                reader.received(count)
                for kind, number, payload in reader.frames():
                    self._on_event(self, kind, number, payload)
            except (OSError, FlexKVError) as caught:
                error = caught
                break
        with self._lock:
            self._break(error)
            self._arena.close()
        self._events.close()


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
    calls = connect(path, GREETING_TIMEOUT_S)
    fds: list[int] = []
    try:
        calls.sendall(b"".join(frame(Kind.HELLO, 0, greeting.pack())))
        values = _greeted(calls, fds)
        memory, lifeline, events, keys = fds
        fds[:] = [events, keys]
        host = HostSegment.adopt(
            memory, lifeline, int(values["slot_count"]), greeting.model.layout, bool(values["huge_pages"])
        )
        arena = Arena(fds.pop())
        return Link(
            calls,
            socket.socket(fileno=fds.pop()),
            arena,
            host,
            bool(values["has_remote"]),
            on_event,
            on_broken,
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FlexKVError):
            raise
        raise WireError(f"the server's greeting cannot be read: {error!r}") from error
    finally:
        for fd in fds:
            os.close(fd)


def ask_status(path: Path, timeout_s: float) -> dict[str, object]:
    """What ``flexkv status`` shows.

    Raises:
        OSError: there is no server, or it does not answer in time.
        FlexKVError: what it says makes no sense.
    """
    with connect(path, timeout_s) as calls:
        calls.sendall(b"".join(frame(Kind.STATUS, 1)))
        reader = FrameReader(PAYLOAD_BYTES_MAX)
        while True:
            count = calls.recv_into(reader.space())
            if not count:
                raise ConnectionResetError("the server has closed the connection")
            reader.received(count)
            for kind, _, payload in reader.frames():
                if kind is not Kind.STATUS:
                    raise Refused(payload.tobytes().decode(errors="replace"))
                status: dict[str, object] = json.loads(payload.tobytes())
                return status


def _greeted(calls: socket.socket, fds: list[int]) -> dict[str, Any]:
    """The server's answer to HELLO; its descriptors go into ``fds`` as they come."""
    reader = FrameReader(GREETING_BYTES_MAX)
    while True:
        with memoryview(bytearray(4096)) as space:
            count, ancillary, _, _ = calls.recvmsg_into(
                [space], socket.CMSG_SPACE(_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind_of, data in ancillary:
                if level == socket.SOL_SOCKET and kind_of == socket.SCM_RIGHTS:
                    fds.extend(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4))
            if not count:
                raise ConnectionResetError("the server has closed the connection")
            reader.space()[:count] = space[:count]
        reader.received(count)
        for kind, _, payload in reader.frames():
            if kind is Kind.ERROR:
                raise Refused(payload.tobytes().decode(errors="replace"))
            if kind is not Kind.HELLO or len(fds) != _DESCRIPTORS:
                raise WireError(f"{kind.name} with {len(fds)} descriptors is no greeting")
            values: dict[str, Any] = json.loads(payload.tobytes())
            return values
