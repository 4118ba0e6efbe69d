"""What FlexKV costs a request that misses: two real servers of one engine, with and without it, asked the same new prompts in turns.

Both run SmolLM2-135M-Instruct on the CPU, in bfloat16 where it has AVX-512. One idles while the other answers; which one goes first alternates from pair to
pair, so that drift of a shared machine falls on both. The prompts are random and share nothing, so the engine with FlexKV hashes
them, looks them up, finds nothing, and stores them. Two servers of the very same command differ by some percent for as long as they live,
so both are started several times, in alternating order.

With vLLM both compute on the same cores: left alone, it reserves one core without a connector and two with one, and on a machine with two
cores then none, so that the engine with a connector computes on twice as many (0.81 was measured so, FlexKV faster than nothing).
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.cpus import compute_cpus
from flexkv_core.cli.harness.server import (
    CPU_ARGUMENTS,
    CPU_ENVIRONMENT,
    KV_TRANSFER_CONFIG,
    TURN_PAUSE_S,
    EngineServer,
    VllmServer,
)

STARTS, QUICK_STARTS = 3, 1
PAIRS, QUICK_PAIRS = 16, 4  # of each start
PROMPT_TOKENS = 1100
_WARM_UP_PAIRS = 3
_SEED = 20_240
_TOKEN_IDS = range(100, 40_000)  # ordinary text of the demo's tokenizer, no control tokens
_RESAMPLES = 2000


def run(quick: bool = False) -> dict[str, float]:
    """Starts both servers ``STARTS`` times (about a minute each) and measures ``PAIRS`` pairs after a warm-up each time.

    Returns ``ttft_miss_ratio`` (median of the pairs' ratios with / without, which one slow request cannot move), the ends of its 95 %
    bootstrap interval, the lowest and the highest median of one start, the ratio of the medians, both medians in ms, and what was asked.
    Raises ServerError when a server does not start.
    """
    model = ensure_demo_model()
    arguments = [*CPU_ARGUMENTS, "--dtype", compute_dtype()]  # the last --dtype counts
    environment = {**CPU_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": compute_cpus()}

    def server(with_flexkv: bool, log_path: Path) -> VllmServer:
        more = ["--kv-transfer-config", KV_TRANSFER_CONFIG] if with_flexkv else []
        return VllmServer(model, [*arguments, *more], environment, log_path)

    return miss_figures(server, quick)


def miss_figures(server: Callable[[bool, Path], EngineServer], quick: bool) -> dict[str, float]:
    """The figures of :func:`run`. ``server`` takes whether FlexKV is on and the log's path. Raises ServerError when one does not start."""
    rng = random.Random(_SEED)
    pairs = QUICK_PAIRS if quick else PAIRS
    times_ms: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory(prefix="flexkv-overhead-") as folder:
        for start in range(QUICK_STARTS if quick else STARTS):
            logs = Path(folder)
            _ask_in_turns(
                server(True, logs / f"with-{start}.log"),
                server(False, logs / f"without-{start}.log"),
                pairs,
                rng,
                times_ms,
                with_first=start % 2 == 0,
            )
    return _figures(*times_ms, pairs)


def _ask_in_turns(
    with_server: EngineServer,
    without_server: EngineServer,
    pairs: int,
    rng: random.Random,
    times_ms: tuple[list[float], list[float]],
    with_first: bool,
) -> None:
    """Starts both servers, appends the times of ``pairs`` new prompts on each to ``times_ms`` (with, without), and stops them."""
    servers = (with_server, without_server)
    with ExitStack() as stack:
        for server in servers if with_first else reversed(servers):
            stack.enter_context(server)
        clients = [stack.enter_context(server.client()) for server in servers]
        for pair in range(-_WARM_UP_PAIRS, pairs):
            prompt = rng.choices(_TOKEN_IDS, k=PROMPT_TOKENS)
            for side in (0, 1) if pair % 2 else (1, 0):
                time.sleep(TURN_PAUSE_S)
                answer = clients[side].complete(prompt, tokens_max=1)
                assert answer.cached_tokens == 0, "a new prompt was found in a cache"
                if pair >= 0:
                    times_ms[side].append(answer.ttft_ms)


def _figures(with_ms: list[float], without_ms: list[float], pairs: int) -> dict[str, float]:
    ratios = [one / other for one, other in zip(with_ms, without_ms, strict=True)]
    of_starts = [statistics.median(ratios[at : at + pairs]) for at in range(0, len(ratios), pairs)]
    return {
        **ratio_figures("ttft_miss_ratio", with_ms, without_ms),
        "ttft_miss_ratio_of_starts_min": min(of_starts),
        "ttft_miss_ratio_of_starts_max": max(of_starts),
        "ttft_miss_ratio_of_medians": statistics.median(with_ms) / statistics.median(without_ms),
        "ttft_with_ms": statistics.median(with_ms),
        "ttft_without_ms": statistics.median(without_ms),
        "starts": len(of_starts),
        "pairs": len(with_ms),
        "prompt_tokens": PROMPT_TOKENS,
    }


def compute_dtype() -> str:
    """bfloat16 where the processor has AVX-512; without it vLLM takes minutes for a prompt of 4,000 tokens in bfloat16, and half a minute
    in float32."""
    with open("/proc/cpuinfo") as lines:
        flags = next((line for line in lines if line.startswith("flags")), "")
    return "bfloat16" if " avx512f " in flags else "float32"


def ratio_figures(name: str, ones: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """``name``: median of the pairs' ratios ones / others; ``name``_low and _high: the ends of its 95 % bootstrap interval."""
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    low, high = _interval(ratios)
    return {name: statistics.median(ratios), f"{name}_low": low, f"{name}_high": high}


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median."""
    rng = random.Random(_SEED)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES)]
