"""What a hit in host memory costs with FlexKV and with vLLM's own offloading: real servers in turns, the same prompts.

Both serve SmolLM2-135M-Instruct in float32 (a processor without instructions for bfloat16 takes minutes for a prompt) on the same cores,
one at a time: side by side on two cores they disturbed each other, and not alike (a hit of vLLM's own took 0.3 s alone and 1.0 s beside
FlexKV's server, for a reason that was not found). A turn is a server of each; it computes every prompt once and is then asked again and
again, each time from its own prefix cache and, after that was dropped, from host memory. A hit that found less than the whole prompt (but
its last block) stops the benchmark. vLLM's connector refuses a CPU; ``flexkv_vllm.native_offload`` says what was put in the place of its
copies.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median

from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.client import VllmClient
from flexkv_core.cli.harness.cpus import compute_cpus
from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, KV_TRANSFER_CONFIG, VllmServer

TURNS = 4
PROMPTS = 1
ROUNDS = 12
PROMPT_TOKENS = 4000
_POOL_BYTES = 2 << 30
_BLOCK_TOKENS = 64
_SEED = 20_241
_TOKEN_IDS = range(100, 40_000)
_PAUSE_S = 0.3
"""Before each question, so that what the one before left to do is done."""
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
_SIDES = {"flexkv": KV_TRANSFER_CONFIG, "native": _NATIVE_CONFIG}
_Times = dict[tuple[str, str], list[float]]


def run(quick: bool = False) -> dict[str, float]:
    """Starts each server ``TURNS`` times, which one first alternating, and measures.

    Returns ``host_hit_ratio`` (FlexKV / vLLM's own: the medians of the turns compared, and of these the median), and medians in ms over
    all turns: recomputed, from the engine's own cache, from host memory, of each. Raises ServerError when a server does not start.
    """
    turns = [_turn(number, quick) for number in range(1 if quick else TURNS)]
    ratios = [median(turn["flexkv", "host"]) / median(turn["native", "host"]) for turn in turns]
    figures = {
        "host_hit_ratio": median(ratios),
        "host_hit_ratio_lowest": min(ratios),
        "host_hit_ratio_highest": max(ratios),
    }
    for side, state in turns[0]:
        figures[f"ttft_{state}_{side}_ms"] = median(value for turn in turns for value in turn[side, state])
    return figures | {"turns": len(turns), "prompt_tokens": PROMPT_TOKENS}


def _turn(number: int, quick: bool) -> _Times:
    """Times to first token in ms by side and state."""
    times_ms: _Times = {}
    for side in _SIDES if number % 2 else reversed(_SIDES):
        times_ms |= _measure(side, 2 if quick else ROUNDS)
    return times_ms


def _measure(side: str, rounds: int) -> _Times:
    rng = random.Random(_SEED)
    environment = {
        **CPU_ENVIRONMENT,
        "VLLM_CPU_OMP_THREADS_BIND": compute_cpus(),
        "FLEXKV_HOST_BYTES": str(_POOL_BYTES),
    }
    arguments = [*CPU_ARGUMENTS, "--kv-transfer-config", _SIDES[side]]
    times_ms: _Times = {(side, state): [] for state in ("recompute", "device", "host")}
    with tempfile.TemporaryDirectory(prefix="flexkv-peers-") as folder:
        server = VllmServer(ensure_demo_model(), arguments, environment, Path(folder) / "server.log")
        with server, VllmClient(server.base_url) as client:
            for _ in range(PROMPTS):
                prompt = rng.choices(_TOKEN_IDS, k=PROMPT_TOKENS)
                times_ms[side, "recompute"].append(_ask(client, prompt, found=False))
                for _ in range(1 + rounds):
                    times_ms[side, "device"].append(_ask(client, prompt, found=True))
                    client.reset_prefix_cache()
                    times_ms[side, "host"].append(_ask(client, prompt, found=True))
                for state in ("device", "host"):
                    del times_ms[side, state][-1 - rounds]  # the first warms up
    return times_ms


def _ask(client: VllmClient, prompt: list[int], found: bool) -> float:
    time.sleep(_PAUSE_S)
    answer = client.complete(prompt, tokens_max=1)
    wanted = (len(prompt) - 1) // _BLOCK_TOKENS * _BLOCK_TOKENS if found else 0
    if answer.cached_tokens != wanted:
        raise RuntimeError(f"{answer.cached_tokens} tokens were found in a cache, expected {wanted}")
    return answer.ttft_ms
