"""Values that go between a socket and where they lie: valkey-py's own ways copy them once or twice more.

The connections are valkey-py's, which makes, authenticates and pools them; only SET is put together here, and the answer to GETRANGE read.
That is one bulk string, whose first line is known when it is what is wanted. After any other answer but an empty one the connection is ended.
"""

from __future__ import annotations

import socket
import time
from typing import Any

from valkey.exceptions import ConnectionError as LostError
from valkey.exceptions import ResponseError
from valkey.exceptions import TimeoutError as LateError

from flexkv_core.storage.base import BlockStatus
from flexkv_core.storage.remote.base import Value
from flexkv_core.storage.remote.values import PIECE_BYTES

_EMPTY = b"$0\r\n\r\n"
_END = b"\r\n"


def read_in_place(pool: Any, name: str, value: Value, deadline: float) -> BlockStatus:
    """Read a value to where it lies: OK, DROPPED (there is none) or CORRUPT (it has another length).

    ``pool``: a valkey.ConnectionPool. ``deadline``: of ``time.monotonic()``, after which nothing more is awaited.

    Raises:
        ValkeyError, OSError: the server says no, or is not to be heard in time.
    """
    connection = pool.get_connection("GETRANGE")
    is_over = False
    try:
        # One byte more than wanted: a longer value is not taken for a whole one, and not read.
        connection.send_command("GETRANGE", name, 0, value.size)
        status = _Answer(connection._sock, deadline).take(value)
        is_over = status is not BlockStatus.CORRUPT
    finally:
        if not is_over:
            connection.disconnect()  # what is still to come would be taken for the next answer
        pool.release(connection)
    return status


def write_in_place(pool: Any, name: str, value: Value, expire_s: int | None) -> BlockStatus:
    """Write a value from where it lies: OK, or IO_ERROR (the server did not take it). It lives ``expire_s`` seconds, or as the server likes.

    ``pool``: as there.

    Raises:
        ValkeyError, OSError: the server says no, or is not to be heard in time.
    """
    expiry = [] if expire_s is None else [b"EX", b"%d" % expire_s]
    words = [b"SET", name.encode()]
    before = b"*%d\r\n" % (len(words) + 1 + len(expiry)) + b"".join(map(_bulk, words))
    before += b"$%d\r\n" % value.size + value.header.tobytes()
    after = _END + b"".join(map(_bulk, expiry))
    connection = pool.get_connection("SET")
    try:
        connection.send_packed_command([before, value.payload.data, after])
        answer = connection.read_response()  # ends the connection itself where none comes
    finally:
        pool.release(connection)
    return BlockStatus.OK if answer == b"OK" else BlockStatus.IO_ERROR


def _bulk(word: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(word), word)


class _Answer:
    """One answer that is on its way."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket = connected
        self._deadline = deadline

    def take(self, value: Value) -> BlockStatus:
        """See :func:`read_in_place`."""
        wanted = b"$%d\r\n" % value.size
        found = self._first_line(wanted)
        if found.startswith(_EMPTY[:2]):
            self._expect(_EMPTY, found)
            return BlockStatus.DROPPED
        if found.startswith(b"-"):
            raise ResponseError(found.decode(errors="replace"))
        if found != wanted:
            return BlockStatus.CORRUPT
        self._fill(value.header.data)
        payload = value.payload.data
        at = 0
        while at < len(payload):
            count = self._receive(payload[at : at + PIECE_BYTES])
            value.arrived(count)
            at += count
        self._expect(_END)
        return BlockStatus.OK

    def _first_line(self, wanted: bytes) -> bytes:
        """As much of the answer as tells that it is ``wanted`` or something else; never more than ``wanted`` has bytes or the answer has."""
        found = bytearray(len(wanted))
        count = self._receive(memoryview(found)[: len(_EMPTY)])
        while count < len(wanted) and found[:count] == wanted[:count]:
            count += self._receive(memoryview(found)[count:])
        return bytes(found[:count])

    def _expect(self, wanted: bytes, begun: bytes = b"") -> None:
        """Read what is left of ``wanted`` after ``begun``."""
        found = bytearray(begun.ljust(len(wanted)))
        self._fill(memoryview(found)[len(begun) :])
        if found != wanted:
            raise LostError(f"found {bytes(found)!r} where an answer should end")

    def _fill(self, space: memoryview) -> None:
        at = 0
        while at < len(space):
            at += self._receive(space[at:])

    def _receive(self, space: memoryview) -> int:
        if time.monotonic() >= self._deadline:
            raise LateError("the answer takes too long")
        count = self._socket.recv_into(space)
        if not count:
            raise LostError("the server has closed the connection")
        return count
