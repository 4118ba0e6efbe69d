"""KV caches that vLLM itself lays out, of models that its CPU build does not run: every block of every group comes back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    KVQuantMode,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import ConfigError
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import TransferOp
from flexkv_core.types import KEY_BYTES, Direction
from flexkv_kernels import CpuCopier
from flexkv_vllm.groups import Groups, of_lists
from flexkv_vllm.layout import check_supported, device_segments, identity, slot_layout
from flexkv_vllm.ranks import fill_shard

SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
BY_TOKEN = {"dtype": torch.int8, "kv_quant_mode": KVQuantMode.INT8_PER_TOKEN_HEAD, "state_content_bytes": 136}
"""A scale for K and one for V lie beside the 128 numbers of a token and head."""


def full(**fields: Any) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=16, **{**SHAPE, **fields})


def window(**fields: Any) -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=16, sliding_window=40, **{**SHAPE, **fields})


MODELS: dict[str, dict[str, KVCacheSpec]] = {
    "equal groups": {"f": full(), "w0": window(), "w1": window()},
    "padded group": {"f0": full(), "f1": full(), **{f"w{i}": window() for i in range(5)}},
    "blocks of two sizes": {"f": full(), "w0": window(num_kv_heads=4), "w1": window(num_kv_heads=4)},
    "scales a token and head": {"f0": full(**BY_TOKEN), "f1": full(**BY_TOKEN)},
    "layers of two sizes": {"f0": full(), "f1": full(), "f2": full(num_kv_heads=1)},
    "8-bit numbers": {"f": full(dtype=torch.float8_e4m3fn), "w": window(dtype=torch.float8_e4m3fn)},
    "windows of two sizes of layers": {"w0": window(), "w1": window(num_kv_heads=4)},
}


def vllm_config(**fields: Any) -> Any:
    model = {
        "model": "/nowhere",
        "revision": None,
        "quantization": None,
        "dtype": torch.float32,
        "is_hybrid": False,
        "is_attention_free": False,
        "hf_config": SimpleNamespace(model_type="toy"),
        "get_total_num_hidden_layers": lambda: 4,
    }
    parallel = {"pipeline_parallel_size": 1, "tensor_parallel_size": 1}
    parts: dict[str, Any] = {
        "attention_config": {"hisparse_config": None},
        "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
        "cache_config": {
            "get_resolved_kv_cache_layout": lambda: KVCacheLayout.LBHNC,
            "prefix_cache_retention_interval": None,
            "num_gpu_blocks_override": None,
            "cache_dtype": "auto",
        },
        "parallel_config": parallel,
        "model_config": model,
        "device_config": {"device_type": "cpu"},
        "kv_transfer_config": {
            "kv_connector": "FlexKVConnector",
            "kv_connector_module_path": "flexkv_vllm.connector",
        },
    }
    for name, changed in fields.items():
        parts[name] = {**parts.get(name, {}), **changed}
    made = {name: SimpleNamespace(**part) for name, part in parts.items()}
    return SimpleNamespace(**{"speculative_config": None, **made})


def laid_out(
    config: Any, specs: Mapping[str, KVCacheSpec], layout: KVCacheLayout
) -> tuple[KVCacheConfig, dict[str, torch.Tensor]]:
    config.cache_config.get_resolved_kv_cache_layout = lambda: layout
    found = get_kv_cache_config_from_groups(config, get_kv_cache_groups(config, dict(specs)), 4 << 20)
    return found, allocate_kv_cache(found, torch.device("cpu"), layout)


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.BLHNC], ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", MODELS)
def test_every_block_of_every_group_comes_back(name: str, layout: KVCacheLayout) -> None:
    config, settings = vllm_config(), FlexKVConfig()
    worker, tensors = laid_out(config, MODELS[name], layout)
    scheduler = generate_scheduler_kv_cache_config([worker])
    check_supported(config, scheduler, settings)
    groups = Groups.of(scheduler, None)
    assert groups == Groups.of(worker, None)
    slots_are = slot_layout(config, scheduler, settings)
    assert slots_are == slot_layout(config, worker, settings), (
        "the scheduler knows the first layer of a group only"
    )
    found, _spare = fill_shard(
        device_segments(tensors, worker), slots_are.device_block_bytes, torch.device("cpu")
    )
    copier = CpuCopier(found)
    host = HostSegment.create(8, slots_are)
    copier.bind(host, 0)

    # Two slots; the tables of the groups have no block in common, and windows have lost the first slot's.
    ids = iter(np.random.default_rng(3).permutation(np.arange(1, worker.num_blocks)).tolist())
    tables = [[next(ids) for _ in range(2 * groups.slot_tokens // size)] for size in groups.block_tokens]
    raw = next(iter(tensors.values())).untyped_storage()
    memory = torch.tensor([], dtype=torch.uint8).set_(raw)
    memory.copy_(torch.randint(0, 256, memory.shape, dtype=torch.uint8))
    before = layer_bytes(worker, tensors, tables)
    keys, slots = os.urandom(2 * KEY_BYTES), np.array([6, 1], np.int32)
    copier.gather(TransferOp(1, Direction.STORE, keys, slots, groups.blocks(of_lists(tables), 0, 2)), None)

    memory.zero_()
    moved = [[next(ids) for _ in table] for table in tables]
    for group, size in enumerate(groups.block_tokens):
        if groups.windows[group] is not None:
            moved[group][: groups.slot_tokens // size] = [0] * (groups.slot_tokens // size)
    wanted = groups.blocks(of_lists(moved), 0, 2)
    assert copier.scatter(TransferOp(2, Direction.LOAD, keys, slots, wanted), None, verify=True).all()
    for (layer, place), data in layer_bytes(worker, tensors, moved).items():
        if moved[group_of(worker, layer)][place]:
            assert data == before[layer, place], (layer, place)
    host.close()


def group_of(config: KVCacheConfig, layer: str) -> int:
    return next(i for i, group in enumerate(config.kv_cache_groups) if layer in group.layer_names)


def layer_bytes(
    config: KVCacheConfig, tensors: Mapping[str, torch.Tensor], tables: list[list[int]]
) -> dict[tuple[str, int], bytes]:
    """What each layer sees of its group's blocks, by layer and place in the table."""
    return {
        (layer, place): tensor[block].contiguous().view(torch.uint8).numpy().tobytes()
        for layer, tensor in tensors.items()
        for place, block in enumerate(tables[group_of(config, layer)])
    }


LOCAL = ChunkedLocalAttentionSpec(block_size=16, attention_chunk_size=64, **SHAPE)
STATE = MambaSpec(block_size=16, shapes=((4096,),), dtypes=(torch.float32,))


@pytest.mark.parametrize("spec", [LOCAL, STATE], ids=lambda spec: type(spec).__name__)
def test_layers_that_are_not_understood_are_refused(spec: KVCacheSpec) -> None:
    groups = [
        SimpleNamespace(layer_names=["f"], kv_cache_spec=full()),
        SimpleNamespace(layer_names=["x"], kv_cache_spec=spec),
    ]
    with pytest.raises(ConfigError, match=f"layer x keeps its KV as {type(spec).__name__}"):
        check_supported(vllm_config(), SimpleNamespace(kv_cache_groups=groups), FlexKVConfig())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_config": {"is_hybrid": True}}, "recurrent state"),
        ({"model_config": {"is_attention_free": True}}, "recurrent state"),
        ({"cache_config": {"calculate_kv_scales": True}}, "calculate_kv_scales"),
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "decode_context_parallel_size = 2"),
        ({"parallel_config": {"pipeline_parallel_size": 2}}, "--disable-hybrid-kv-cache-manager"),
    ],
)
def test_what_cannot_be_served_is_refused(fields: dict[str, Any], words: str) -> None:
    config = vllm_config()
    found, _ = laid_out(config, MODELS["equal groups"], KVCacheLayout.LBHNC)
    with pytest.raises(ConfigError, match=words):
        check_supported(vllm_config(**fields), found, FlexKVConfig())


@pytest.mark.parametrize("name", ["equal groups", "windows of two sizes of layers"])
def test_connector_that_knows_one_table_is_refused(name: str) -> None:
    """It would not hear of blocks that a window gives back, nor report a load that failed."""
    config = vllm_config(
        kv_transfer_config={"kv_connector": "ExampleConnector", "kv_connector_module_path": None}
    )
    found, _ = laid_out(config, MODELS[name], KVCacheLayout.LBHNC)
    with pytest.raises(ConfigError, match="found ExampleConnector"):
        check_supported(config, found, FlexKVConfig())


def test_groups_that_are_not_filled_cannot_be_verified() -> None:
    config, settings = vllm_config(), FlexKVConfig(verify_sample=0.5)
    check_supported(config, laid_out(config, MODELS["equal groups"], KVCacheLayout.LBHNC)[0], settings)
    with pytest.raises(ConfigError, match="verify_sample"):
        check_supported(config, laid_out(config, MODELS["padded group"], KVCacheLayout.LBHNC)[0], settings)


def test_dtype_and_scales_of_a_quantised_cache_are_part_of_the_identity(tmp_path: Path) -> None:
    """Scales lie among the weights: bytes that were divided by other ones are never found."""
    weights = tmp_path / "model.safetensors"

    def named(content: bytes, **cache: Any) -> dict[str, object]:
        weights.write_bytes(content)
        config = vllm_config(model_config={"model": str(tmp_path)}, cache_config=cache)
        dtype = torch.float32 if cache["cache_dtype"] == "auto" else torch.uint8
        found, _ = laid_out(config, {"f0": full(dtype=dtype), "f1": full(dtype=dtype)}, KVCacheLayout.LBHNC)
        return identity(config, found, FlexKVConfig())

    names = [
        named(b"scales", cache_dtype="auto"),
        named(b"scales", cache_dtype="fp8_e4m3"),
        named(b"scales", cache_dtype="fp8_e5m2"),
        named(b"scales", cache_dtype="fp8_e4m3", kv_cache_dtype_skip_layers=["0"]),
        named(b"scales", cache_dtype="fp8_e4m3", kv_cache_dtype_skip_layers=["1"]),
        named(b"other scales", cache_dtype="fp8_e4m3"),
    ]
    assert all(one != other for i, one in enumerate(names) for other in names[:i])


def test_packing_of_the_cpu_is_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines with and without tiles pack K differently, and may share a store."""
    config = vllm_config()
    found, _ = laid_out(config, MODELS["equal groups"], KVCacheLayout.LBHNC)
    seen = []
    for has_tiles in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_tiles=has_tiles: has_tiles)
        seen.append(identity(config, found, FlexKVConfig())["packing"])
    assert seen[0] == torch.backends.cpu.get_cpu_capability() != seen[1]
