"""A model with windows at the connector's interface: vLLM's own block tables, two ranks, and steps that the test plays.

The scheduler's side and the workers' are the real ones. What leaves a window is given to the next request in the very next step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.request import RequestStatus
from vllm.v1.worker.utils import allocate_kv_cache

from flexkv_core.config import FlexKVConfig
from flexkv_core.transfer.plan import TransferOp
from flexkv_kernels.copier import CpuCopier
from flexkv_vllm.metadata import WorkerResults
from flexkv_vllm.scheduler_side import SchedulerSide
from flexkv_vllm.worker_side import WorkerSide
from tests.unit.vllm.test_group_layouts import MODELS, laid_out, vllm_config

BLOCK = 16
WINDOW_BLOCKS = 3  # of 40 tokens
CHUNK = 4 * BLOCK
RANKS = 2
TIMEOUT_S = 30.0


class WindowEngine:
    """Groups of full attention and windows, ``window_groups`` of these. On the device is what a prompt of 256 tokens holds at most while it
    is computed, and the null block."""

    def __init__(self, model: str, window_groups: int, **settings: Any) -> None:
        blocks = 16 + window_groups * (WINDOW_BLOCKS + CHUNK // BLOCK) + 1
        config = vllm_config(
            parallel_config={
                "tensor_parallel_size": RANKS,
                "pipeline_parallel_size": 1,
                "data_parallel_index": 0,
            },
            kv_transfer_config={
                "kv_connector": "FlexKVConnector",
                "kv_connector_module_path": "flexkv_vllm.connector",
                "is_kv_consumer": True,
                "is_kv_producer": True,
            },
            scheduler_config={"disable_hybrid_kv_cache_manager": False, "async_scheduling": False},
            cache_config={"num_gpu_blocks_override": blocks},
        )
        config.kv_events_config = None
        cache, _ = laid_out(config, MODELS[model], KVCacheLayout.LBHNC)
        settings = FlexKVConfig(host_bytes="64MiB", transfer_timeout_s=TIMEOUT_S, **settings)
        self.tables = KVCacheManager(
            cache, max_model_len=4096, scheduler_block_size=BLOCK, hash_block_size=BLOCK, enable_caching=False
        )
        self.groups = cache.kv_cache_groups
        self.scheduler = SchedulerSide(config, cache, settings)
        self.scheduler.bind(self.tables)
        self.layers, self.workers = [], []
        for rank in range(RANKS):
            layers = allocate_kv_cache(cache, torch.device("cpu"), KVCacheLayout.LBHNC)
            worker = WorkerSide(config, cache, settings)
            worker.register(layers, 0, rank)
            self.layers.append(layers)
            self.workers.append(worker)
        self.computed: dict[tuple[int, str, int], torch.Tensor] = {}
        self.layer_pause_s = 0.0
        self.loaded: list[set[str]] = [set() for _ in range(RANKS)]

    def blocks_of(self, request: Any) -> tuple[list[int], ...]:
        return self.tables.get_block_ids(request.request_id)

    def compute(self, request: Any, first: int, stop: int) -> None:
        """Every layer of every rank writes the request's blocks ``first`` … ``stop`` - 1, and remembers what it wrote; one after another,
        windows first, and each is announced."""
        tables = {
            name: table
            for table, group in zip(self.blocks_of(request), self.groups, strict=True)
            for name in group.layer_names
        }
        for name in sorted(tables, key=lambda name: (name[0] == "f", name)):
            for rank, layers in enumerate(self.layers):
                for place in range(first, stop):
                    written = torch.rand(layers[name][0].shape)
                    layers[name][tables[name][place]] = written
                    self.computed[rank, name, place] = written
                self.workers[rank].layer_written(name)
            time.sleep(self.layer_pause_s)

    def step(self, request: Any = None, tokens: int = 0, more: Any = None) -> tuple[set[str], set[str]]:
        """One step, which computes ``tokens`` of ``request`` and gives it ``more`` blocks; whose load has ended on all ranks, and whose
        has failed on any."""
        is_new = request is not None and not request.num_computed_tokens
        new = (
            [SimpleNamespace(req_id=request.request_id, block_ids=self.blocks_of(request))] if is_new else []
        )
        old = [request.request_id] if request and not is_new else []
        blocks = [more.get_block_ids(allow_none=True)] if old else []
        metadata = self.scheduler.build_metadata(
            SimpleNamespace(
                num_scheduled_tokens={request.request_id: tokens} if request else {},
                total_num_scheduled_tokens=tokens,
                preempted_req_ids=set(),
                scheduled_new_reqs=new,
                scheduled_cached_reqs=SimpleNamespace(
                    req_ids=old, new_block_ids=blocks, resumed_req_ids=set()
                ),
            )
        )
        results, failed = WorkerResults({}), set()
        for worker in self.workers:
            worker.before_step(metadata)
            worker.start_loads(metadata)
        if request and tokens:
            start = request.num_computed_tokens // BLOCK
            self.compute(request, start, start + tokens // BLOCK)
        for worker, loaded in zip(self.workers, self.loaded, strict=True):
            worker.start_stores(metadata)
            loaded |= worker.finished(metadata)[1]  # of one rank maybe a step later than of another
            failed |= worker.failed_requests()
            assert not worker.failed_blocks(), "vLLM raises for single blocks of a model with several tables"
            found = worker.results()
            results = results.aggregate(found) if found else results
        self.scheduler.take_results(results)
        return set.intersection(*self.loaded), failed

    def prefill(self, request: Any) -> None:
        assert self.scheduler.matched_tokens(request, 0) == (0, False)
        while request.num_computed_tokens < request.num_tokens:
            more = self.tables.allocate_slots(request, CHUNK)
            assert more is not None
            self.step(request, CHUNK, more)
            request.num_computed_tokens += CHUNK

    def settle(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while any(state.stores for state in self.scheduler._requests.values()):
            assert time.monotonic() < deadline
            self.step()

    def load(self, request: Any) -> bool:
        """Has the request loaded; whether that succeeded."""
        tokens, is_async = self.scheduler.matched_tokens(request, 0)
        assert (tokens, is_async) == (hit_of(request), True)
        assert self.tables.allocate_slots(
            request, 0, num_external_computed_tokens=tokens, delay_cache_blocks=True
        )
        self.scheduler.allocated(request, self.tables.get_blocks(request.request_id), tokens)
        loaded, failed = set[str](), set[str]()
        deadline = time.monotonic() + TIMEOUT_S
        while request.request_id not in loaded:
            assert time.monotonic() < deadline
            loaded, broken = self.step()
            failed |= broken
        return request.request_id not in failed

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()


def make_request(name: str, first: int, tokens: int) -> Any:
    return SimpleNamespace(
        request_id=name,
        all_token_ids=list(range(first, first + tokens)),
        num_tokens=tokens,
        num_prompt_tokens=tokens,
        num_computed_tokens=0,
        num_in_flight_tokens=0,
        status=RequestStatus.RUNNING,
        lora_request=None,
        cache_salt=None,
        mm_features=None,
        is_finished=lambda: False,
    )


def hit_of(request: Any) -> int:
    """Tokens that a load brings: all that was stored, or all but what must be computed."""
    return min(4 * CHUNK, (request.num_tokens - 1) // BLOCK * BLOCK)


@pytest.fixture(params=[True, False], ids=["layer by layer", "whole"])
def engine(request: pytest.FixtureRequest) -> Iterator[WindowEngine]:
    """How stores are copied; for layers there must be more than one of a group."""
    if request.param:
        engine = WindowEngine("padded group", 3, layerwise_store_bytes_min=1)
    else:
        engine = WindowEngine("equal groups", 2)
    yield engine
    engine.close()


def no_blocks(engine: WindowEngine) -> tuple[list[int], ...]:
    return tuple([] for _ in engine.groups)


def assert_loaded(
    engine: WindowEngine, request: Any, computed: dict[tuple[int, str, int], torch.Tensor]
) -> None:
    """All blocks of full attention, the last ones of a window, and nothing else, on both ranks."""
    hit = hit_of(request) // BLOCK
    for table, group in zip(engine.blocks_of(request), engine.groups, strict=True):
        held = [place for place in range(hit) if table[place]]
        is_full = not hasattr(group.kv_cache_spec, "extra_retained_tokens")
        assert held == list(range(0 if is_full else max(0, hit - WINDOW_BLOCKS), hit))
        for rank, layers in enumerate(engine.layers):
            for name in group.layer_names:
                for place in held:
                    assert torch.equal(layers[name][table[place]], computed[rank, name, place]), (name, place)


def test_blocks_are_stored_before_they_leave_and_only_a_window_is_loaded(
    engine: WindowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores are slow, and the next chunk takes the very blocks that the window gave back."""
    gather = CpuCopier.gather

    def slow(copier: CpuCopier, op: TransferOp, after: object, layers: range | None = None) -> None:
        time.sleep(0.05)
        gather(copier, op, after, layers)

    monkeypatch.setattr(CpuCopier, "gather", slow)
    first = make_request("first", 0, 4 * CHUNK)
    engine.prefill(first)
    engine.settle()
    computed = dict(engine.computed)
    engine.tables.free(first)
    engine.scheduler.finished(first, no_blocks(engine))
    for tokens in range(BLOCK + 1, 5 * CHUNK, BLOCK):  # each needs other blocks of the windows
        again = make_request(f"again {tokens}", 0, tokens)
        assert engine.load(again)
        assert_loaded(engine, again, computed)
        engine.tables.free(again)
        engine.scheduler.finished(again, no_blocks(engine))


def test_damage_costs_the_whole_load_on_whichever_rank(engine: WindowEngine) -> None:
    first = make_request("first", 0, 4 * CHUNK)
    engine.prefill(first)
    engine.settle()
    engine.tables.free(first)
    engine.scheduler.finished(first, no_blocks(engine))
    host = engine.scheduler.manager.host
    host.checksums[:, 1] ^= 1  # of the second rank only
    again = make_request("again", 0, 5 * CHUNK)
    assert not engine.load(again)
    assert engine.scheduler.matched_tokens(again, 0) == (0, False), "it is computed, not asked for again"


def test_a_layer_of_several_groups_is_stored_when_all_have_written_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers of the groups share memory. The copy of the first begins while the second is computed, and not before."""
    engine = WindowEngine("padded group", 3, layerwise_store_bytes_min=1)
    gather, copied = CpuCopier.gather, []

    def watched(copier: CpuCopier, op: TransferOp, after: object, layers: range | None = None) -> None:
        if copier is engine.workers[0]._copier:
            copied.append((layers, {name for rank, name, _ in engine.computed if not rank}))
        gather(copier, op, after, layers)

    monkeypatch.setattr(CpuCopier, "gather", watched)
    engine.layer_pause_s = 0.05
    request = make_request("first", 0, CHUNK)
    engine.prefill(request)
    engine.settle()
    names = {name for group in engine.groups for name in group.layer_names}
    assert [layers for layers, _ in copied] == [range(1), range(1, 2)]
    assert copied[0][1] == names - {"f1"}, "the last of those that lie in the second part"
    engine.close()
