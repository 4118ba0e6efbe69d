"""Says what is wrong with a store, at most now and then: one that is dead fails thousands of times."""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger(__name__)

REPEAT_S = 30.0
TEXT_MAX = 300
"""Of an error's text: some libraries add whole responses, which anybody may have written."""


class Reporter:
    """Logs failures of one store; any thread."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._next = 0.0
        self._held_back = 0

    def failed(self, error: object) -> None:
        """A call failed."""
        with self._lock:
            if time.monotonic() < self._next:
                self._held_back += 1
                return
            self._next = time.monotonic() + REPEAT_S
            held_back, self._held_back = self._held_back, 0
        text = " ".join(str(error).split())[:TEXT_MAX]
        logger.warning("remote store %s: %s (%d more failures before)", self._url, text, held_back)
