"""The executor of a served manager: its copies run in the clients, which hear of them in other ways and report how they ended."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import OpResult, OpStatus, TransferOp


class RelayExecutor:
    """Implements :class:`~flexkv_core.transfer.plan.Executor`. All but ``close`` is called on the server's thread."""

    def __init__(self) -> None:
        self._under_way: dict[int, int] = {}

    def start(self, host: HostSegment, on_result: Callable[[OpResult], None]) -> None:
        """Remember whom to tell."""
        self._on_result = on_result

    def submit(self, op: TransferOp) -> None:
        """The client has begun with it already, or is about to."""
        self._under_way[op.op_id] = len(op.slots)

    def cancel(self, op_id: int) -> None:
        """Only the client can drop what it has not begun; it says so."""

    def close(self) -> None:
        """Report everything as cancelled. The memory is given back, and not to anybody else."""
        for op_id in list(self._under_way):
            self.give_up(op_id)

    def blocks_of(self, op_id: int) -> int:
        """How many blocks a copy under way is for; -1 if there is none."""
        return self._under_way.get(op_id, -1)

    def report(self, result: OpResult) -> None:
        """A client has ended a copy under way; ``result`` is for as many blocks as it has."""
        del self._under_way[result.op_id]
        self._on_result(result)

    def give_up(self, op_id: int) -> None:
        """Nobody can touch the slots of a copy any more, and nobody says how far it came; nothing happens if there is none."""
        count = self._under_way.pop(op_id, None)
        if count is not None:
            self._on_result(OpResult(op_id, OpStatus.CANCELLED, np.zeros(count, np.bool_)))
