"""What an adapter does for requests whose blocks may be in the store: one attempt each, and none that is held back for long."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from flexkv_core import fetches
from flexkv_core.fetches import Fetches
from tests.stores.sharing import BLOCKS, TOKENS, Engine, wait_until


class Side:
    """The scheduler's side: what is reported waits for the scheduler's thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.reported: deque[Callable[[], None]] = deque()
        self.asked = 0
        manager = engine.manager.blocks
        self.fetches = Fetches(manager, self.reported.append, manager.config)  # type: ignore[arg-type, attr-defined]

    def keys(self) -> bytes:
        self.asked += 1
        return self.engine.keys()

    def step(self) -> None:
        while self.reported:
            self.reported.popleft()()


def test_a_request_waits_until_its_blocks_are_there(tmp_path: Path) -> None:
    first, second = (Engine(f"dir:{tmp_path}/store") for _ in range(2))
    first.put(100)
    first.written(BLOCKS)
    side = Side(second)
    side.fetches.begin("a", side.keys)
    side.fetches.begin("a", side.keys)
    assert side.asked == 1
    assert side.fetches.is_pending("a")
    assert not side.fetches.is_pending("another")
    wait_until(lambda: bool(side.reported))
    assert side.fetches.is_pending("a"), "not before the scheduler's thread takes the report"
    side.step()
    assert not side.fetches.is_pending("a")
    assert second.get(100) == BLOCKS
    side.fetches.begin("b", side.keys)
    assert not side.fetches.is_pending("b"), "all is in host memory"
    first.close()
    second.close()


def test_a_report_for_a_request_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    engine = Engine(f"dir:{tmp_path}/store")
    side = Side(engine)
    side.fetches.begin("a", side.keys)
    side.fetches.remove("a")
    wait_until(lambda: bool(side.reported))
    side.step()
    assert not side.fetches.is_pending("a")
    engine.close()


def test_a_manager_that_never_reports_holds_nobody_back(tmp_path: Path) -> None:
    engine = Engine(f"dir:{tmp_path}/store", remote_lookup_deadline_ms=1, remote_read_deadline_ms=1)
    side = Side(engine)
    engine.manager.blocks.fetch_keys = lambda keys, on_end: True  # type: ignore[method-assign]
    grace, fetches.GRACE_S = fetches.GRACE_S, 0.05
    try:
        side.fetches = Side(engine).fetches
        side.fetches.begin("a", side.keys)
        assert side.fetches.is_pending("a")
        wait_until(lambda: not side.fetches.is_pending("a"), 5)
    finally:
        fetches.GRACE_S = grace
    engine.close()


def test_a_request_waits_for_what_is_being_written(tmp_path: Path) -> None:
    """As behind a router that asks the second engine as soon as the first has answered."""
    url = f"dir:{tmp_path}/store"
    first, second = Engine(url), Engine(url, remote_wait_ms=10_000)
    side = Side(second)
    side.fetches.begin("a", side.keys)
    assert side.fetches.is_pending("a")
    half = TOKENS[: len(TOKENS) // 2]
    first.put(100, half)
    first.written(BLOCKS // 2)
    assert not side.reported, "half of it is not what was asked for"
    first.put(100)
    begin = time.monotonic()
    wait_until(lambda: bool(side.reported))
    assert time.monotonic() - begin < 8, "it waited for its time to be over"
    side.step()
    assert not side.fetches.is_pending("a")
    assert second.get(100) == BLOCKS
    first.close()
    second.close()


def test_what_is_never_written_is_waited_for_once(tmp_path: Path) -> None:
    """What is there by then is taken."""
    url = f"dir:{tmp_path}/store"
    first, second = Engine(url), Engine(url, remote_wait_ms=400)
    half = TOKENS[: len(TOKENS) // 2]
    first.put(100, half)
    first.written(BLOCKS // 2)
    begin = time.monotonic()
    assert second.fetch(second.keys())
    assert 0.2 < time.monotonic() - begin < 8
    assert second.get(100, half) == BLOCKS // 2
    assert second.manager.counters().remote_lookups > 2
    first.close()
    second.close()


def test_a_reset_ends_the_wait(tmp_path: Path) -> None:
    engine = Engine(f"dir:{tmp_path}/store", remote_wait_ms=10_000)
    side = Side(engine)
    side.fetches.begin("a", side.keys)
    wait_until(lambda: bool(engine.link._watched))
    engine.manager.reset()
    wait_until(lambda: bool(side.reported), 5)
    assert not engine.link._watched
    engine.close()
