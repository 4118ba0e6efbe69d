"""What a hit in host memory costs with FlexKV and with vLLM's own offloading: two real servers, asked the same prompts in turns.

Both run SmolLM2-135M-Instruct in bfloat16 on the same cores. Every prompt is computed once by each; then, ``ROUNDS`` times, each engine
forgets its own prefix cache and is asked again, which one first alternating. A hit that found less than the whole prompt (but its last
block) stops the benchmark. vLLM's connector refuses a CPU; ``flexkv_vllm.native_offload`` says what was put in the place of its copies.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from flexkv_core.cli.bench.overhead import compute_cpus, interval
from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.client import VllmClient
from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, KV_TRANSFER_CONFIG, VllmServer

PROMPTS = 6
ROUNDS = 6
PROMPT_TOKENS = 4000
_POOL_BYTES = 2 << 30
_BLOCK_TOKENS = 64
_SEED = 20_241
_TOKEN_IDS = range(100, 40_000)
_PAUSE_S = 0.3  # see overhead
_NATIVE_CONFIG = json.dumps(
    {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuDeviceOffloadingSpec",
            "spec_module_path": "flexkv_vllm.native_offload",
            "cpu_bytes_to_use": _POOL_BYTES,
        },
    }
)
_SIDES = ("flexkv", "native")


def run(quick: bool = False) -> dict[str, float]:
    """Starts both servers (about a minute each) and measures.

    Returns ``host_hit_ratio`` (FlexKV / vLLM's own, median of the turns) with the ends of its 95 % bootstrap interval, and medians in
    ms: recomputed, from the engine's own cache, from host memory, of each. Raises ServerError when a server does not start.
    """
    with ExitStack() as stack:
        clients = _start(stack)
        rng = random.Random(_SEED)
        prompts = [rng.choices(_TOKEN_IDS, k=PROMPT_TOKENS) for _ in range(2 if quick else PROMPTS)]
        times_ms = _measure(clients, prompts, 2 if quick else ROUNDS)
    ratios = [a / b for a, b in zip(times_ms["flexkv", "host"], times_ms["native", "host"], strict=True)]
    low, high = interval(ratios)
    figures = {
        "host_hit_ratio": statistics.median(ratios),
        "host_hit_ratio_low": low,
        "host_hit_ratio_high": high,
    }
    for (side, state), values in times_ms.items():
        figures[f"ttft_{state}_{side}_ms"] = statistics.median(values)
    return figures | {"turns": len(ratios), "prompt_tokens": PROMPT_TOKENS}


def _start(stack: ExitStack) -> dict[str, VllmClient]:
    model = ensure_demo_model()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flexkv-peers-")))
    environment = {
        **CPU_ENVIRONMENT,
        "VLLM_CPU_OMP_THREADS_BIND": compute_cpus(),
        "FLEXKV_HOST_BYTES": str(_POOL_BYTES),
    }
    clients = {}
    for side, config in zip(_SIDES, (KV_TRANSFER_CONFIG, _NATIVE_CONFIG), strict=True):
        arguments = [*CPU_ARGUMENTS, "--dtype", "bfloat16", "--kv-transfer-config", config]
        server = stack.enter_context(VllmServer(model, arguments, environment, folder / f"{side}.log"))
        clients[side] = stack.enter_context(VllmClient(server.base_url))
    return clients


def _measure(
    clients: dict[str, VllmClient], prompts: Sequence[list[int]], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Times to first token in ms by side and state, those of one state in the same order on both sides."""
    times_ms: dict[tuple[str, str], list[float]] = {
        (side, state): [] for state in ("recompute", "device", "host") for side in _SIDES
    }
    for number, prompt in enumerate(prompts):
        for side in _SIDES:
            times_ms[side, "recompute"].append(_ask(clients[side], prompt, found=False))
        for turn in range(-1, rounds):  # the first turn warms up
            order = _SIDES if (number + turn) % 2 else _SIDES[::-1]
            for state in ("device", "host"):
                for side in order:
                    if state == "host":
                        clients[side].reset_prefix_cache()
                    ttft_ms = _ask(clients[side], prompt, found=True)
                    if turn >= 0:
                        times_ms[side, state].append(ttft_ms)
    return times_ms


def _ask(client: VllmClient, prompt: list[int], found: bool) -> float:
    time.sleep(_PAUSE_S)
    answer = client.complete(prompt, tokens_max=1)
    wanted = (len(prompt) - 1) // _BLOCK_TOKENS * _BLOCK_TOKENS if found else 0
    if answer.cached_tokens != wanted:
        raise RuntimeError(f"{answer.cached_tokens} tokens were found in a cache, expected {wanted}")
    return answer.ttft_ms
