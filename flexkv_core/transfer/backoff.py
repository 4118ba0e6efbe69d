"""Backoff: when something that failed may be tried again."""

from __future__ import annotations

import time


class Backoff:
    """Doubles its pause with each failure in a row, up to a bound. The caller holds a lock."""

    def __init__(self, first_s: float, max_s: float) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._pause_s = first_s
        self._until = 0.0

    @property
    def is_over(self) -> bool:
        """Whether to try (again)."""
        return time.monotonic() >= self._until

    def failed(self) -> None:
        """Not again before the pause is over."""
        self._until = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._max_s)

    def succeeded(self) -> None:
        """The next failure is the first of its row."""
        self._pause_s = self._first_s
        self._until = 0.0
