"""The connector's worker side: one rank's copies between vLLM's KV tensors and the host tier.

Ops come with a step's metadata and run on the thread of a :class:`~flexkv_core.transfer.engine.TransferEngine`, checks on that of another.
Loads start before the step's forward, stores and checks behind it, large stores on request layer by layer within it. Whatever fails is reported, so that vLLM computes those blocks again; nothing here raises while serving.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import FlexKVError
from flexkv_core.storage.memory import HostSegment, SegmentHandle
from flexkv_core.transfer.engine import TransferEngine
from flexkv_core.transfer.plan import Delivery, DeviceCopier, OpResult, OpStatus, TransferOp
from flexkv_core.verify import TOLERANCES, ShadowCopier
from flexkv_kernels import copier_over
from flexkv_vllm.groups import Groups
from flexkv_vllm.in_step import InStepLoads
from flexkv_vllm.in_step_stores import InStepStores
from flexkv_vllm.layout import (
    check_supported,
    device_segments,
    engine_layout,
    layer_numbers,
    ranks_of,
    slot_layout,
)
from flexkv_vllm.metadata import StepMetadata, WorkerResults
from flexkv_vllm.ranks import fill_shard

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.005
"""In a step that computes nothing the worker waits this long for its copies: the engine would only ask again."""

LOAD_WAIT_S = 0.02
"""The same while a load from host memory is under way, in which the worker then takes part. A request that arrives meanwhile waits with it."""


class WorkerSide:
    """See the module's text. All methods but the transfer thread's callback run on the worker's main thread."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: FlexKVConfig) -> None:
        check_supported(vllm_config, kv_cache_config, config)
        self._config = config
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._layout = slot_layout(vllm_config, kv_cache_config, config)
        self._fails_as_one = Groups.of(kv_cache_config, config.tokens_per_block).fail_as_one
        self._copier: DeviceCopier | None = None
        self._engine: TransferEngine | None = None
        self._checker: TransferEngine | None = None
        self._shadow: ShadowCopier | None = None
        self._host: HostSegment | None = None
        self._unusable: SegmentHandle | None = None  # could not be mapped
        self._changed = threading.Condition()
        self._unfinished: dict[int, TransferOp] = {}
        self._results: list[OpResult] = []
        self._spoiled: set[int] = set()  # stores whose blocks were taken away too early; they count as failed
        self._loads: dict[int, tuple[str, TransferOp]] = {}
        self._releases: dict[str, frozenset[int]] = {}
        self._loaded: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        self._in_step: InStepLoads | None = None
        self._stores_in_step: InStepStores | None = None
        self._step: StepMetadata | None = None  # the one that runs
        self._step_failed = False  # a load within this step did
        self._outbox: dict[int, tuple[OpResult, ...]] = {}

    def register(self, kv_caches: Mapping[str, torch.Tensor], stage: int, tensor_rank: int) -> None:
        """Learn where the KV tensors lie; ``stage`` and ``tensor_rank`` are this rank's pipeline and tensor-parallel ranks.

        Raises:
            LayoutError: the tensors do not lie as the engine's configuration says.
        """
        ranks = ranks_of(self._vllm_config, self._kv_cache_config)
        found = device_segments(kv_caches, self._kv_cache_config)
        tensor = next(iter(kv_caches.values()))
        block_bytes = engine_layout(self._vllm_config, self._kv_cache_config, self._config).device_block_bytes
        segments, spare = fill_shard(found, block_bytes, tensor.device)
        memory = (kv_caches, spare)
        self._shard, self._writes = ranks.shard(stage, tensor_rank), ranks.writes(tensor_rank)
        self._copier = copier_over(segments, tensor.device, memory, self._layout.scales)
        numbers = layer_numbers(kv_caches, self._kv_cache_config)
        self._in_step = InStepLoads(numbers, self._config.transfer_timeout_s)
        self._stores_in_step = InStepStores(
            numbers, self._copier.segments.layer_count, self._config.transfer_timeout_s
        )
        dtype = str(tensor.dtype).removeprefix("torch.")
        if self._config.verify_sample and dtype in TOLERANCES:
            self._shadow = ShadowCopier(copier_over(segments, tensor.device, memory), dtype)

    # Each step, in this order

    def before_step(self, metadata: StepMetadata) -> None:
        """Wait for the stores whose blocks this step may overwrite."""
        if not metadata.wait_before:
            return
        engines = [engine for engine in (self._engine, self._checker) if engine is not None]
        if not all(engine.drain(metadata.wait_before, self._config.transfer_timeout_s) for engine in engines):
            logger.error(
                "stores of blocks that were taken away did not end in %.1f s: dropped",
                self._config.transfer_timeout_s,
            )
            with self._changed:
                self._spoiled |= metadata.wait_before & self._unfinished.keys()

    def start_loads(self, metadata: StepMetadata) -> None:
        """Submit the step's loads, to another segment if there is one since the last step."""
        if self._host is not None and self._host.handle != metadata.segment:
            self._leave_segment(metadata.segment)
        self._step_failed = False
        for request_id, blocks in metadata.unloadable.items():
            self._load_failed(request_id, blocks)
            if request_id in metadata.in_step:
                self._step_failed = True
            elif request_id not in metadata.loads:
                self._loaded.add(request_id)
        for request_id, op in metadata.loads.items():
            self._loads[op.op_id] = (request_id, op)
            self._submit(op, metadata)
            if request_id in metadata.in_step and self._engine is not None and self._in_step is not None:
                self._in_step.begin(self._engine, op.op_id)
        self._step = metadata
        if self._stores_in_step is not None and self._writes:
            self._stores_in_step.offer(metadata.stores)

    def wait_for_layer(self, name: str) -> None:
        """Attention on the layer ``name`` follows."""
        if self._in_step is not None:
            self._in_step.wait_for_layer(name)

    def layer_written(self, name: str) -> None:
        """Attention on the layer ``name`` was given to the device."""
        if self._stores_in_step is not None:
            self._stores_in_step.written(name, self._begin_store)

    def start_stores(self, metadata: StepMetadata) -> None:
        """Submit the stores and the checks of what the step has computed; not where it computed from missing bytes."""
        self._end_loads_in_step(metadata)
        begun: frozenset[int] = frozenset()
        if self._stores_in_step is not None:
            begun = self._stores_in_step.end(keep=not self._step_failed)
        stores = [op for op in metadata.stores if op.op_id not in begun]
        for op in stores if not self._step_failed else ():
            if self._writes:
                whole = op.delivery is Delivery.WHOLE
                self._submit(op if whole else replace(op, delivery=Delivery.WHOLE), metadata)
            else:  # another rank stores the same bytes
                self._results.append(OpResult(op.op_id, OpStatus.DONE, np.ones(len(op.slots), np.bool_)))
        for op in metadata.checks if not self._step_failed else ():
            self._submit(op, metadata, is_check=True)
        if self._step_failed:
            for op in (*stores, *metadata.checks):
                self._results.append(OpResult(op.op_id, OpStatus.FAILED, np.zeros(len(op.slots), np.bool_)))
        self._releases.update(metadata.releases)

    def finished(self, metadata: StepMetadata) -> tuple[set[str], set[str]]:
        """Requests whose blocks may be freed, and requests whose load has ended, since the last call."""
        if metadata.idle:
            self._wait_for_one()
        self._end_loads_in_step(metadata)
        with self._changed:
            results, self._results = self._results, []
            unfinished = self._unfinished.keys()
            released = {request for request, ops in self._releases.items() if unfinished.isdisjoint(ops)}
        for result in results:
            self._take(result, metadata)
        for request in released:
            del self._releases[request]
        loaded, self._loaded = self._loaded, set()
        return released, loaded

    def failed_blocks(self) -> set[int]:
        """Device blocks that a load left without their bytes, since the last call; where loads do not fail as one."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def failed_requests(self) -> set[str]:
        """Requests of which nothing that was promised counts as loaded, since the last call; all of them are :meth:`finished` loading."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def results(self) -> WorkerResults | None:
        """How ops ended, for the scheduler; None if none did."""
        if not self._outbox:
            return None
        outbox, self._outbox = self._outbox, {}
        return WorkerResults(outbox)

    def shutdown(self) -> None:
        """End the transfers and unmap the host tier."""
        self._end_transfers()

    # Inside

    def _begin_store(self, op: TransferOp) -> TransferEngine | None:
        """Start a store within the step; the engine that has it."""
        assert self._step is not None
        self._submit(op, self._step)
        return self._engine

    def _submit(self, op: TransferOp, metadata: StepMetadata, is_check: bool = False) -> None:
        with self._changed:
            self._unfinished[op.op_id] = op
        engine = self._engine or self._start_engine(metadata)
        if is_check and engine is not None:
            engine = self._checker or self._start_checker()
        if engine is None:
            self._on_result(OpResult(op.op_id, OpStatus.FAILED, np.zeros(len(op.slots), np.bool_)))
        else:
            engine.submit(op)

    def _leave_segment(self, successor: SegmentHandle | None) -> None:
        """The server of the segment is gone: unmap it. Without a successor not before its copies have ended; they may still be good."""
        if successor is None and self._unfinished:
            return
        self._end_transfers()
        self._engine = self._checker = self._host = None

    def _end_transfers(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._checker is not None:
            self._checker.close()
        if self._host is not None:
            self._host.close()

    def _start_engine(self, metadata: StepMetadata) -> TransferEngine | None:
        """Map the host tier and start the transfer thread; None, and never again for this segment, when that fails."""
        if self._copier is None or metadata.segment is None or metadata.segment == self._unusable:
            return None
        host: HostSegment | None = None
        try:
            host = HostSegment.attach(metadata.segment)
            engine = TransferEngine(
                self._copier,
                shard=self._shard,
                queue_ops_max=self._config.queue_ops_max,
                timeout_s=self._config.transfer_timeout_s,
                verify=self._config.verify_checksums,
            )
            engine.start(host, self._on_result)
        except FlexKVError:
            logger.exception("FlexKV is off in this worker; every request is computed")
            self._unusable = metadata.segment
            if host is not None:
                host.close()
            return None
        host.populate()
        self._host, self._engine = host, engine
        return engine

    def _start_checker(self) -> TransferEngine | None:
        """Start the thread that compares, beside the one that copies; None for ever when that fails."""
        if self._shadow is None:
            return None
        assert self._host is not None
        checker = TransferEngine(
            self._shadow,
            shard=self._shard,
            queue_ops_max=self._config.queue_ops_max,
            timeout_s=self._config.transfer_timeout_s,
        )
        try:
            checker.start(self._host, self._on_checked)
        except FlexKVError:
            logger.exception("this worker verifies nothing")
            self._shadow = None
            return None
        self._checker = checker
        return checker

    def _on_checked(self, result: OpResult) -> None:
        """Called on the checking thread."""
        assert self._shadow is not None
        wrong = self._shadow.take_wrong(self._unfinished[result.op_id])
        self._on_result(replace(result, wrong=wrong))

    def _on_result(self, result: OpResult) -> None:
        """Called on the transfer thread."""
        with self._changed:
            del self._unfinished[result.op_id]
            if result.op_id in self._spoiled:
                self._spoiled.discard(result.op_id)
                result = OpResult(result.op_id, OpStatus.FAILED, np.zeros_like(result.ok))
            self._results.append(result)
            self._changed.notify_all()

    def _wait_for_one(self) -> None:
        """Wait until an op ends; for loads that need nothing but the copy, with a hand in it."""
        is_loading = any(op.awaited is None for _, op in self._loads.values())
        deadline = time.monotonic() + (LOAD_WAIT_S if is_loading else IDLE_WAIT_S)
        if is_loading and self._engine is not None and not self._results:
            self._engine.help(LOAD_WAIT_S)
        with self._changed:
            if self._unfinished and not self._results:
                self._changed.wait_for(lambda: bool(self._results), deadline - time.monotonic())

    def _end_loads_in_step(self, metadata: StepMetadata) -> None:
        """Before anything is reported of the step."""
        if self._in_step is None:
            return
        unwaited = self._in_step.end()
        op_ids = {op.op_id for request_id, op in metadata.loads.items() if request_id in metadata.in_step}
        with self._changed:
            self._results = [
                replace(result, status=OpStatus.FAILED, ok=np.zeros_like(result.ok))
                if result.op_id in unwaited
                else result
                for result in self._results
            ]
            ended = [result for result in self._results if result.op_id in op_ids]
        self._step_failed |= not all(result.ok.all() for result in ended)

    def _take(self, result: OpResult, metadata: StepMetadata) -> None:
        self._outbox[result.op_id] = (result,)
        load = self._loads.pop(result.op_id, None)
        if load is None:
            return
        request_id, op = load
        if request_id not in metadata.in_step:
            self._loaded.add(request_id)
        missing = _blocks_without_bytes(op, result)
        if missing:
            self._load_failed(request_id, missing)

    def _load_failed(self, request_id: str, blocks: Collection[int]) -> None:
        if self._fails_as_one:
            self._failed_requests.add(request_id)
        else:
            self._failed_blocks.update(blocks)


def _blocks_without_bytes(op: TransferOp, result: OpResult) -> Collection[int]:
    """Device blocks of the slots that did not arrive."""
    if result.ok.all():
        return ()
    missing = op.blocks.reshape(len(op.slots), -1)[~result.ok].ravel()
    return [int(block) for block in missing if block >= 0]
