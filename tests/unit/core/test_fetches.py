"""What an adapter does for requests whose blocks may be in the store: one attempt each, and none that is held back for long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

from flexkv_core import fetches
from flexkv_core.fetches import Fetches
from tests.stores.sharing import BLOCKS, Engine, wait_until


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
