"""One load in pieces, so that a thread that would only wait for it can copy along."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from flexkv_core.errors import TransferError

logger = logging.getLogger(__name__)


class Pieces:
    """Pieces ``0 .. count - 1`` of a copy, each copied once, by whichever thread takes it first.

    Args:
        count: of the pieces.
        copy: copies one; called by several threads at the same time.
    """

    def __init__(self, count: int, copy: Callable[[int], None]) -> None:
        self._count = count
        self._copy = copy
        self._changed = threading.Condition()
        self._next = 0
        self._running = 0
        self._failed = False

    def work(self) -> None:
        """Copy pieces until none is left to take, or one has failed; never raises what a copy raises."""
        while (piece := self._take()) is not None:
            failed = False
            try:
                self._copy(piece)
            except Exception:  # the edge of a helping thread: finish() tells the thread that owns the copy
                logger.exception("piece %d of %d of a load failed", piece, self._count)
                failed = True
            with self._changed:
                self._running -= 1
                self._failed |= failed
                self._changed.notify_all()

    def finish(self) -> None:
        """Work, and wait for the pieces that other threads have taken (a copy cannot be interrupted; a piece takes milliseconds).

        Raises:
            TransferError: a piece failed; the log says why.
        """
        self.work()
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
        if self._failed:
            raise TransferError("a piece of a load failed")

    def _take(self) -> int | None:
        with self._changed:
            if self._next == self._count or self._failed:
                return None
            self._next += 1
            self._running += 1
            return self._next - 1
