"""Two ranks, each with its part of the heads: both load, or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexkv_core.cli.harness.sglang import (
    BACKEND_ARGUMENTS,
    CPU_ARGUMENTS,
    CPU_ENVIRONMENT,
    SglangClient,
    SglangServer,
)
from tests.e2e_sglang.checks import ask, differences, new_prompt


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
def test_two_ranks(llama: Path, tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    environment = {
        **CPU_ENVIRONMENT,
        "SGLANG_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[1]}",
        "FLEXKV_HOST_BYTES": "16MiB",
        "FLEXKV_TRANSFER_TIMEOUT_S": "10",
    }
    arguments = [
        *CPU_ARGUMENTS,
        *BACKEND_ARGUMENTS,
        *("--tp-size", "2", "--page-size", "16", "--max-total-tokens", "4096"),
    ]
    server = SglangServer(llama, arguments, environment, tmp_path / "server.log")
    with server, SglangClient(server.base_url) as client:
        prompts = [new_prompt(n, 1201) for n in range(8)]  # 9,600 tokens: more than both tiers hold
        cold = [ask(client, prompt) for prompt in prompts]
        client.reset_prefix_cache()
        warm = [ask(client, prompt) for prompt in reversed(prompts)][::-1]
        assert warm[-1].external_tokens == 1200
        for one, other in zip(cold, warm, strict=True):
            assert not differences(one, other)
