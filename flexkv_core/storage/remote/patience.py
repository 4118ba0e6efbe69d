"""How long requests wait for a store that has nothing for them: a small share of the time that passes, until it has something."""

from __future__ import annotations

import time
from collections.abc import Callable


class Patience:
    """Seconds that may be spent on waiting in vain. A little is there at first, and much once the store had something. What is spent comes back
    as requests come and go. While none are left the store is asked all the same, and nobody waits for what it says. The caller holds a
    lock.

    Args:
        share: of the time that passes, which may be waited.
        seconds_first: what is there at first.
        seconds_max: what is there when the store had something, and never more.
        free_s: of each wait that costs nothing: an engine looks at its requests once a step.
        pause_max_s: of the time between two requests no more than this counts: an engine that idles earns no waiting.
    """

    def __init__(
        self,
        share: float = 0.002,
        seconds_first: float = 0.05,
        seconds_max: float = 0.5,
        free_s: float = 0.005,
        pause_max_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._share, self._max_s, self._free_s, self._clock = share, seconds_max, free_s, clock
        self._pause_max_s = pause_max_s
        self._left_s = seconds_first
        self._counted = clock()

    @property
    def is_left(self) -> bool:
        """Whether a request that has come may wait."""
        now = self._clock()
        passed_s = min(now - self._counted, self._pause_max_s)
        self._left_s = min(self._max_s, self._left_s + self._share * passed_s)
        self._counted = now
        return self._left_s > 0

    def spend(self, seconds: float) -> None:
        """A request has waited so long for nothing."""
        self._left_s -= max(0.0, seconds - self._free_s)

    def restore(self) -> None:
        """The store had something."""
        self._left_s = self._max_s
