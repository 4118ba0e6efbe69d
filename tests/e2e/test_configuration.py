"""What cannot be served is refused before the engine serves, in one clear error; what can be is found by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from transformers import Lfm2Config, MambaConfig, PretrainedConfig

from flexkv_core.cli.harness.server import KV_TRANSFER_CONFIG
from tests.e2e.checks import hit_differences
from tests.e2e.engine import Engine, prompt_tokens


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"host_bites": "1GiB"}, ["host_bites", "host_bytes"]),
        ({"host_bytes": "64TiB"}, ["host_bytes"]),
        ({"host_bytes": 1000}, ["host_bytes"]),
        ({"tokens_per_block": 96}, ["tokens_per_block", "96", "64"]),
        ({"eviction": "newest"}, ["eviction", "newest", "lru"]),
    ],
)
def test_bad_setting_is_refused_by_name(llama: Path, config: Mapping[str, object], words: list[str]) -> None:
    with pytest.raises(Exception) as refusal, Engine(llama, config):  # noqa: PT011  vLLM passes our error through as it is
        pass
    for word in words:
        assert word in str(refusal.value)


def test_hybrid_model_is_served_without_the_hybrid_manager(tiny_model: Callable[[str], Path]) -> None:
    """Windowed layers keep every block then, too, as for connectors that know one block table only."""
    options = {"disable_hybrid_kv_cache_manager": True}
    with Engine(tiny_model("hybrid"), {"host_bytes": "128MiB"}, options) as engine:
        assert len(engine.groups) == 1
        for length in (200, 1500):  # shorter and longer than the window
            assert hit_differences(engine, prompt_tokens(length, length)) == set()


def test_blocks_of_two_engine_blocks(llama: Path) -> None:
    with Engine(llama, {"host_bytes": "128MiB", "tokens_per_block": 128}) as engine:
        prompt = prompt_tokens(800, 1000)  # 15 engine blocks, 7 of ours
        engine.reset(external=True)
        cold = engine.ask(prompt)
        computed = engine.kv_bytes(cold.blocks[:14])
        engine.reset()
        host = engine.ask(prompt)
        assert host.external_tokens == 7 * 128
        assert host.token_ids == cold.token_ids
        assert (engine.kv_bytes(host.blocks[:14]) == computed).all()


def test_mla_bytes_come_back(tiny_model: Callable[[str], Path]) -> None:
    """On a CPU an outside hit of MLA differs from a recomputation whoever brings it, so the bytes are compared."""
    with Engine(tiny_model("mla"), {"host_bytes": "128MiB"}, {"block_size": 16}) as engine:
        prompt = prompt_tokens(810, 500)
        cold = engine.ask(prompt)
        full_blocks = (len(prompt) - 1) // engine.block_tokens
        computed = engine.kv_bytes(cold.blocks[:full_blocks])
        engine.reset()
        host = engine.ask(prompt)
        assert host.external_tokens == full_blocks * engine.block_tokens
        assert (engine.kv_bytes(host.blocks[:full_blocks]) == computed).all()


def test_bfloat16_hit_equals_device_hit(llama: Path) -> None:
    with Engine(llama, {"host_bytes": "128MiB"}, {"dtype": "bfloat16"}) as engine:
        found = hit_differences(engine, prompt_tokens(820, 1000))
        assert not {difference for difference in found if "recomputation" not in difference}


def test_one_engine_after_another_shares_nothing(llama: Path) -> None:
    prompt = prompt_tokens(830, 700)
    for _ in range(2):
        with Engine(llama, {"host_bytes": "128MiB"}) as engine:
            assert engine.ask(prompt).cached_tokens == 0


def test_module_path_where_plugins_are_off(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is unknown to vLLM then; the path alone finds the connector."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.delitem(KVConnectorFactory._registry, "FlexKVConnector", raising=False)
    transfer = {
        **json.loads(KV_TRANSFER_CONFIG),
        "kv_connector_module_path": "flexkv_vllm.connector",
        "kv_connector_extra_config": {"host_bytes": "64MiB"},
    }
    with Engine(llama, options={"kv_transfer_config": transfer}) as engine:
        assert "FlexKVConnector" not in KVConnectorFactory._registry
        prompt = prompt_tokens(170, 300)
        wanted = engine.ask(prompt)
        engine.reset()
        again = engine.ask(prompt)
        assert (again.external_tokens, again.token_ids) == (4 * engine.block_tokens, wanted.token_ids)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("MambaForCausalLM", MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=16)),
        (
            "Lfm2ForCausalLM",
            Lfm2Config(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                layer_types=["conv", "full_attention"],
            ),
        ),
    ],
    ids=["Mamba", "short convolutions"],
)
def test_recurrent_state_is_refused_before_the_weights(
    demo_model: Path, tmp_path: Path, architecture: str, config: PretrainedConfig
) -> None:
    """There are no weights here to load."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_model / name, tmp_path / name)
    config.save_pretrained(tmp_path)
    fields = {**json.loads((tmp_path / "config.json").read_text()), "architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(Exception) as refusal, Engine(tmp_path):  # noqa: PT011  vLLM passes our error through as it is
        pass
    words = f"FlexKV: {tmp_path} keeps a recurrent state (Mamba, linear attention or short convolutions)."
    assert words in str(refusal.value)


@pytest.mark.extended
@pytest.mark.hit
@pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM's CPU build quantises its KV cache with AVX-512 or AMX only",
)
def test_quantised_cache_comes_back(llama: Path) -> None:
    """8-bit numbers. A recomputation differs: it reads what it has not quantised."""
    with Engine(llama, {"host_bytes": "128MiB"}, {"kv_cache_dtype": "fp8"}) as engine:
        assert engine.kv_tensors[0].element_size() == 1
        found = hit_differences(engine, prompt_tokens(840, 1000))
        assert not {difference for difference in found if "recomputation" not in difference}
        counters = engine.manager.counters()
        assert counters.stored_bytes == counters.stored_blocks * 2 * engine.block_tokens * 2 * 2 * 64


@pytest.mark.extended
@pytest.mark.hit
@pytest.mark.parametrize(
    ("kind", "kinds"),
    [("gpt-oss", ["FullAttentionSpec", "SlidingWindowSpec"]), ("window", ["SlidingWindowSpec"])],
)
def test_other_models_with_windows(tiny_model: Callable[[str], Path], kind: str, kinds: list[str]) -> None:
    """gpt-oss, with attention sinks and experts; and windows in all layers."""
    with Engine(tiny_model(kind), {"host_bytes": "128MiB"}, {"max_num_batched_tokens": 256}) as engine:
        assert sorted(type(group.kv_cache_spec).__name__ for group in engine.groups) == kinds
        for length in (100, 1000):  # shorter and longer than the window
            assert hit_differences(engine, prompt_tokens(length, length)) == set()
