"""A real vLLM on an NVIDIA GPU: what a miss costs with FlexKV, what a hit in host memory costs, and vLLM's own offloading beside it.

Three servers of one model share the GPU and are asked in turns: without a connector, with FlexKV, and with vLLM's own offloading
connector. The model has the shape of Llama 3.1 8B and random weights (``--load-format dummy``), because the figures depend on shapes only
and the machine may have no network. Run it with the interpreter that has the CUDA build of vLLM: ``scripts/bench gpu-engine`` uses the
caller's ``python3``.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from flexkv_core.cli.bench.overhead import ratio_figures
from flexkv_core.cli.harness.client import Completion, VllmClient
from flexkv_core.cli.harness.server import EngineServer, VllmServer, transfer_config

HIT_TOKENS = (4000, 16_000)
MISS_TOKENS = 4000
_PAIRS, _ROUNDS, _BURSTS = 30, 10, 4
_QUICK = 2
_BURST_REQUESTS, _BURST_TOKENS, _BURST_ANSWER = 32, 2000, 64
_ANSWER_TOKENS = 8
_POOL_BYTES = 12 << 30
_BLOCK_TOKENS = 16
_SEED = 20_261
_TOKEN_IDS = range(100, 40_000)
_PAUSE_S = 0.1
_VOCABULARY = 49_152
_SHAPE: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Llama 3.1 8B's, with a smaller vocabulary."""
_NATIVE_CONFIG = json.dumps(
    {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": _POOL_BYTES},
    }
)
_SIDES: Mapping[str, Sequence[str]] = {
    "none": (),
    "flexkv": ("--kv-transfer-config", transfer_config({"host_bytes": _POOL_BYTES})),
    "native": ("--kv-transfer-config", _NATIVE_CONFIG),
}
_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
_ARGUMENTS = (
    *("--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "20000"),
    *(
        "--gpu-memory-utilization",
        "0.3",
        "--max-num-batched-tokens",
        "8192",
        "--enable-prompt-tokens-details",
    ),
)


def run(quick: bool = False) -> dict[str, float | bool]:
    """Starts the three servers one after the other (two minutes) and measures.

    Returns ratios and medians in ms: ``ttft_miss_ratio_SIDE`` (with the connector / without one, median of the pairs and its interval),
    ``burst_ratio_SIDE`` (time of a burst of new prompts, with / without), ``ttft_STATE_TOKENS_SIDE_ms``, ``host_hit_ratio_TOKENS``
    (FlexKV / vLLM's own), and whether every answer to a hit in host memory was equal to that of a hit on the device. Raises ServerError
    when a server does not start, ValueError where there is no GPU.
    """
    if shutil.which("nvidia-smi") is None:
        raise ValueError("gpu-engine needs an NVIDIA GPU, and a python3 with the CUDA build of vLLM")
    rng = random.Random(_SEED)
    with tempfile.TemporaryDirectory(prefix="flexkv-gpu-") as folder, ExitStack() as stack:
        model = _model(Path(folder))
        servers: dict[str, EngineServer] = {}
        clients: dict[str, VllmClient] = {}
        for side, more in _SIDES.items():
            log = Path(folder) / f"{side}.log"
            servers[side] = stack.enter_context(VllmServer(model, [*_ARGUMENTS, *more], _ENVIRONMENT, log))
            clients[side] = stack.enter_context(VllmClient(servers[side].base_url))
        figures = _misses(clients, rng, _QUICK if quick else _PAIRS)
        for tokens in HIT_TOKENS:
            figures |= _hits(clients, rng, tokens, _QUICK if quick else _ROUNDS)
        return figures | _bursts(servers, rng, 1 if quick else _BURSTS)


def _model(folder: Path) -> Path:
    model = folder / "llama-8b-shape"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(dict(_SHAPE)))
    words = {f"<{number}>": number for number in range(_VOCABULARY)}
    Tokenizer(WordLevel(words, unk_token="<0>")).save(str(model / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<0>", "eos_token": "<2>"}
    (model / "tokenizer_config.json").write_text(json.dumps(fields))
    return model


def _misses(clients: Mapping[str, VllmClient], rng: random.Random, pairs: int) -> dict[str, float | bool]:
    times_ms: dict[str, list[float]] = {side: [] for side in clients}
    for pair in range(-2, pairs):
        prompt = rng.choices(_TOKEN_IDS, k=MISS_TOKENS)
        for side in rng.sample(sorted(clients), len(clients)):
            answer = _ask(clients[side], prompt, found=False)
            if pair >= 0:
                times_ms[side].append(answer.ttft_ms)
    figures: dict[str, float | bool] = {}
    for side in ("flexkv", "native"):
        figures |= ratio_figures(f"ttft_miss_ratio_{side}", times_ms[side], times_ms["none"])
    return figures | {f"ttft_miss_{side}_ms": statistics.median(times) for side, times in times_ms.items()}


def _hits(
    clients: Mapping[str, VllmClient], rng: random.Random, tokens: int, rounds: int
) -> dict[str, float | bool]:
    prompt = rng.choices(_TOKEN_IDS, k=tokens)
    sides = ("flexkv", "native")
    times_ms: dict[tuple[str, str], list[float]] = {
        (state, side): [] for state in ("device", "host") for side in sides
    }
    equal = dict.fromkeys(sides, True)
    recomputed = {side: _ask(clients[side], prompt, found=False) for side in sides}
    for round_number in range(-1, rounds):
        for side in sides if round_number % 2 else reversed(sides):
            on_device = _ask(clients[side], prompt, found=True)
            clients[side].reset_prefix_cache()
            from_host = _ask(clients[side], prompt, found=True)
            equal[side] &= on_device.token_ids == from_host.token_ids
            if round_number >= 0:
                times_ms["device", side].append(on_device.ttft_ms)
                times_ms["host", side].append(from_host.ttft_ms)
    medians = {key: statistics.median(times) for key, times in times_ms.items()}
    figures: dict[str, float | bool] = {
        f"host_hit_ratio_{tokens}": medians["host", "flexkv"] / medians["host", "native"]
    }
    figures |= {f"ttft_recompute_{tokens}_{side}_ms": recomputed[side].ttft_ms for side in sides}
    figures |= {f"ttft_{state}_{tokens}_{side}_ms": value for (state, side), value in medians.items()}
    return figures | {f"answers_equal_{tokens}_{side}": equal[side] for side in sides}


def _bursts(servers: Mapping[str, EngineServer], rng: random.Random, bursts: int) -> dict[str, float | bool]:
    seconds: dict[str, list[float]] = {side: [] for side in servers}
    for burst in range(-1, bursts):
        prompts = [rng.choices(_TOKEN_IDS, k=_BURST_TOKENS) for _ in range(_BURST_REQUESTS)]
        for side in rng.sample(sorted(servers), len(servers)):
            took_s = _burst(servers[side], prompts)
            if burst >= 0:
                seconds[side].append(took_s)
    figures: dict[str, float | bool] = {}
    for side in ("flexkv", "native"):
        figures[f"burst_ratio_{side}"] = statistics.median(
            a / b for a, b in zip(seconds[side], seconds["none"], strict=True)
        )
    return figures | {f"burst_{side}_s": statistics.median(times) for side, times in seconds.items()}


def _burst(server: EngineServer, prompts: Sequence[list[int]]) -> float:
    def ask(prompt: list[int]) -> None:
        with VllmClient(server.base_url) as client:
            client.complete(prompt, tokens_max=_BURST_ANSWER, ignore_eos=True)

    began = time.monotonic()
    with ThreadPoolExecutor(len(prompts)) as threads:
        list(threads.map(ask, prompts))
    return time.monotonic() - began


def _ask(client: VllmClient, prompt: list[int], found: bool) -> Completion:
    time.sleep(_PAUSE_S)
    answer = client.complete(prompt, tokens_max=_ANSWER_TOKENS, ignore_eos=True)
    wanted = (len(prompt) - 1) // _BLOCK_TOKENS * _BLOCK_TOKENS if found else 0
    if answer.cached_tokens != wanted:
        raise RuntimeError(f"{answer.cached_tokens} tokens were found in a cache, expected {wanted}")
    return answer
