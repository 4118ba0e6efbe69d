"""KV kept as fp8 at the connector's interface: shards of several ranks, values that cannot be kept, and what is refused with its reason."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import ConfigError
from flexkv_core.layout import KVLayout
from flexkv_core.quantised import quantised_layout
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import TransferOp
from flexkv_core.types import KEY_BYTES, Direction
from flexkv_kernels import copier_over
from flexkv_kernels.segments import pieces_of
from flexkv_vllm.layout import check_supported
from flexkv_vllm.ranks import fill_shard
from tests.integration.serving import DEADLINE_MS, ServerProcess
from tests.unit.kernels.quantising_rig import rounded
from tests.unit.vllm.test_ranks import SPEC, ranks_of
from tests.unit.vllm.test_tensor_parallel import (
    BLOCK_TOKENS,
    GOT,
    LAYERS,
    PROMPT,
    PUT,
    PlayedEngine,
    _taken,
    _vllm_config,
    leave,
    make_request,
)

FP8: dict[str, Any] = {"dtype": torch.bfloat16, "store_dtype": "fp8"}


@pytest.fixture
def engine() -> Iterator[PlayedEngine]:
    engine = PlayedEngine(4, layerwise_bytes_max="1GiB", **FP8)
    yield engine
    engine.close()


def wanted(engine: PlayedEngine, rank: int) -> torch.Tensor:
    """What must come back of the blocks that were put."""
    return rounded(engine.bytes_of(rank, PUT).flatten(2)[..., None]).reshape(engine.bytes_of(rank, PUT).shape)


@pytest.mark.parametrize("in_step", [False, True])
def test_every_rank_gets_its_own_values_back_rounded(engine: PlayedEngine, in_step: bool) -> None:
    first = make_request("first", PROMPT)
    engine.put(first, PUT)
    second, found = make_request("second", PROMPT), 5 * BLOCK_TOKENS
    if in_step:
        leave(engine, first)
        engine.scheduler.arrived(second)
    assert engine.scheduler.matched_tokens(second, 0) == (found, not in_step)
    if in_step:
        engine.scheduler.allocated(second, _taken([*GOT, 11]), found)
        second.num_computed_tokens = found
        assert all(missing == set() for _, missing in engine.step(second, [*GOT, 11], 3))
    else:
        assert engine.load(second, GOT, found) == [set()] * 4
    for rank in range(4):
        assert torch.equal(engine.bytes_of(rank, GOT), wanted(engine, rank))
        assert not torch.equal(engine.bytes_of(rank, GOT), engine.bytes_of(rank, PUT))


def test_slots_are_half_as_large(engine: PlayedEngine) -> None:
    exact = PlayedEngine(4, dtype=torch.bfloat16)
    half, whole = (each.scheduler.manager.layout.shard_bytes for each in (engine, exact))
    exact.close()
    assert half == whole // 2 + 8 * len(LAYERS) + 8  # two scales a layer, to 16 bytes


def test_a_value_that_is_not_finite_ends_what_is_stored(engine: PlayedEngine) -> None:
    """On one rank: the block and what follows it are nobody's hit."""
    compute = engine.compute

    def with_nan(blocks: list[int]) -> None:
        compute(blocks)
        engine.tensors[2][1][blocks[3], 0, 5, 7] = float("nan")

    engine.compute = with_nan  # type: ignore[method-assign]
    engine.put(make_request("first", PROMPT), PUT)
    second = make_request("second", PROMPT)
    assert engine.scheduler.matched_tokens(second, 0) == (3 * BLOCK_TOKENS, True)
    counters = engine.scheduler.manager.counters()
    assert (counters.unstorable_blocks, counters.corrupt_blocks, counters.failed_stores) == (1, 0, 0)
    engine.scheduler.manager.check_integrity()


def test_rounded_and_exact_blocks_have_other_keys() -> None:
    engines = [PlayedEngine(1, dtype=torch.bfloat16), PlayedEngine(1, **FP8), PlayedEngine(1)]
    assert len({engine.scheduler.manager.root for engine in engines}) == len(engines)
    for engine in engines:
        engine.close()


def test_one_server_keeps_both_apart(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "serve.sock", 500, "--models", "2") as server:
        served: dict[str, Any] = {"server": str(server._socket), "server_deadline_ms": DEADLINE_MS}
        rounding = PlayedEngine(2, **FP8, **served)
        exact = PlayedEngine(2, dtype=torch.bfloat16, **served)
        first = make_request("first", PROMPT)
        rounding.put(first, PUT)
        assert exact.scheduler.matched_tokens(make_request("second", PROMPT), 0) == (0, False)
        second = make_request("second", PROMPT)
        assert rounding.scheduler.matched_tokens(second, 0) == (5 * BLOCK_TOKENS, True)
        assert rounding.load(second, GOT, 5 * BLOCK_TOKENS) == [set()] * 2
        assert torch.equal(rounding.bytes_of(1, GOT), wanted(rounding, 1))
        rounding.close()
        exact.close()


def test_it_is_said_once_and_only_where_bytes_are_rounded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        PlayedEngine(2, dtype=torch.bfloat16).close()
        assert not caplog.records
        PlayedEngine(2, **FP8).close()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "store_dtype = fp8" in said[0]
    assert "answers after a hit may differ" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match=rf"store_dtype = fp8: .* has dtype {name}; only bfloat16"):
        PlayedEngine(1, dtype=dtype, store_dtype="fp8")


def test_quantised_kv_is_refused() -> None:
    cache = SimpleNamespace(cache_dtype="fp8")
    with pytest.raises(ConfigError, match="has dtype fp8; only bfloat16"):
        PlayedEngine(1, engine={"cache_config": cache}, **FP8)


def test_verification_is_refused_beside_it() -> None:
    with pytest.raises(ValueError, match="stored bytes cannot be compared"):
        FlexKVConfig(store_dtype="fp8", verify_sample=0.1)


def test_several_groups_are_refused() -> None:
    shape: dict[str, Any] = {
        "block_size": 16,
        "num_kv_heads": 1,
        "head_size": 8,
        "dtype": torch.bfloat16,
    }
    groups = [
        KVCacheGroupSpec(["a"], FullAttentionSpec(**shape)),
        KVCacheGroupSpec(["b"], SlidingWindowSpec(sliding_window=32, **shape)),
    ]
    config = _vllm_config(1)
    config.model_config.dtype = torch.bfloat16
    config.kv_transfer_config.kv_connector = "FlexKVConnector"
    config.kv_transfer_config.kv_connector_module_path = "flexkv_vllm.connector"
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    with pytest.raises(ConfigError, match="store_dtype = fp8: the model keeps its KV in 2 groups"):
        check_supported(config, KVCacheConfig(8, [], groups), FlexKVConfig(store_dtype="fp8"))


def test_stages_of_unequal_length_share_a_slot() -> None:
    """A stage with fewer layers fills its shard with a spare piece, of zeros."""
    ranks = ranks_of(2, 2, 5, SPEC)
    piece, blocks = 64, 12
    layout = KVLayout(16, 16, piece * max(ranks.stage_layers), ranks.shard_count)
    host = HostSegment.create(4, quantised_layout(layout, 2 * max(ranks.stage_layers)))
    slots, moved = np.array([2, 0], np.int32), np.array([7, 3])
    keys = bytes(range(2 * KEY_BYTES))
    for stage, layers in enumerate(ranks.stage_layers):
        for rank in range(2):
            storage = torch.randn(layers, blocks, piece // 2).to(torch.bfloat16)
            segments, spare = fill_shard(pieces_of(list(storage)), layout.device_block_bytes, storage.device)
            copier = copier_over(segments, storage.device, spare, host.layout.scales)
            copier.bind(host, ranks.shard(stage, rank))
            copier.gather(TransferOp(1, Direction.STORE, keys, slots, moved), None)
            before = rounded(storage[:, moved][..., None])[..., 0]
            storage.zero_()
            assert copier.scatter(TransferOp(2, Direction.LOAD, keys, slots, moved), None, True).all()
            assert torch.equal(storage[:, moved], before)
    assert len(set(host.checksums[slots].ravel().tolist())) == 2 * ranks.shard_count
    host.close()
