"""Requests whose blocks may come from the store that is shared: one attempt each, from the moment the engine takes the request in.

The manager bounds how long it takes and says when it is over; until then the request is asked again in each step. All methods run on
the scheduler's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from flexkv_core.config import FlexKVConfig
from flexkv_core.manager import Blocks

GRACE_S = 1.0
"""Beyond the manager's own deadlines: what is not over by then is not waited for."""


class Fetches:
    """See the module's text.

    Args:
        report: is handed a call that belongs on the scheduler's thread, from any thread; it makes it before the next step.
    """

    def __init__(
        self, manager: Blocks, report: Callable[[Callable[[], None]], None], config: FlexKVConfig
    ) -> None:
        self._manager = manager
        self._report = report
        bounds_ms = config.remote_wait_ms + config.remote_lookup_deadline_ms + config.remote_read_deadline_ms
        self._wait_s = bounds_ms / 1000 + GRACE_S
        self._begun: dict[str, float] = {}  # when a request is not held back any more, time.monotonic()

    def begin(self, request_id: str, make_keys: Callable[[], bytes]) -> None:
        """Look for the request's blocks; a second call for the same one does nothing."""
        if request_id in self._begun:
            return
        waits = self._manager.fetch_keys(make_keys(), lambda: self._report(lambda: self._over(request_id)))
        self._begun[request_id] = time.monotonic() + self._wait_s if waits else 0.0

    def is_pending(self, request_id: str) -> bool:
        """Whether blocks may be on their way for it."""
        return time.monotonic() < self._begun.get(request_id, 0.0)

    def remove(self, request_id: str) -> None:
        """The request has ended. What is on its way arrives."""
        self._begun.pop(request_id, None)

    def _over(self, request_id: str) -> None:
        if request_id in self._begun:
            self._begun[request_id] = 0.0
