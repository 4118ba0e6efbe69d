"""Calls that a client makes one value at a time, several at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flexkv_core.storage.base import BlockStatus, Statuses


class Lanes:
    """``count`` threads that share the calls of a batch."""

    def __init__(self, count: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    def each(self, call: Callable[[int], BlockStatus], count: int, deadline: float) -> Statuses:
        """``call(i)`` for 0 … ``count - 1``; what has not begun by ``deadline`` is IO_ERROR."""

        def bounded(index: int) -> BlockStatus:
            return BlockStatus.IO_ERROR if time.monotonic() >= deadline else call(index)

        return np.fromiter(self._pool.map(bounded, range(count)), np.uint32, count)

    def close(self) -> None:
        """Wait for what is under way."""
        self._pool.shutdown()
