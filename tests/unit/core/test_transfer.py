"""TransferEngine: loads pass stores, every op is reported once, nothing waits for ever."""

from __future__ import annotations

import queue
import time
from dataclasses import replace

import numpy as np
import pytest

from flexkv_core.storage.memory import HostSegment, arrival_mark
from flexkv_core.transfer.engine import TransferEngine
from flexkv_core.transfer.plan import STORE_PIECE_BYTES, OpResult, OpStatus, TransferOp
from flexkv_core.types import Direction
from tests.unit.core.device import Device


class Rig:
    def __init__(self, **settings: object) -> None:
        self.device = Device()
        self.host = HostSegment.create(64, self.device.layout())
        self.results: queue.Queue[OpResult] = queue.Queue()
        self.engine = TransferEngine(self.device.copier, **settings)  # type: ignore[arg-type]
        self.engine.start(self.host, self.results.put)

    def op(self, op_id: int, direction: Direction, count: int = 1) -> TransferOp:
        ids = np.arange(count)
        return TransferOp(op_id, direction, bytes(16 * count), ids.astype(np.int32), ids.astype(np.int64))

    def close(self) -> None:
        self.device.copier.hold.set()
        self.engine.close()
        self.host.close()


@pytest.fixture
def rig() -> Rig:
    rig = Rig(queue_ops_max=2, timeout_s=30)
    yield rig
    rig.close()
    assert rig.device.copier.is_closed, "what bind took is given back"


def hold(rig: Rig) -> None:
    rig.device.copier.hold.clear()
    rig.device.copier.entered.clear()


def test_load_goes_before_waiting_stores(rig: Rig) -> None:
    hold(rig)
    rig.engine.submit(rig.op(1, Direction.STORE))
    assert rig.device.copier.entered.wait(10)
    rig.engine.submit(rig.op(2, Direction.STORE))
    rig.engine.submit(rig.op(3, Direction.LOAD))
    rig.device.copier.hold.set()
    assert rig.engine.drain({1, 2, 3}, 10)
    assert rig.device.copier.order == [1, 3, 2]


def test_load_is_let_in_between_pieces_of_a_store(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.engine, "_piece_blocks", 4)
    hold(rig)
    rig.engine.submit(rig.op(1, Direction.STORE, 12))
    assert rig.device.copier.entered.wait(10)
    rig.engine.submit(rig.op(2, Direction.LOAD))
    rig.device.copier.hold.set()
    assert rig.engine.drain({1, 2}, 10)
    assert rig.device.copier.order == [1, 2, 1, 1]


def test_full_queue_refuses_at_once(rig: Rig) -> None:
    hold(rig)
    for op_id in range(1, 5):
        rig.engine.submit(rig.op(op_id, Direction.STORE))
        if op_id == 1:
            assert rig.device.copier.entered.wait(10)
    refused = rig.results.get(timeout=10)
    assert (refused.op_id, refused.status, refused.ok.any()) == (4, OpStatus.FAILED, False)


def test_late_op_is_failed_not_copied() -> None:
    rig = Rig(timeout_s=0.05)
    hold(rig)
    rig.engine.submit(rig.op(1, Direction.STORE))
    assert rig.device.copier.entered.wait(10)
    rig.engine.submit(rig.op(2, Direction.LOAD))
    time.sleep(0.1)
    rig.device.copier.hold.set()
    assert rig.engine.drain({1, 2}, 10)
    results = {result.op_id: result.status for result in (rig.results.get(), rig.results.get())}
    assert results == {1: OpStatus.DONE, 2: OpStatus.FAILED}
    assert rig.device.copier.order == [1]
    rig.close()


def test_cancel_drops_what_waits_only(rig: Rig) -> None:
    hold(rig)
    rig.engine.submit(rig.op(1, Direction.STORE))
    assert rig.device.copier.entered.wait(10)
    rig.engine.submit(rig.op(2, Direction.STORE))
    rig.engine.cancel(1)
    rig.engine.cancel(2)
    assert rig.results.get(timeout=10).status is OpStatus.CANCELLED
    rig.device.copier.hold.set()
    assert rig.results.get(timeout=10).status is OpStatus.DONE


def test_failed_copy_is_reported_and_the_thread_lives_on(rig: Rig) -> None:
    rig.device.copier.fail = True
    rig.engine.submit(rig.op(1, Direction.LOAD))
    assert rig.results.get(timeout=10).status is OpStatus.FAILED
    rig.device.copier.fail = False
    rig.engine.submit(rig.op(2, Direction.STORE))
    assert rig.results.get(timeout=10).status is OpStatus.DONE


def test_drain_gives_up_after_its_timeout(rig: Rig) -> None:
    hold(rig)
    rig.engine.submit(rig.op(1, Direction.STORE))
    assert not rig.engine.drain({1}, 0.05)
    assert rig.engine.drain({7}, 0.05)


def test_close_reports_everything() -> None:
    rig = Rig()
    hold(rig)
    for op_id in (1, 2, 3):
        rig.engine.submit(rig.op(op_id, Direction.STORE))
    assert rig.device.copier.entered.wait(10)
    rig.device.copier.hold.set()
    rig.close()
    rig.engine.submit(rig.op(4, Direction.LOAD))
    results = {rig.results.get(timeout=1).op_id for _ in range(4)}
    assert results == {1, 2, 3, 4}


def test_store_piece_is_a_few_milliseconds_of_copying() -> None:
    assert 4 << 20 <= STORE_PIECE_BYTES <= 64 << 20


def test_awaited_slots_are_copied_as_they_arrive(rig: Rig) -> None:
    """In any order, while other ops run; a slot that failed to arrive is the only one left out."""
    rig.device.fill(0, 1), rig.device.fill(1, 2), rig.device.fill(2, 3)
    rig.engine.submit(rig.op(1, Direction.STORE, 3))
    assert rig.engine.drain({1}, 10)
    for tensor in rig.device.tensors:
        tensor.zero_()
    awaited = np.array([False, True, True])
    rig.engine.submit(replace(rig.op(2, Direction.LOAD, 3), awaited=awaited))
    rig.engine.submit(rig.op(3, Direction.LOAD, 1))
    assert rig.engine.drain({3}, 10)
    assert rig.device.holds(0, 1)
    assert not rig.device.holds(2, 3)
    rig.host.arrivals[2] = arrival_mark(2, ok=True)
    deadline = time.monotonic() + 10
    while not rig.device.holds(2, 3):
        assert time.monotonic() < deadline
    assert not rig.engine.drain({2}, 0.05)
    rig.host.arrivals[1] = arrival_mark(2, ok=False)
    assert rig.engine.drain({2}, 10)
    results = {result.op_id: result for result in (rig.results.get() for _ in range(3))}
    assert (results[2].status, results[2].ok.tolist()) == (OpStatus.DONE, [True, False, True])


def test_what_never_arrives_is_given_up() -> None:
    rig = Rig(timeout_s=0.1)
    op = replace(rig.op(1, Direction.LOAD, 2), awaited=np.array([True, True]))
    rig.host.arrivals[:2] = arrival_mark(7, ok=True)  # another op's
    rig.engine.submit(op)
    result = rig.results.get(timeout=10)
    assert (result.status, result.ok.tolist()) == (OpStatus.DONE, [False, False])
    rig.engine.submit(replace(op, op_id=2))
    rig.close()
    assert rig.results.get(timeout=1).op_id == 2
