"""The server: one thread that never waits for a client, around the managers of its tenants.

Matching and planning take microseconds and happen on this thread; memory and disks are opened on others. A client that is stopped, slow or
dead holds back nobody: sockets do not block, what waits for a client is bounded, and a turn serves a bounded number of its frames.
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
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import FlexKVError
from flexkv_core.serve.address import Address, is_trusted, peer_uid
from flexkv_core.serve.arena import Arena
from flexkv_core.serve.channel import Channel
from flexkv_core.serve.session import Session, Tenant
from flexkv_core.serve.tenants import Greeting, Tenants
from flexkv_core.serve.wire import PAYLOAD_BYTES_MAX, Kind, WireError, frame, pack_usage

logger = logging.getLogger(__name__)

SESSIONS_MAX = 31
"""Connected, or gone and not yet released. Times the tasks of a session this stays below what a manager keeps."""
GREETING_TIMEOUT_S = 10.0
"""For a connection to introduce itself; a manager that has to be started first is not counted."""
FRAMES_A_TURN = 64
OUT_BYTES_MAX = 1 << 20
"""What may wait for a client that does not read; beyond it the client is dropped."""
_TICK_S = 1.0


class Server:
    """Listens when it is made; :meth:`run` serves until :meth:`stop`.

    Args:
        path: of the unix socket.
        config: of each manager, see :class:`~flexkv_core.serve.tenants.Tenants`.
        models: how many identities may be held.

    Raises:
        ConfigError: the socket cannot be made, or a server listens there already.
    """

    def __init__(self, path: Path, config: FlexKVConfig, models: int = 1) -> None:
        self._address = Address(path)
        self._started = time.monotonic()
        self._tenants = Tenants(config, models, self._wake)
        self._sessions: dict[int, Session] = {}
        self._waiting: dict[int, Greeting] = {}  # sessions whose manager starts
        self._unread: set[int] = set()  # sessions with whole frames that were not served yet
        self._ended: deque[Session] = deque()
        self._next_number = 0
        self._next_tick = 0.0
        self._stopping = False
        self._epoll = select.epoll()
        self._actions: dict[int, Callable[[int], None]] = {}  # by descriptor; given what epoll says of it
        self._questions: dict[int, Callable[[], bool]] = {}  # by descriptor; what answers lookups at once
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch(self._wake_fd, self._woken)
        self._listen()

    def run(self) -> None:
        """Serve; call once. When it returns the managers have ended and the socket is gone."""
        try:
            while not self._stopping:
                ready = self._epoll.poll(0 if self._unread else self._pause())
                # All at once: what is closed in this turn may come again as another descriptor.
                actions = [
                    (self._actions[fd], events)
                    for fd, events in ready
                    if (is_answered := self._questions.get(fd)) is None or not is_answered()
                ]
                for action, events in actions:
                    action(events)
                if self._unread:
                    self._serve_unread()
                if time.monotonic() >= self._next_tick:
                    self._tick()
        finally:
            self._close()

    def stop(self) -> None:
        """Have :meth:`run` end; from any thread or a signal handler."""
        self._stopping = True
        self._wake()

    # Connections

    def _listen(self) -> None:
        self._watch(self._address.listener.fileno(), self._accept)
        self._is_listening = True

    def _accept(self, events: int) -> None:
        try:
            connected, _ = self._address.listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # gone already
        except OSError as error:  # too many files are open, here or in all: it stays in the queue, which would be reported at once again
            logger.warning("a connection has to wait: %s", error)
            self._unwatch(self._address.listener.fileno())
            self._is_listening = False  # until the next tick
            return
        uid = peer_uid(connected)
        if not is_trusted(uid) or len(self._sessions) >= SESSIONS_MAX:
            reason = "too many clients" if is_trusted(uid) else f"user {uid} may not connect"
            logger.warning("a connection was refused: %s", reason)
            connected.setblocking(False)
            with contextlib.suppress(OSError):
                connected.send(frame(Kind.ERROR, 0, reason.encode()), socket.MSG_NOSIGNAL)
            connected.close()
            return
        self._next_number += 1
        session = Session(
            self._next_number, Channel(connected, OUT_BYTES_MAX), time.monotonic(), self._session_ended
        )
        self._sessions[session.number] = session
        self._watch_channel(session.calls, partial(self._guard, session, self._on_calls))

    def _on_calls(self, session: Session, events: int) -> None:
        """Requests have come, or there is room for answers."""
        if events & ~select.EPOLLOUT:
            try:
                count = session.calls.socket.recv_into(session.reader.space())
            except BlockingIOError:
                return
            if not count:
                raise ConnectionResetError("closed")
            session.reader.received(count)
            self._serve_frames(session)
        if events & select.EPOLLOUT:
            session.calls.flush()

    def _serve_unread(self) -> None:
        for number in list(self._unread):
            self._unread.discard(number)
            session = self._sessions.get(number)
            if session is not None and session.is_connected:
                self._guard(session, self._serve_frames)

    def _serve_frames(self, session: Session) -> None:
        for _ in range(FRAMES_A_TURN):
            if (one := session.reader.next()) is None:
                return
            kind, number, payload = one
            if session.tenant is not None:
                session.serve(kind, number, payload)
            elif kind is Kind.STATUS:
                session.calls.send(frame(kind, number, json.dumps(self._status()).encode()))
            elif kind is Kind.HELLO and session.number not in self._waiting:
                greeting = Greeting.unpack(payload)
                session.name = greeting.name
                self._waiting[session.number] = greeting
                self._welcome(session, greeting)
            else:
                raise WireError(f"{kind.name} may not come first")
        self._unread.add(session.number)

    def _welcome(self, session: Session, greeting: Greeting) -> None:
        """Give a client its manager, once there is one.

        Raises:
            FlexKVError: there is none for it.
        """
        tenant = self._tenants.find(greeting)
        if tenant is None:
            return
        del self._waiting[session.number]
        session.tenant = tenant
        session.reader.payload_bytes_max = PAYLOAD_BYTES_MAX
        self._send_descriptors(session, tenant)
        self._questions[session.calls.socket.fileno()] = session.is_answered
        logger.info("client %d: %s", session.number, session.name)

    def _send_descriptors(self, session: Session, tenant: Tenant) -> None:
        """The host tier's memory, the client's end of the lifeline, its end of the events' socket, and the memory for keys.

        What is made here is watched before it is sent: a client that has left already is cleared away like any other.
        """
        handle = tenant.manager.host.handle
        values = {"slot_count": handle.slot_count, "huge_pages": handle.huge_pages}
        values["has_remote"] = tenant.manager.config.remote_url is not None
        answer = frame(Kind.HELLO, 0, json.dumps(values).encode())
        with contextlib.ExitStack() as stack:
            session.lifeline_fd, lifeline = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, lifeline)  # or its end would never be seen
            self._watch(session.lifeline_fd, partial(self._guard, session, self._on_lifeline))
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            stack.callback(theirs.close)
            session.events = Channel(mine, OUT_BYTES_MAX)
            self._watch_channel(session.events, partial(self._guard, session, self._on_events))
            session.arena = Arena.create()
            fds = [handle.memory.fd, lifeline, theirs.fileno(), session.arena.fd]
            sent = socket.send_fds(session.calls.socket, [answer], fds, socket.MSG_NOSIGNAL)
        if sent != len(answer):
            raise WireError("it does not read")

    def _on_events(self, session: Session, events: int) -> None:
        """The client has closed its end, or reads again."""
        assert session.events is not None
        if events & ~select.EPOLLOUT and not session.events.socket.recv(64):
            raise ConnectionResetError("closed")
        if events & select.EPOLLOUT:
            session.events.flush()

    def _on_lifeline(self, session: Session, events: int) -> None:
        """Nobody writes into it: this is its end."""
        if not os.read(session.lifeline_fd, 64):
            self._unwatch(session.lifeline_fd)
            self._disconnect(session, "all its processes have ended")
            session.lifeline_closed()
            self._next_tick = 0.0

    # One client's trouble is its own

    def _guard(self, session: Session, action: Callable[..., None], *events: int) -> None:
        """Do something for a session, which is dropped where that cannot be done."""
        try:
            action(session, *events)
        except (FlexKVError, OSError) as error:
            if isinstance(error, FlexKVError):
                self._say_error(session, str(error))
            self._disconnect(session, str(error))

    def _watch_channel(self, channel: Channel, action: Callable[[int], None]) -> None:
        """:meth:`_watch`, and have it called as well when there is room for what waits."""
        fd = channel.socket.fileno()
        self._watch(fd, action)

        def on_blocked(is_blocked: bool) -> None:
            self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if is_blocked else 0))

        channel.on_blocked = on_blocked

    def _watch(self, fd: int, action: Callable[[int], None]) -> None:
        """Have ``action`` called when something has come, or the other side is gone."""
        self._epoll.register(fd, select.EPOLLIN)
        self._actions[fd] = action

    def _unwatch(self, fd: int) -> None:
        """Before it is closed."""
        self._epoll.unregister(fd)
        del self._actions[fd]

    def _say_error(self, session: Session, text: str) -> None:
        try:
            session.calls.send(frame(Kind.ERROR, 0, text.encode()))
        except (OSError, WireError):
            logger.debug("client %d could not be told: %s", session.number, text)

    def _disconnect(self, session: Session, reason: str) -> None:
        """Close the connection. The session stays until nobody can touch its slots any more."""
        if not session.is_connected:
            return
        logger.info("client %d (%s) has left: %s", session.number, session.name or "no name", reason)
        self._questions.pop(session.calls.socket.fileno(), None)
        self._unwatch(session.calls.socket.fileno())
        if session.events is not None:
            self._unwatch(session.events.socket.fileno())
        session.disconnect()
        self._waiting.pop(session.number, None)
        if session.lifeline_fd < 0:
            del self._sessions[session.number]

    # Now and then

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _session_ended(self, session: Session) -> None:
        """A task of the session has ended; on any thread."""
        self._ended.append(session)
        self._wake()

    def _woken(self, events: int) -> None:
        os.eventfd_read(self._wake_fd)
        while self._ended:
            self._guard(self._ended.popleft(), Session.send_ended)
        for number, greeting in list(self._waiting.items()):
            self._guard(self._sessions[number], partial(self._welcome, greeting=greeting))

    def _pause(self) -> float:
        return max(0.0, self._next_tick - time.monotonic())

    def _tick(self) -> None:
        """Release what the dead have left, see what takes long, drop who never said a word, and tell how full the tiers are."""
        now = time.monotonic()
        self._next_tick = now + _TICK_S
        if not self._is_listening:
            self._listen()
        for tenant in self._tenants.all.values():
            tenant.overdue.clear()
        for session in list(self._sessions.values()):
            session.note_overdue(now)
            if session.release_at is not None:
                if session.release_at <= now:
                    del self._sessions[session.number]
                    logger.info("client %d: %d tasks were given up", session.number, session.release())
                else:
                    self._next_tick = min(self._next_tick, session.release_at)
            elif session.tenant is None and session.number not in self._waiting:
                if now - session.since > GREETING_TIMEOUT_S:
                    self._disconnect(session, "it did not introduce itself")
            elif session.is_connected and session.tenant is not None:
                self._guard(session, self._tell_usage)

    def _tell_usage(self, session: Session) -> None:
        assert session.tenant is not None
        assert session.events is not None
        usage = session.tenant.manager.usage()
        if session.told_usage != usage:
            session.told_usage = usage
            session.events.send(frame(Kind.USAGE, 0, pack_usage(*usage)))

    def _status(self) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "socket": str(self._address.path),
            "uptime_s": round(time.monotonic() - self._started, 1),
            "models": [self._model_status(tenant) for tenant in self._tenants.all.values()],
        }

    def _model_status(self, tenant: Tenant) -> dict[str, object]:
        used, total = tenant.manager.usage()
        layout = tenant.manager.layout
        clients = [
            {
                "name": session.name,
                "connected": session.is_connected,
                "requests": session.requests,
                "tasks": len(session.tasks) + len(session.prefetches),
            }
            for session in self._sessions.values()
            if session.tenant is tenant
        ]
        return {
            "model": tenant.name,
            "tokens_per_block": layout.tokens_per_block,
            "host_blocks_used": used,
            "host_blocks": total,
            "host_bytes": total * layout.slot_bytes,
            "clients": clients,
            "counters": tenant.manager.counters().as_dict(),
        }

    def _close(self) -> None:
        for session in list(self._sessions.values()):
            self._disconnect(session, "the server ends")
        self._epoll.close()
        self._address.stop_listening()
        closing = threading.Thread(target=self._tenants.close, name="flexkv-close")
        closing.start()
        closing.join()
        self._address.close()
