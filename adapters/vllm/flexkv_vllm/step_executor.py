"""The executor behind vLLM's BlockManager: ops ride on the metadata of the next step and are run by the workers.

Runs in the scheduler's process and thread. An op has ended when every rank has reported it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flexkv_core.storage.memory import HostSegment, SegmentHandle
from flexkv_core.transfer.plan import OpResult, OpStatus, TransferOp
from flexkv_core.types import Direction


class StepExecutor:
    """Implements :class:`~flexkv_core.transfer.plan.Executor`.

    Args:
        rank_count: ranks that run each op.
        stores_max: stores that may be under way; more are refused, which drops them.
    """

    def __init__(self, rank_count: int, stores_max: int) -> None:
        self._rank_count = rank_count
        self._stores_max = stores_max
        self._waiting: dict[int, TransferOp] = {}
        self._sent: dict[int, TransferOp] = {}
        self._reports: dict[int, list[OpResult]] = {}
        self.segment: SegmentHandle | None = None
        """Where the slots of all ops lie that :meth:`take` gives; None before the start."""

    def start(self, host: HostSegment, on_result: Callable[[OpResult], None]) -> None:
        """Remember whom to tell; the workers map ``host`` themselves.

        May be called again, with another segment: what waits is for slots of the one before, and is dropped."""
        for op_id in list(self._waiting):
            self.cancel(op_id)
        self._on_result = on_result
        self.segment = host.handle

    def submit(self, op: TransferOp) -> None:
        """Keep ``op`` for the next step."""
        if op.direction is Direction.STORE and len(self._waiting) + len(self._sent) >= self._stores_max:
            self._on_result(OpResult(op.op_id, OpStatus.FAILED, np.zeros(len(op.slots), np.bool_)))
            return
        self._waiting[op.op_id] = op

    def cancel(self, op_id: int) -> None:
        """Drop an op that no worker has seen."""
        op = self._waiting.pop(op_id, None)
        if op is not None:
            self._on_result(OpResult(op_id, OpStatus.CANCELLED, np.zeros(len(op.slots), np.bool_)))

    def close(self) -> None:
        """Report everything as cancelled; the workers end with the engine."""
        for op in [*self._waiting.values(), *self._sent.values()]:
            self._on_result(OpResult(op.op_id, OpStatus.CANCELLED, np.zeros(len(op.slots), np.bool_)))
        self._waiting.clear()
        self._sent.clear()

    def take(self) -> list[TransferOp]:
        """The ops for this step's metadata."""
        ops = list(self._waiting.values())
        self._sent.update(self._waiting)
        self._waiting.clear()
        return ops

    def report(self, op_id: int, results: Sequence[OpResult]) -> None:
        """Results of some ranks; the last one ends the op. A block has arrived when it has on every rank, and is
        wrong when it is on any."""
        op = self._sent.get(op_id)
        if op is None:
            return
        reports = self._reports.setdefault(op_id, [])
        reports.extend(results)
        if len(reports) < self._rank_count:
            return
        del self._sent[op_id], self._reports[op_id]
        failed = any(result.status is not OpStatus.DONE for result in reports)
        ok = np.logical_and.reduce([result.ok for result in reports])
        status = OpStatus.FAILED if failed else OpStatus.DONE
        seconds = max(result.seconds for result in reports)
        found = [result.wrong for result in reports if result.wrong is not None]
        wrong = np.logical_or.reduce(found) if found else None
        self._on_result(OpResult(op_id, status, ok, seconds, wrong))
