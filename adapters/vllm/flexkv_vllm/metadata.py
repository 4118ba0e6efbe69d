"""What the two sides of the connector tell each other in a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from flexkv_core.storage.memory import SegmentHandle
from flexkv_core.transfer.plan import OpResult, TransferOp
from flexkv_vllm.compat.worker_results import KVConnectorWorkerMetadata


@dataclass(frozen=True)
class StepMetadata(KVConnectorMetadata):
    """Scheduler -> workers.

    Attributes:
        segment: the host tier's memory, mapped by a worker when it sees it first; None while there is none. All ops are for it.
        loads: request -> its load, started before the step's forward.
        stores: started after the step's forward.
        checks: started after the step's forward: the device blocks are compared with the slots, see ``flexkv_core/verify.py``.
        wait_before: stores and checks that must end before the step begins: their blocks were taken away, by a preemption or because
            they left a window.
        releases: finished request -> the stores that its blocks are held for.
        unloadable: request -> device blocks that were promised and cannot be loaded; they are reported as failed;
            with groups or windows the whole load is, see :class:`~flexkv_vllm.groups.Groups`.
        in_step: requests of which the load, and what is unloadable, belongs to this very step, see ``in_step.py``.
        idle: the step computes nothing, so that a worker may wait a little for its copies.
    """

    segment: SegmentHandle | None
    loads: Mapping[str, TransferOp] = field(default_factory=dict)
    stores: tuple[TransferOp, ...] = ()
    checks: tuple[TransferOp, ...] = ()
    wait_before: frozenset[int] = frozenset()
    releases: Mapping[str, frozenset[int]] = field(default_factory=dict)
    unloadable: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    in_step: frozenset[str] = frozenset()
    idle: bool = False


@dataclass(frozen=True)
class WorkerResults(KVConnectorWorkerMetadata):
    """Workers -> scheduler: how ops ended, one result a rank that has reported."""

    results: Mapping[int, tuple[OpResult, ...]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerResults:
        """The results of both."""
        assert isinstance(other, WorkerResults)
        merged = dict(self.results)
        for op_id, results in other.results.items():
            merged[op_id] = merged.get(op_id, ()) + results
        return WorkerResults(merged)
