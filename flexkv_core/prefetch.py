"""Reads blocks from the SSD into host memory for requests that wait in the engine's queue.

A request is a candidate from the moment the engine takes it in, but only what a whole scheduling step has passed over is read: a
request that is scheduled at once loads directly, which is quicker than a prefetch and a load. Blocks are read in pieces, so that an abort
stops the rest, and what waiting requests have been given is bounded: a long queue must not evict its own beginning. All methods run on
the scheduler's thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from flexkv_core.manager import Blocks
from flexkv_core.tasks import TaskDone
from flexkv_core.types import KEY_BYTES

REQUESTS_MAX = 8
"""Requests that are read for at the same time: enough to keep a disk busy, few enough that the next one in the queue comes first."""
PIECE_BYTES = 64 << 20
"""Read at a time for a request: 20 to 60 ms of an SSD, the most that is read for nothing after an abort."""
LOOKAHEAD_MAX = 64
"""Requests from the head of the queue that are looked at in a step."""
HOST_SHARE = 2
"""Waiting requests hold at most one in this many slots of the host tier."""


@dataclass
class _Waiting:
    """``keys``: makes the keys of the request's prompt, 16 bytes a block; called once, when its turn comes."""

    make_keys: Callable[[], bytes]
    keys: bytes = b""
    found_blocks: int = 0
    next_block: int = 0
    read_blocks: int = 0
    is_done: bool = False  # there is nothing more to read
    task: int | None = None
    deadline: float = 0.0  # of the task, time.monotonic()


class Prefetcher:
    """See the module's text.

    Args:
        report: is handed a call that belongs on the scheduler's thread, from any thread; it makes it before the next step.
        timeout_s: a piece that has not arrived by then is not waited for.
    """

    def __init__(
        self, manager: Blocks, report: Callable[[Callable[[], None]], None], timeout_s: float
    ) -> None:
        self._manager = manager
        self._report = report
        self._timeout_s = timeout_s
        self._piece_blocks = max(1, PIECE_BYTES // manager.layout.slot_bytes)
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()

    def add(self, request_id: str, make_keys: Callable[[], bytes]) -> None:
        """A request waits; a second call for the same one does nothing."""
        self._waiting.setdefault(request_id, _Waiting(make_keys))

    def is_reading(self, request_id: str) -> bool:
        """Whether blocks are on their way for it: a load now would read them a second time."""
        waiting = self._waiting.get(request_id)
        return waiting is not None and waiting.task is not None and time.monotonic() < waiting.deadline

    def due(self) -> set[str]:
        """Requests for which blocks are on their way, or will be when those of earlier requests have come: for an engine that would
        otherwise wait for them while it holds up others."""
        if not any(self.is_reading(request_id) for request_id in self._waiting):
            return set()
        return {request_id for request_id, waiting in self._waiting.items() if not waiting.is_done}

    def remove(self, request_id: str) -> None:
        """The request was scheduled or has ended. A piece that is being read arrives; nothing more is asked for."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None and waiting.task is not None:
            self._manager.cancel(waiting.task)

    def start(self) -> None:
        """A scheduling step is over: read for those that it left waiting, in their order."""
        reading, room = 0, self._manager.usage()[1] // HOST_SHARE
        for request_id, waiting in islice(self._waiting.items(), LOOKAHEAD_MAX):
            if reading >= REQUESTS_MAX or room <= 0:
                return
            left = room - waiting.read_blocks
            if waiting.task is None and not waiting.is_done and left > 0:
                self._next_piece(request_id, waiting, left)
            reading += waiting.task is not None
            # What the first in the queue will still need is kept for them.
            room -= waiting.read_blocks if waiting.is_done else max(waiting.read_blocks, waiting.found_blocks)

    def _next_piece(self, request_id: str, waiting: _Waiting, room: int) -> None:
        """Ask for the request's next blocks that host memory lacks, ``room`` of them at most."""
        waiting.keys = waiting.keys or waiting.make_keys()
        found = waiting.found_blocks = self._manager.match_keys(waiting.keys)
        while waiting.next_block < found:
            start = waiting.next_block
            stop = min(found, start + min(self._piece_blocks, room))
            task, reads = self._manager.prefetch_keys(
                waiting.keys[: KEY_BYTES * stop], start, lambda done: self._done(request_id, done)
            )
            waiting.next_block = stop
            if reads:
                waiting.task, waiting.deadline = task, time.monotonic() + self._timeout_s
                waiting.read_blocks += reads
                return
        waiting.is_done = True

    def _done(self, request_id: str, done: TaskDone) -> None:
        """Called on any thread."""
        self._report(lambda: self._take(request_id, done.task_id))

    def _take(self, request_id: str, task_id: int) -> None:
        waiting = self._waiting.get(request_id)
        if waiting is not None and waiting.task == task_id:
            waiting.task = None
