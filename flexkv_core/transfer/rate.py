"""A bound on bytes a second."""

from __future__ import annotations

import threading
import time

BURST_S = 0.1
"""What may go at once after a rest, in seconds of the bound."""


class Rate:
    """Any thread. ``bytes_per_s``: 0 for no bound."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0  # when what was let through so far is paid for

    def wait(self, count: int) -> None:
        """Return when ``count`` bytes may go."""
        if not self._bytes_per_s:
            return
        with self._lock:
            begin = max(self._free_at, time.monotonic() - BURST_S)
            self._free_at = begin + count / self._bytes_per_s
        time.sleep(max(0.0, begin - time.monotonic()))
