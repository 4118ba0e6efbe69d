"""What a hit in host memory costs when it is loaded layer by layer within the step, against a load that the request waits for outside of
the batch: a real vLLM server, asked two prompts in turns, in float32 and, where the processor has AVX-512, in bfloat16.

The server runs SmolLM2-135M-Instruct (30 layers) on the CPU. Its limit for layerwise loads lies between the prompts: one hit has 62 blocks
and is loaded layer by layer, the other has 63 and is loaded whole; which one goes first alternates from pair to pair. Their sizes
differ by 1.6 %, and the load is a fraction of the time, so the ratio favours layer by layer by less than 1 %. Before each question
the engine's own cache is emptied. A question that found another number of tokens stops the benchmark.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from statistics import median

from flexkv_core.cli.bench.overhead import compute_dtype, ratio_figures
from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.client import VllmClient
from flexkv_core.cli.harness.cpus import compute_cpus
from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, KV_TRANSFER_CONFIG, VllmServer

PAIRS = 40
QUICK_PAIRS = 3
HIT_BLOCKS = 62
BLOCK_TOKENS = 64
_QUESTION_TOKENS = 20
"""Behind the hit: a short question about a long text."""
_WARM_UP_PAIRS = 2
_POOL_BYTES = 1 << 30
_SEED = 20_242
_TOKEN_IDS = range(100, 40_000)
_PAUSE_S = 0.3
"""Before each question, so that what the one before left to do is done."""
VALUES_PER_TOKEN = 30 * 2 * 3 * 64  # layers, K and V, heads, head size
DTYPES = {"float32": ("fp32", 4), "bfloat16": ("bf16", 2)}
_SIDES = {"layerwise": HIT_BLOCKS, "whole": HIT_BLOCKS + 1}


def run(quick: bool = False) -> dict[str, float]:
    """Starts a server for each dtype and measures ``PAIRS`` pairs of hits.

    Returns, for each dtype, ``ttft_layerwise_ratio_<dtype>`` (median of the pairs' ratios layerwise / whole), the ends of its 95 % bootstrap
    interval, and the medians in ms; ``ttft_layerwise_ratio`` is the larger of the two ratios. Raises ServerError when a server does not
    start.
    """
    figures: dict[str, float] = {}
    dtypes = {dtype: value for dtype, value in DTYPES.items() if dtype in ("float32", compute_dtype())}
    for dtype, (name, value_bytes) in dtypes.items():
        times_ms = _measure(dtype, value_bytes, QUICK_PAIRS if quick else PAIRS)
        figures |= ratio_figures(f"ttft_layerwise_ratio_{name}", times_ms["layerwise"], times_ms["whole"])
        figures |= {f"ttft_{side}_{name}_ms": median(values) for side, values in times_ms.items()}
    worst = max(figures[f"ttft_layerwise_ratio_{name}"] for name, _ in dtypes.values())
    return {"ttft_layerwise_ratio": worst, **figures, "hit_tokens": HIT_BLOCKS * BLOCK_TOKENS}


def _measure(dtype: str, value_bytes: int, pairs: int) -> dict[str, list[float]]:
    """Times to first token in ms by side, pair by pair."""
    rng = random.Random(_SEED)
    prompts = {
        side: rng.choices(_TOKEN_IDS, k=blocks * BLOCK_TOKENS + _QUESTION_TOKENS)
        for side, blocks in _SIDES.items()
    }
    environment = {
        **CPU_ENVIRONMENT,
        "VLLM_CPU_OMP_THREADS_BIND": compute_cpus(),
        "FLEXKV_HOST_BYTES": str(_POOL_BYTES),
        "FLEXKV_LAYERWISE_BYTES_MAX": str(HIT_BLOCKS * BLOCK_TOKENS * VALUES_PER_TOKEN * value_bytes),
    }
    arguments = [*CPU_ARGUMENTS, "--dtype", dtype, "--kv-transfer-config", KV_TRANSFER_CONFIG]
    times_ms: dict[str, list[float]] = {side: [] for side in _SIDES}
    with tempfile.TemporaryDirectory(prefix="flexkv-layerwise-") as folder:
        server = VllmServer(ensure_demo_model(), arguments, environment, Path(folder) / "server.log")
        with server, VllmClient(server.base_url) as client:
            for prompt in prompts.values():
                client.complete(prompt, tokens_max=1)
            for pair in range(-_WARM_UP_PAIRS, pairs):
                for side in _SIDES if pair % 2 else reversed(_SIDES):
                    ttft_ms = _ask(client, prompts[side])
                    if pair >= 0:
                        times_ms[side].append(ttft_ms)
            time.sleep(1)  # counters come with the steps
            loads = client.metrics().total("vllm:flexkv_layerwise_loads_total")
    if loads != _WARM_UP_PAIRS + pairs:
        raise RuntimeError(f"{loads:g} loads were layerwise, expected {_WARM_UP_PAIRS + pairs}")
    return times_ms


def _ask(client: VllmClient, prompt: list[int]) -> float:
    """Time to first token in ms of a hit in host memory."""
    client.reset_prefix_cache()
    time.sleep(_PAUSE_S)
    answer = client.complete(prompt, tokens_max=1)
    wanted = (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    if answer.cached_tokens != wanted:
        raise RuntimeError(f"{answer.cached_tokens} tokens were found in a cache, expected {wanted}")
    return answer.ttft_ms
