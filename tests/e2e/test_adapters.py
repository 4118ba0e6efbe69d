"""LoRA adapters on a real engine: each has a cache of its own, and finds it again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.e2e.engine import BLOCK_TOKENS, Engine, prompt_tokens

PROMPT = prompt_tokens(4000, 300)
HIT = 4 * BLOCK_TOKENS
RANK = 8
# Rows of the tiny Llama's projections; each takes the hidden state of 256.
ROWS = {"q_proj": 512, "k_proj": 128, "v_proj": 128}


def make_adapter(folder: Path, seed: int) -> Path:
    """An adapter in peft's format, strong enough to change every token."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(2):
        for name, rows in ROWS.items():
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{base}.lora_A.weight"] = torch.randn(RANK, 256, generator=generator) / 16
            weights[f"{base}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) / 3
    save_file(weights, str(folder / "adapter_model.safetensors"))
    fields = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(ROWS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoRARequest | None]:
    root = tmp_path_factory.mktemp("adapters")
    a, b = make_adapter(root / "a", 1), make_adapter(root / "b", 2)
    return {"base": None, "a": LoRARequest("a", 1, str(a)), "b": LoRARequest("b", 2, str(b))}


@pytest.fixture(scope="module")
def engine(llama: Path) -> Iterator[Engine]:
    options = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
    with Engine(llama, {"host_bytes": "128MiB"}, options) as running:
        yield running


def ask(engine: Engine, adapter: LoRARequest | None) -> tuple[tuple[int, ...], int]:
    """The answer's tokens and how many of the prompt's came from FlexKV."""
    engine.reset()
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    (output,) = engine.llm.generate(
        {"prompt_token_ids": PROMPT}, params, lora_request=adapter, use_tqdm=False
    )
    engine.settle()
    return tuple(output.outputs[0].token_ids), output.num_cached_tokens


def test_adapters_share_nothing_and_find_their_own(
    engine: Engine, adapters: dict[str, LoRARequest | None]
) -> None:
    cold = {name: ask(engine, adapter) for name, adapter in adapters.items()}
    assert [cached for _, cached in cold.values()] == [0, 0, 0], (
        "no blocks of another adapter, nor of the model without one"
    )
    assert len({tokens for tokens, _ in cold.values()}) == 3, "the adapters change the answer"
    for name in ("b", "base", "a"):
        assert ask(engine, adapters[name]) == (cold[name][0], HIT)
    engine.check_integrity()
