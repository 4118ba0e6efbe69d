"""The sending half of a socket that does not block, with what did not fit in yet."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable
from itertools import islice

from flexkv_core.serve.wire import WireError

_PARTS_A_CALL = 16  # the system takes up to 1,024


class Channel:
    """Sends frames in order. Not thread-safe.

    Args:
        connected: a socket, which does not block from now on.
        waiting_bytes_max: what may wait for the other side to read.
    """

    def __init__(self, connected: socket.socket, waiting_bytes_max: int) -> None:
        connected.setblocking(False)
        self.socket = connected
        self._waiting_bytes_max = waiting_bytes_max
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0

    @property
    def is_blocked(self) -> bool:
        """Whether something waits for the other side to read."""
        return bool(self._waiting)

    def send(self, parts: Iterable[bytes | memoryview]) -> None:
        """Send now what fits in, keep the rest.

        Raises:
            WireError: more than ``waiting_bytes_max`` wait.
            OSError: the connection is broken.
        """
        for part in parts:
            if len(part):
                self._waiting.append(memoryview(part))
                self._waiting_bytes += len(part)
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
                return
            self._waiting_bytes -= sent
            while sent:
                first = self._waiting.popleft()
                if sent < len(first):
                    self._waiting.appendleft(first[sent:])
                    break
                sent -= len(first)
