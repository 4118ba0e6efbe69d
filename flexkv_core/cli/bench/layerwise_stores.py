"""What a request that misses gains when what it computes is stored layer by layer beside the computation, against a store of all layers
behind the step: a real vLLM server, asked new prompts of two kinds in turns, in float32 and, where the processor has AVX-512, in bfloat16.

The server runs SmolLM2-135M-Instruct (30 layers) on the CPU. A prompt of 16 whole blocks is stored layer by layer; one that is a token
shorter has 15 whole blocks, which is less than the server's limit, and is stored whole. Which one goes first alternates from pair to pair.
The whole answer counts as well as its first token, because a store behind the step runs beside the steps that follow. A server that
did not store half of them layer by layer stops the benchmark.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from statistics import median

from flexkv_core.cli.bench.layerwise import BLOCK_TOKENS, DTYPES, VALUES_PER_TOKEN
from flexkv_core.cli.bench.overhead import compute_dtype, ratio_figures
from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.client import VllmClient
from flexkv_core.cli.harness.cpus import compute_cpus
from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, KV_TRANSFER_CONFIG, VllmServer

PAIRS = 20
QUICK_PAIRS = 3
BLOCKS = 16
ANSWER_TOKENS = 8
_WARM_UP_PAIRS = 2
_POOL_BYTES = 1 << 30
_SEED = 20_243
_TOKEN_IDS = range(100, 40_000)
_PAUSE_S = 0.3
_SIDES = {"layerwise": BLOCKS * BLOCK_TOKENS, "whole": BLOCKS * BLOCK_TOKENS - 1}


def run(quick: bool = False) -> dict[str, float]:
    """Starts a server for each dtype and measures ``PAIRS`` pairs of misses.

    Returns, for each dtype, ``ttft_miss_layerwise_ratio_<dtype>`` (median of the pairs' ratios layerwise / whole), the ends of its 95 %
    bootstrap interval, the same of the whole answer, and the medians in ms; ``ttft_miss_layerwise_ratio`` is the largest of the first.
    Raises ServerError when a server does not start.
    """
    figures: dict[str, float] = {}
    dtypes = {dtype: value for dtype, value in DTYPES.items() if dtype in ("float32", compute_dtype())}
    for dtype, (name, value_bytes) in dtypes.items():
        found = _measure(dtype, value_bytes, QUICK_PAIRS if quick else PAIRS)
        for what, times_ms in found.items():
            ratio = f"{what}_miss_layerwise_ratio_{name}"
            figures |= ratio_figures(ratio, times_ms["layerwise"], times_ms["whole"])
            figures |= {f"{what}_{side}_{name}_ms": median(values) for side, values in times_ms.items()}
    worst = max(figures[f"ttft_miss_layerwise_ratio_{name}"] for name, _ in dtypes.values())
    return {"ttft_miss_layerwise_ratio": worst, **figures, "stored_tokens": BLOCKS * BLOCK_TOKENS}


def _measure(dtype: str, value_bytes: int, pairs: int) -> dict[str, dict[str, list[float]]]:
    """Times in ms to the first token and of the whole answer, by side, pair by pair."""
    rng = random.Random(_SEED)
    environment = {
        **CPU_ENVIRONMENT,
        "VLLM_CPU_OMP_THREADS_BIND": compute_cpus(),
        "FLEXKV_HOST_BYTES": str(_POOL_BYTES),
        "FLEXKV_LAYERWISE_STORE_BYTES_MIN": str(BLOCKS * BLOCK_TOKENS * VALUES_PER_TOKEN * value_bytes),
    }
    arguments = [*CPU_ARGUMENTS, "--dtype", dtype, "--kv-transfer-config", KV_TRANSFER_CONFIG]
    times_ms = {what: {side: list[float]() for side in _SIDES} for what in ("ttft", "answer")}
    with tempfile.TemporaryDirectory(prefix="flexkv-layerwise-") as folder:
        server = VllmServer(ensure_demo_model(), arguments, environment, Path(folder) / "server.log")
        with server, VllmClient(server.base_url) as client:
            for pair in range(-_WARM_UP_PAIRS, pairs):
                for side in _SIDES if pair % 2 else reversed(_SIDES):
                    time.sleep(_PAUSE_S)
                    prompt = rng.choices(_TOKEN_IDS, k=_SIDES[side])
                    answer = client.complete(prompt, tokens_max=ANSWER_TOKENS, ignore_eos=True)
                    assert answer.cached_tokens == 0, "a new prompt was found in a cache"
                    if pair >= 0:
                        times_ms["ttft"][side].append(answer.ttft_ms)
                        times_ms["answer"][side].append(answer.total_ms)
            time.sleep(1)  # counters come with the steps
            stores = client.metrics().total("vllm:flexkv_layerwise_stores_total")
            failed = client.metrics().total("vllm:flexkv_failed_stores_total")
    if (stores, failed) != (_WARM_UP_PAIRS + pairs, 0):
        raise RuntimeError(
            f"{stores:g} stores were layerwise and {failed:g} failed, expected {_WARM_UP_PAIRS + pairs} and 0"
        )
    return times_ms
