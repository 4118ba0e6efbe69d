"""The comparison that every test of a hit makes, and the prompts that are asked."""

from __future__ import annotations

import os
import random

from flexkv_core.cli.harness.client import Completion
from flexkv_core.cli.harness.sglang import SglangClient

LOGPROB_BOUND = 2.1e-5
"""Between a recomputation and a hit in float32: what the same models are allowed under vLLM."""

_TOKEN_IDS = range(100, 40_000)


def new_prompt(seed: int, tokens: int) -> list[int]:
    """Random tokens that share nothing with those of another seed."""
    return random.Random(seed).choices(_TOKEN_IDS, k=tokens)


def ask(
    client: SglangClient, prompt: list[int], salt: str | None = None, tokens: int = 8, rid: str | None = None
) -> Completion:
    """Greedy, with log-probabilities, to a fixed length."""
    return client.complete(prompt, tokens, logprobs=True, cache_salt=salt, ignore_eos=True, request_id=rid)


def differences(cold: Completion, other: Completion) -> set[str]:
    """What differs between a recomputation and another answer to the same prompt; empty when they are the same answer."""
    assert len(cold.token_ids) == len(cold.logprobs) > 0
    found = set()
    if other.token_ids != cold.token_ids:
        found.add("tokens")
        return found
    error = max(abs(a - b) for a, b in zip(cold.logprobs, other.logprobs, strict=True))
    if error > LOGPROB_BOUND:
        found.add(f"log-probabilities by {error:.2g}")
    return found


def a_core_each() -> dict[str, str]:
    """The variable by which SGLang gives each of two processes on CPUs a core of its own; without it, it wants as many NUMA nodes."""
    cpus = sorted(os.sched_getaffinity(0))
    return {"SGLANG_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[1]}"}
