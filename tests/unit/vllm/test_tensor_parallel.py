"""Four and eight ranks at the connector's interface: one decision for all, a shard a rank, and a rank's damage is everybody's miss.

The scheduler's side and every rank's are the real ones, in one process; their messages are pickled, as between processes. The engine
around them is played by the test: it takes blocks, computes random bytes, and calls the hooks in vLLM's order.
"""

from __future__ import annotations

import ctypes
import pickle
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor

from flexkv_core.config import FlexKVConfig
from flexkv_vllm.metadata import WorkerResults
from flexkv_vllm.scheduler_side import SchedulerSide
from flexkv_vllm.worker_side import WorkerSide

BLOCK_TOKENS = 16
BLOCKS = 40
LAYERS = [f"model.layers.{index}.attn" for index in range(3)]
TIMEOUT_S = 30


class PlayedEngine:
    """``ranks`` ranks of tensor parallelism; ``tensors`` are a rank's layers, of ``dtype``. ``role``: ``kv_role``. ``engine`` changes parts
    of vLLM's configuration."""

    def __init__(
        self,
        ranks: int,
        role: str = "kv_both",
        engine: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        **settings: object,
    ) -> None:
        vllm_config = SimpleNamespace(**{**vars(_vllm_config(ranks, role)), **(engine or {})})
        vllm_config.model_config.dtype = dtype
        spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=dtype)
        page = spec.page_size_bytes
        memory = KVCacheTensor(
            len(LAYERS) * BLOCKS * page, LAYERS, layer_stride=BLOCKS * page, block_stride=page
        )
        cache = KVCacheConfig(BLOCKS, [memory], [KVCacheGroupSpec(LAYERS, spec)])
        config = FlexKVConfig(host_bytes="64MiB", transfer_timeout_s=TIMEOUT_S, **settings)  # type: ignore[arg-type]
        self.scheduler = SchedulerSide(vllm_config, cache, config)
        self.evicted: set[int] = set()
        self.scheduler.bind(SimpleNamespace(evict_blocks=self.evicted.update))
        shape = (BLOCKS, 1, BLOCK_TOKENS, 16)
        self.tensors = [[torch.zeros(shape, dtype=dtype) for _ in LAYERS] for _ in range(ranks)]
        self.workers = []
        for rank, tensors in enumerate(self.tensors):
            worker = WorkerSide(vllm_config, cache, config)
            worker.register(dict(zip(LAYERS, tensors, strict=True)), 0, rank)
            self.workers.append(worker)

    def compute(self, blocks: list[int]) -> None:
        """Every rank fills the blocks with bytes of its own."""
        for tensors in self.tensors:
            for tensor in tensors:
                tensor[blocks] = torch.rand(len(blocks), *tensor.shape[1:]).to(tensor.dtype)

    def bytes_of(self, rank: int, blocks: list[int]) -> torch.Tensor:
        return torch.stack([tensor[blocks].clone() for tensor in self.tensors[rank]])

    def step(self, request: Any = None, blocks: list[int] | None = None, tokens: int = 0) -> list[Any]:
        """One step, of a new request or of none; what each rank reports: (released, loaded), failed blocks."""
        new = [SimpleNamespace(req_id=request.request_id, block_ids=(blocks,))] if request else []
        metadata = self.scheduler.build_metadata(
            SimpleNamespace(
                num_scheduled_tokens={request.request_id: tokens} if request else {},
                total_num_scheduled_tokens=tokens,
                preempted_req_ids=set(),
                scheduled_new_reqs=new,
                scheduled_cached_reqs=SimpleNamespace(req_ids=[], new_block_ids=[], resumed_req_ids=set()),
            )
        )
        told, results = [], WorkerResults({})
        for worker in self.workers:
            received = pickle.loads(pickle.dumps(metadata))
            worker.before_step(received)
            worker.start_loads(received)
            for layer in LAYERS if request else ():
                worker.wait_for_layer(layer)
                worker.layer_written(layer)
            worker.start_stores(received)
            told.append((worker.finished(received), worker.failed_blocks()))
            found = worker.results()
            results = results.aggregate(found) if found else results
        self.scheduler.take_results(results)
        return told

    def put(self, request: Any, blocks: list[int]) -> None:
        """The request is computed, and stored."""
        self.compute(blocks)
        assert self.scheduler.matched_tokens(request, 0) == (0, False)
        self.scheduler.allocated(request, _taken(blocks), 0)
        self.step(request, blocks, request.num_tokens)
        deadline = time.monotonic() + TIMEOUT_S
        while self.scheduler._requests[request.request_id].stores:
            assert time.monotonic() < deadline
            self.step()

    def load(self, request: Any, blocks: list[int], tokens: int) -> list[set[int]]:
        """The request waits for its load; the blocks that each rank could not load."""
        self.scheduler.allocated(request, _taken(blocks), tokens)
        waiting, failed = set(range(len(self.workers))), [set() for _ in self.workers]
        deadline = time.monotonic() + TIMEOUT_S
        while waiting:
            assert time.monotonic() < deadline
            for rank, ((_, loaded), missing) in enumerate(self.step()):
                failed[rank] |= missing
                waiting -= {rank} if request.request_id in loaded else set()
        return failed

    def keys(self, request: Any) -> bytes:
        """Of the blocks that a load may bring."""
        state = self.scheduler._requests[request.request_id]
        return self.scheduler._prompt_keys(state)

    def slots(self, request: Any) -> list[int]:
        """Where these lie in host memory."""
        manager = self.scheduler.manager
        task_id, _ = manager.get_keys(self.keys(request), 0, lambda done: None)
        slots: list[int] = manager._tasks[task_id].slots.tolist()
        manager.cancel(task_id)
        return slots

    def damage(self, rank: int, slot: int) -> None:
        """One bit of a rank's shard flips in host memory."""
        host = self.scheduler.manager.host
        address = host.address + slot * host.layout.slot_bytes + rank * host.layout.shard_bytes + 77
        ctypes.c_uint8.from_address(address).value ^= 8

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()


def _vllm_config(ranks: int, role: str = "kv_both") -> Any:
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            is_kv_consumer=role != "kv_producer", is_kv_producer=role != "kv_consumer"
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=ranks, pipeline_parallel_size=1, data_parallel_index=0
        ),
        model_config=SimpleNamespace(
            model="toy",
            revision=None,
            quantization=None,
            dtype=torch.float32,
            is_hybrid=False,
            is_attention_free=False,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        device_config=SimpleNamespace(device_type="cpu"),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        speculative_config=None,
        kv_events_config=None,
    )


def _taken(blocks: list[int]) -> KVCacheBlocks:
    return KVCacheBlocks(([KVCacheBlock(block) for block in blocks],))


def make_request(name: str, tokens: int) -> Any:
    return SimpleNamespace(
        request_id=name,
        all_token_ids=list(range(tokens)),
        num_tokens=tokens,
        num_prompt_tokens=tokens,
        num_computed_tokens=0,
        lora_request=None,
        cache_salt=None,
        mm_features=None,
        is_finished=lambda: False,
    )


@pytest.fixture(params=[4, 8])
def engine(request: pytest.FixtureRequest) -> Iterator[PlayedEngine]:
    engine = PlayedEngine(
        request.param, layerwise_bytes_max="1GiB", layerwise_store_bytes_min=request.param == 8
    )
    yield engine
    engine.close()


PUT, GOT = [3, 1, 9, 20, 5], [30, 8, 2, 17, 31]
PROMPT = 5 * BLOCK_TOKENS + 3


def leave(engine: PlayedEngine, request: Any) -> None:
    """The request ends, with nothing more to store."""
    engine.scheduler.finished(request, [])


def test_every_rank_gets_its_own_shard_back(engine: PlayedEngine) -> None:
    first = make_request("first", PROMPT)
    engine.put(first, PUT)
    second = make_request("second", PROMPT)
    assert engine.scheduler.matched_tokens(second, 0) == (5 * BLOCK_TOKENS, True)
    assert engine.load(second, GOT, 5 * BLOCK_TOKENS) == [set()] * len(engine.workers)
    for rank in range(len(engine.workers)):
        assert torch.equal(engine.bytes_of(rank, GOT), engine.bytes_of(rank, PUT))
    assert not torch.equal(engine.bytes_of(0, GOT), engine.bytes_of(1, GOT))


def test_damage_of_one_rank_is_a_miss_for_all(engine: PlayedEngine) -> None:
    """The others have loaded the block; nobody relies on it, because the next decision is one for all again."""
    engine.put(make_request("first", PROMPT), PUT)
    victim = len(engine.workers) - 2
    second = make_request("second", PROMPT)
    engine.scheduler.matched_tokens(second, 0)
    engine.damage(victim, engine.slots(second)[2])
    failed = engine.load(second, GOT, 5 * BLOCK_TOKENS)
    assert failed == [{GOT[2]} if rank == victim else set() for rank in range(len(engine.workers))]
    assert engine.scheduler.manager.counters().corrupt_blocks == 1
    third = make_request("third", PROMPT)
    assert engine.scheduler.matched_tokens(third, 0) == (2 * BLOCK_TOKENS, True)


def test_a_load_within_the_step_that_fails_on_one_rank(engine: PlayedEngine) -> None:
    """Every rank waits for its layers; what the step computed is kept by no rank, and the blocks leave the prefix cache."""
    first = make_request("first", PROMPT)
    engine.put(first, PUT)
    leave(engine, first)
    longer = make_request("longer", PROMPT + 2 * BLOCK_TOKENS)
    engine.scheduler.arrived(longer)
    assert engine.scheduler.matched_tokens(longer, 0) == (5 * BLOCK_TOKENS, False)
    for slot in engine.slots(longer):
        engine.damage(1, slot)
    blocks = [*GOT, 11, 12]
    engine.scheduler.allocated(longer, _taken(blocks), 5 * BLOCK_TOKENS)
    longer.num_computed_tokens = 5 * BLOCK_TOKENS
    told = engine.step(longer, blocks, 2 * BLOCK_TOKENS + 3)
    assert [missing for _, missing in told] == [
        set(GOT) if rank == 1 else set() for rank in range(len(engine.workers))
    ]
    assert all(loaded == set() for (_, loaded), _ in told), "it never waited outside of the batch"
    assert engine.evicted == set(blocks)
    assert engine.scheduler.manager.match_keys(engine.keys(longer)) == 0
    engine.scheduler.manager.check_integrity()


def test_a_load_within_the_step_that_succeeds(engine: PlayedEngine) -> None:
    first = make_request("first", PROMPT)
    engine.put(first, PUT)
    leave(engine, first)
    second = make_request("second", PROMPT)
    engine.scheduler.arrived(second)
    assert engine.scheduler.matched_tokens(second, 0) == (5 * BLOCK_TOKENS, False)
    engine.scheduler.allocated(second, _taken([*GOT, 11]), 5 * BLOCK_TOKENS)
    second.num_computed_tokens = 5 * BLOCK_TOKENS
    told = engine.step(second, [*GOT, 11], 3)
    assert all(missing == set() for _, missing in told)
    for rank in range(len(engine.workers)):
        assert torch.equal(engine.bytes_of(rank, GOT), engine.bytes_of(rank, PUT))
