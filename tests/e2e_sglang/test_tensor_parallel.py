"""Two ranks, each with its part of the heads: both load, or none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from flexkv_core.cli.harness.cache_server import CacheServer
from flexkv_core.cli.harness.sglang import (
    BACKEND_ARGUMENTS,
    CPU_ARGUMENTS,
    CPU_ENVIRONMENT,
    SglangClient,
    SglangServer,
)
from tests.e2e_sglang.checks import a_core_each, ask, differences, new_prompt

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")


def test_two_ranks(llama: Path, tmp_path: Path) -> None:
    settings = {"FLEXKV_HOST_BYTES": "16MiB", "FLEXKV_TRANSFER_TIMEOUT_S": "10"}
    server = two_ranks(llama, tmp_path, settings)
    with server, SglangClient(server.base_url) as client:
        prompts = [new_prompt(n, 1201) for n in range(8)]  # 9,600 tokens: more than both tiers hold
        cold = [ask(client, prompt) for prompt in prompts]
        client.reset_prefix_cache()
        warm = [ask(client, prompt) for prompt in reversed(prompts)][::-1]
        assert warm[-1].external_tokens == 1200
        for one, other in zip(cold, warm, strict=True):
            assert not differences(one, other)


@pytest.mark.extended
@pytest.mark.parametrize(("models", "hit_tokens"), [(2, 1200), (1, 0)])
def test_two_ranks_beside_flexkv_serve(llama: Path, tmp_path: Path, models: int, hit_tokens: int) -> None:
    """Each rank's part is a model to the server. Where it has room for one only, both ranks compute."""
    cache = CacheServer(tmp_path, "32MiB", models=models)
    server = two_ranks(
        llama, tmp_path, {"FLEXKV_SERVER": str(cache.socket), "FLEXKV_SERVER_DEADLINE_MS": "1000"}
    )
    with cache, server, SglangClient(server.base_url) as client:
        prompts = [new_prompt(n, 1201) for n in range(2)]
        cold = [ask(client, prompt) for prompt in prompts]
        client.reset_prefix_cache()
        warm = [ask(client, prompt) for prompt in prompts]
        assert [answer.external_tokens for answer in warm] == [hit_tokens] * 2
        for one, other in zip(cold, warm, strict=True):
            assert not differences(one, other)


def two_ranks(model: Path, folder: Path, settings: Mapping[str, str]) -> SglangServer:
    """A server with a rank on each of two cores; ``settings`` are FlexKV's, as variables."""
    environment = {**CPU_ENVIRONMENT, **settings, **a_core_each()}
    arguments = [
        *CPU_ARGUMENTS,
        *BACKEND_ARGUMENTS,
        *("--tp-size", "2", "--page-size", "16", "--max-total-tokens", "4096"),
    ]
    return SglangServer(model, arguments, environment, folder / "server.log")
