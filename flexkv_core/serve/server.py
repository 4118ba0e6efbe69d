"""The server: one thread that never waits for a client, around the managers of its tenants.

Matching and planning take microseconds and happen on this thread; memory and disks are opened on others. A client that is stopped, slow or
dead holds back nobody: sockets do not block, what waits for a client is bounded, and a turn serves a bounded number of its frames.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
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
        self._selector = selectors.EpollSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._woken)
        self._listen()

    def run(self) -> None:
        """Serve; call once. When it returns the managers have ended and the socket is gone."""
        try:
            while not self._stopping:
                for key, events in self._selector.select(0 if self._unread else self._pause()):
                    key.data(events)
                for number in list(self._unread):
                    self._unread.discard(number)
                    session = self._sessions.get(number)
                    if session is not None and session.is_connected:
                        self._guard(session, self._serve_frames)
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
        self._selector.register(self._address.listener, selectors.EVENT_READ, self._accept)
        self._is_listening = True

    def _accept(self, events: int) -> None:
        try:
            connected, _ = self._address.listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # gone already
        except OSError as error:  # too many files are open, here or in all: it stays in the queue, which would be reported at once again
            logger.warning("a connection has to wait: %s", error)
            self._selector.unregister(self._address.listener)
            self._is_listening = False  # until the next tick
            return
        uid = peer_uid(connected)
        if not is_trusted(uid) or len(self._sessions) >= SESSIONS_MAX:
            reason = "too many clients" if is_trusted(uid) else f"user {uid} may not connect"
            logger.warning("a connection was refused: %s", reason)
            connected.setblocking(False)
            with contextlib.suppress(OSError):
                connected.send(b"".join(frame(Kind.ERROR, 0, reason.encode())), socket.MSG_NOSIGNAL)
            connected.close()
            return
        self._next_number += 1
        session = Session(
            self._next_number, Channel(connected, OUT_BYTES_MAX), time.monotonic(), self._session_ended
        )
        self._sessions[session.number] = session
        on_calls = partial(self._guard_events, session, self._on_calls)
        self._selector.register(connected, selectors.EVENT_READ, on_calls)

    def _on_calls(self, session: Session, events: int) -> None:
        """Requests have come, or there is room for answers."""
        if events & selectors.EVENT_READ:
            space = session.reader.space()
            try:
                count = session.calls.socket.recv_into(space)
            except BlockingIOError:
                return
            if not count:
                raise ConnectionResetError("closed")
            session.reader.received(count)
            self._serve_frames(session)
        if events & selectors.EVENT_WRITE:
            session.calls.flush()

    def _serve_frames(self, session: Session) -> None:
        for served, (kind, number, payload) in enumerate(session.reader.frames(), 1):
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
            if served >= FRAMES_A_TURN:
                self._unread.add(session.number)
                break

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
        logger.info("client %d: %s", session.number, session.name)

    def _send_descriptors(self, session: Session, tenant: Tenant) -> None:
        """The host tier's memory, the client's end of the lifeline, its end of the events' socket, and the memory for keys.

        What is made here is watched before it is sent: a client that has left already is cleared away like any other.
        """
        handle = tenant.manager.host.handle
        values = {"slot_count": handle.slot_count, "huge_pages": handle.huge_pages}
        values["has_remote"] = tenant.manager.config.remote_url is not None
        answer = b"".join(frame(Kind.HELLO, 0, json.dumps(values).encode()))
        with contextlib.ExitStack() as stack:
            session.lifeline_fd, lifeline = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, lifeline)  # or its end would never be seen
            closed = partial(self._guard_events, session, self._on_lifeline)
            self._selector.register(session.lifeline_fd, selectors.EVENT_READ, closed)
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            stack.callback(theirs.close)
            session.events = Channel(mine, OUT_BYTES_MAX)
            on_events = partial(self._guard_events, session, self._on_events)
            self._selector.register(mine, selectors.EVENT_READ, on_events)
            session.arena = Arena.create()
            fds = [handle.memory.fd, lifeline, theirs.fileno(), session.arena.fd]
            sent = socket.send_fds(session.calls.socket, [answer], fds, socket.MSG_NOSIGNAL)
        if sent != len(answer):
            raise WireError("it does not read")

    def _on_events(self, session: Session, events: int) -> None:
        """The client has closed its end, or reads again."""
        assert session.events is not None
        if events & selectors.EVENT_READ and not session.events.socket.recv(64):
            raise ConnectionResetError("closed")
        if events & selectors.EVENT_WRITE:
            session.events.flush()

    def _on_lifeline(self, session: Session, events: int) -> None:
        """Nobody writes into it: this is its end."""
        if not os.read(session.lifeline_fd, 64):
            self._selector.unregister(session.lifeline_fd)
            self._disconnect(session, "all its processes have ended")
            session.lifeline_closed()
            self._next_tick = 0.0

    # One client's trouble is its own

    def _guard_events(self, session: Session, action: Callable[[Session, int], None], events: int) -> None:
        self._guard(session, lambda _: action(session, events))

    def _guard(self, session: Session, action: Callable[[Session], None]) -> None:
        """Do something for a session, which is dropped where that cannot be done; then watch what its sockets need."""
        try:
            action(session)
        except (FlexKVError, OSError) as error:
            if isinstance(error, FlexKVError):
                self._say_error(session, str(error))
            self._disconnect(session, str(error))
        if session.is_connected:
            self._watch(session.calls)
            if session.events is not None:
                self._watch(session.events)

    def _watch(self, channel: Channel) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.is_blocked else 0)
        key = self._selector.get_key(channel.socket)
        if key.events != wanted:
            self._selector.modify(channel.socket, wanted, key.data)

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
        self._selector.unregister(session.calls.socket)
        if session.events is not None:
            self._selector.unregister(session.events.socket)
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
        self._selector.close()
        self._address.stop_listening()
        closing = threading.Thread(target=self._tenants.close, name="flexkv-close")
        closing.start()
        closing.join()
        self._address.close()
