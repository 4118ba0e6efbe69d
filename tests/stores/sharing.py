"""Managers that share a store, each with a device of its own, as on several machines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from flexkv_core.keys import hash_tokens, namespace_root
from flexkv_core.manager import KVManager
from flexkv_core.tasks import KVResponseStatus
from tests.unit.core.device import BLOCK_TOKENS, Device, places

BLOCKS = 24
TOKENS = np.arange(BLOCKS * BLOCK_TOKENS, dtype=np.int64)


class Engine:
    """A manager and a device of its own, as another machine has them."""

    def __init__(self, url: str, **settings: object) -> None:
        self.device = Device(BLOCKS)
        patient = {"remote_lookup_deadline_ms": 20_000, "remote_read_deadline_ms": 20_000}
        self.manager: KVManager = self.device.manager(
            **{"remote_url": url, "remote_read_tokens_min": BLOCK_TOKENS, **patient, **settings}
        )
        wait_until(lambda: self.link.pid > 0)
        for breaker in (self.link._lookup_breaker, self.link._read_breaker, self.link._writes.breaker):
            breaker._pause_first_s = breaker._pause_s = 0.3  # instead of a second, then a minute
            breaker._pause_max_s = 0.6

    @property
    def link(self):
        return self.manager.blocks._remote

    def keys(self, tokens: np.ndarray = TOKENS, namespace: tuple[str, ...] = ()) -> bytes:
        return hash_tokens(namespace_root(self.manager.root, namespace), tokens, BLOCK_TOKENS)

    def put(self, seed: int, tokens: np.ndarray = TOKENS, namespace: tuple[str, ...] = ()) -> None:
        blocks = len(tokens) // BLOCK_TOKENS
        for block in range(blocks):
            self.device.fill(block, seed + block)
        task = self.manager.put_async(tokens, places(list(range(blocks))), namespace=namespace)
        assert self.manager.wait(task)[task].status is KVResponseStatus.SUCCESS

    def written(self, count: int) -> None:
        wait_until(lambda: self.manager.counters().remote_written_blocks >= count)

    def fetch(self, keys: bytes, timeout_s: float = 10) -> bool:
        """Whether anything was waited for."""
        ended = threading.Event()
        if not self.manager.blocks.fetch_keys(keys, ended.set):
            return False
        assert ended.wait(timeout_s)
        return True

    def get(self, seed: int, tokens: np.ndarray = TOKENS, namespace: tuple[str, ...] = ()) -> int:
        """Blocks that were loaded; each is what ``put(seed)`` stored."""
        task, mask = self.manager.get_match(tokens, namespace=namespace)
        count = int(mask.sum()) // BLOCK_TOKENS
        if not count:
            return 0
        self.manager.launch([task], [places(list(range(count)))])
        assert self.manager.wait(task)[task].status is KVResponseStatus.SUCCESS
        assert all(self.device.holds(block, seed + block) for block in range(count))
        return count

    def close(self) -> None:
        self.manager.blocks.check_integrity()
        self.manager.shutdown()


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
