"""A circuit breaker: a store that fails is left alone, and asked again now and then at nobody's cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum


class Allow(Enum):
    """What may be asked of the store now."""

    YES = "closed"
    PROBE = "half-open"  # one call, for whose answer nobody waits
    NO = "open"


class Breaker:
    """Opens after ``failures_max`` failures in a row, and lets one probe through after a pause that doubles with each probe that fails,
    up to ``pause_max_s``. The caller holds a lock."""

    def __init__(
        self,
        failures_max: int = 3,
        pause_s: float = 1.0,
        pause_max_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failures_max = failures_max
        self._pause_first_s = self._pause_s = pause_s
        self._pause_max_s = pause_max_s
        self._clock = clock
        self._failures = 0
        self._closed = True
        self._until = 0.0  # while open: when the next probe may go
        self.openings = 0

    @property
    def state(self) -> Allow:
        """What :meth:`ask` would say; changes nothing."""
        if self._closed:
            return Allow.YES
        return Allow.PROBE if self._clock() >= self._until else Allow.NO

    def ask(self) -> Allow:
        """Whether to call the store now. A probe that is not reported counts as under way for one more pause."""
        state = self.state
        if state is Allow.PROBE:
            self._until = self._clock() + self._pause_s
        return state

    def succeeded(self) -> None:
        """A call was answered in time."""
        self._failures = 0
        self._closed = True
        self._pause_s = self._pause_first_s

    def failed(self) -> None:
        """A call was not answered, not in time, or not with what was asked for."""
        self._failures += 1
        if self._closed and self._failures >= self._failures_max:
            self._closed = False
            self.openings += 1
            self._until = self._clock() + self._pause_s
        elif not self._closed:
            self._pause_s = min(2 * self._pause_s, self._pause_max_s)
            self._until = self._clock() + self._pause_s
