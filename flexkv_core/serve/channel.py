"""The sending half of a socket that does not block, with what did not fit in yet."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from itertools import islice

from flexkv_core.serve.wire import WireError

_PARTS_A_CALL = 16  # the system takes up to 1,024


class Channel:
    """Sends frames in order. Not thread-safe.

    Args:
        connected: a socket, which does not block from now on.
        waiting_bytes_max: what may wait for the other side to read.

    ``on_blocked``, which may be replaced, is called with True when something begins to wait, with False when nothing does any more.
    """

    def __init__(self, connected: socket.socket, waiting_bytes_max: int) -> None:
        connected.setblocking(False)
        self.socket = connected
        self._waiting_bytes_max = waiting_bytes_max
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._told = False
        self.on_blocked: Callable[[bool], None] = lambda is_blocked: None

    @property
    def is_blocked(self) -> bool:
        """Whether something waits for the other side to read."""
        return bool(self._waiting)

    def send(self, data: bytes) -> None:
        """Send now what fits in, keep the rest.

        Raises:
            WireError: more than ``waiting_bytes_max`` wait.
            OSError: the connection is broken.
        """
        sent = 0
        if not self._waiting:
            try:
                sent = self.socket.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return
        self._waiting.append(memoryview(data)[sent:])
        self._waiting_bytes += len(data) - sent
        self.flush()
        if self._waiting_bytes > self._waiting_bytes_max:
            raise WireError(f"the other side does not read: {self._waiting_bytes} bytes wait for it")

    def flush(self) -> None:
        """Send what waits, as far as it fits in; OSError if the connection is broken."""
        while self._waiting:
            try:
                sent = self.socket.sendmsg(
                    list(islice(self._waiting, _PARTS_A_CALL)), [], socket.MSG_NOSIGNAL
                )
            except BlockingIOError:
                break
            self._waiting_bytes -= sent
            while sent:
                first = self._waiting.popleft()
                if sent < len(first):
                    self._waiting.appendleft(first[sent:])
                    break
                sent -= len(first)
        if self.is_blocked is not self._told:
            self._told = self.is_blocked
            self.on_blocked(self._told)
