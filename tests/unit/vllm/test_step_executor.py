"""An op ends when every rank has reported it, and not before."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from flexkv_core.transfer.plan import OpResult, OpStatus, TransferOp
from flexkv_core.types import Direction
from flexkv_vllm.step_executor import StepExecutor


class Rig:
    def __init__(self, ranks: int, stores_max: int = 8) -> None:
        self.results: list[OpResult] = []
        self.executor = StepExecutor(ranks, stores_max)
        self.host = SimpleNamespace(handle="segment")
        self.executor.start(self.host, self.results.append)  # type: ignore[arg-type]


def op(op_id: int, direction: Direction = Direction.STORE, count: int = 2) -> TransferOp:
    return TransferOp(op_id, direction, bytes(16 * count), np.arange(count, dtype=np.int32), np.arange(count))


def result(op_id: int, ok: list[bool], status: OpStatus = OpStatus.DONE, seconds: float = 0.1) -> OpResult:
    return OpResult(op_id, status, np.array(ok), seconds)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_last_rank_ends_the_op(ranks: int) -> None:
    rig = Rig(ranks)
    rig.executor.submit(op(1))
    assert [taken.op_id for taken in rig.executor.take()] == [1]
    assert rig.executor.take() == []
    for rank in range(ranks):
        assert rig.results == []
        rig.executor.report(1, [result(1, [True, True], seconds=rank)])
    (ended,) = rig.results
    assert (ended.status, ended.ok.tolist(), ended.seconds) == (OpStatus.DONE, [True, True], ranks - 1)


def test_block_has_arrived_only_when_it_has_on_every_rank() -> None:
    rig = Rig(2)
    rig.executor.submit(op(1, Direction.LOAD))
    rig.executor.take()
    rig.executor.report(1, [result(1, [True, True]), result(1, [True, False])])
    assert (rig.results[0].status, rig.results[0].ok.tolist()) == (OpStatus.DONE, [True, False])


def test_one_failing_rank_fails_the_op() -> None:
    rig = Rig(2)
    rig.executor.submit(op(1))
    rig.executor.take()
    rig.executor.report(1, [result(1, [False, False], OpStatus.FAILED), result(1, [True, True])])
    assert (rig.results[0].status, rig.results[0].ok.any()) == (OpStatus.FAILED, False)


def test_stores_are_bounded_and_loads_are_not() -> None:
    rig = Rig(1, stores_max=2)
    for op_id in (1, 2):
        rig.executor.submit(op(op_id))
    rig.executor.submit(op(3))
    assert (rig.results[0].op_id, rig.results[0].status) == (3, OpStatus.FAILED)
    rig.executor.submit(op(4, Direction.LOAD))
    assert [taken.op_id for taken in rig.executor.take()] == [1, 2, 4]


def test_cancel_only_before_a_worker_has_seen_it() -> None:
    rig = Rig(1)
    rig.executor.submit(op(1))
    rig.executor.take()
    rig.executor.submit(op(2))
    rig.executor.cancel(1)
    rig.executor.cancel(2)
    assert [(ended.op_id, ended.status) for ended in rig.results] == [(2, OpStatus.CANCELLED)]
    rig.executor.report(1, [result(1, [True, True])])
    assert rig.results[-1].status is OpStatus.DONE


def test_close_ends_everything_and_late_reports_are_ignored() -> None:
    rig = Rig(1)
    rig.executor.submit(op(1))
    rig.executor.take()
    rig.executor.submit(op(2))
    rig.executor.close()
    rig.executor.report(1, [result(1, [True, True])])
    assert [(ended.op_id, ended.status) for ended in rig.results] == [
        (2, OpStatus.CANCELLED),
        (1, OpStatus.CANCELLED),
    ]


def test_another_segment_drops_what_waits_and_keeps_what_was_sent() -> None:
    """Slots are numbers: an op that a worker has not seen must never meet the segment that came after its own."""
    rig = Rig(1)
    rig.executor.submit(op(1))
    rig.executor.take()
    rig.executor.submit(op(2, Direction.LOAD))
    rig.executor.start(SimpleNamespace(handle="another"), rig.results.append)  # type: ignore[arg-type]
    assert [(ended.op_id, ended.status) for ended in rig.results] == [(2, OpStatus.CANCELLED)]
    assert (rig.executor.take(), rig.executor.segment) == ([], "another")
    rig.executor.report(1, [result(1, [True, True])])
    assert rig.results[-1].op_id == 1
