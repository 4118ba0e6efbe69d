"""``FlexKVConnector``: vLLM's connector interface, passed on to the scheduler's or the worker's side."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

from flexkv_core.config import load_config
from flexkv_vllm.compat import preemptions, settings
from flexkv_vllm.compat.hit_source import HOST_HITS
from flexkv_vllm.compat.hybrid import HybridConnector, transfer_results
from flexkv_vllm.compat.worker_results import KVConnectorWorkerMetadata
from flexkv_vllm.compat.worker_stats import WORKERS_MUST_SEND
from flexkv_vllm.metadata import StepMetadata, WorkerResults
from flexkv_vllm.scheduler_side import SchedulerSide
from flexkv_vllm.stats import FlexKVPromMetrics, FlexKVStats
from flexkv_vllm.worker_side import WorkerSide

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class FlexKVConnector(KVConnectorBase_V1, HybridConnector):
    """Keeps KV blocks in FlexKV's tiers. Made once in the scheduler's process and once in each worker.

    Raises:
        ConfigError: a setting, or a model that cannot be served right; vLLM's start fails with its message.
        CapacityError: the machine cannot give the host tier's memory.
    """

    if HOST_HITS is not None:
        _cache_hit_source = HOST_HITS

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        config = load_config(transfer.kv_connector_extra_config)
        if role is KVConnectorRole.SCHEDULER:
            # vLLM's default answers a request whose load failed with an error; a cache must not.
            if settings.recompute_failed_loads(transfer):
                logger.info("kv_load_failure_policy is set to recompute: a load that fails is a miss")
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config, config)
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config, config)
            self._stored_step: StepMetadata | None = None  # whose stores were started last

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that is dropped is a miss later, nothing more."""
        return False

    # Worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.register(kv_caches, get_pp_group().rank_in_group, get_tensor_model_parallel_rank())

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if preemptions.BRING_METADATA:
            assert isinstance(kv_connector_metadata, StepMetadata)
            self._worker.before_step(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """The step begins: loads start here, ahead of its forward, whether or not vLLM calls ``start_load_kv`` early."""
        super().bind_connector_metadata(connector_metadata)
        if not preemptions.BRING_METADATA:
            self._worker.before_step(self._step())
        self._worker.start_loads(self._step())

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Loads have started already."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._worker.wait_for_layer(layer_name)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A graph of the whole forward would not wait for layers."""
        return load_config(extra_config).layerwise_bytes_max > 0

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        self._worker.layer_written(layer_name)

    def wait_for_save(self) -> None:
        self._start_stores_once(self._step())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        step = self._step()
        if step.idle:  # versions before 0.31 leave `wait_for_save` out of steps that compute nothing
            self._start_stores_once(step)
        return self._worker.finished(step)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """As :meth:`get_finished`, and the loads that failed as one; versions that take no such failures do not ask."""
        sent, received = self.get_finished(finished_req_ids)
        return transfer_results(sent, received, self._worker.failed_requests())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._worker.results()

    # Scheduler's side

    def on_new_request(self, request: Request) -> None:
        self._scheduler.arrived(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduler.bind(kv_cache_manager)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._scheduler.build_metadata(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        results = connector_output.kv_connector_worker_meta
        if isinstance(results, WorkerResults):
            self._scheduler.take_results(results)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.finished(request, (block_ids,)), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler.finished(request, block_ids), None

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._scheduler.take_events()

    def reset_cache(self) -> bool | None:
        return self._scheduler.reset()

    # Both

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Counts are the scheduler's."""
        if self.role is KVConnectorRole.SCHEDULER:
            return self._scheduler.take_stats()
        return FlexKVStats(data={}) if WORKERS_MUST_SEND else None

    def shutdown(self) -> None:
        (self._scheduler if self.role is KVConnectorRole.SCHEDULER else self._worker).shutdown()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return FlexKVStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return FlexKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _start_stores_once(self, step: StepMetadata) -> None:
        if step is not self._stored_step:
            self._stored_step = step
            self._worker.start_stores(step)

    def _step(self) -> StepMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata
