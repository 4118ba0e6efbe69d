"""Two engines behind one server: each has tiers of its own, and files of its own in one directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexkv_core.cli.harness.client import Completion
from flexkv_core.cli.harness.sglang import (
    BACKEND_ARGUMENTS,
    CPU_ARGUMENTS,
    CPU_ENVIRONMENT,
    SglangClient,
    SglangServer,
)
from tests.e2e_sglang.checks import a_core_each, differences, new_prompt


@pytest.mark.extended
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two engines need two cores")
def test_two_engines_have_tiers_of_their_own(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "ssd").mkdir()
    environment = {
        **CPU_ENVIRONMENT,
        **a_core_each(),
        "FLEXKV_HOST_BYTES": "16MiB",
        "FLEXKV_SSD_DIRS": f'["{tmp_path}/ssd"]',
        "FLEXKV_SSD_BYTES": "64MiB",
    }
    arguments = [
        *CPU_ARGUMENTS,
        *BACKEND_ARGUMENTS,
        *("--dp-size", "2", "--page-size", "16", "--max-total-tokens", "4096"),
    ]
    server = SglangServer(llama, arguments, environment, tmp_path / "server.log")
    with server, SglangClient(server.base_url) as client:
        prompt = new_prompt(1, 1201)

        def ask(rank: int) -> Completion:
            return client.complete(prompt, 8, logprobs=True, ignore_eos=True, dp_rank=rank)

        cold = ask(0)
        client.reset_prefix_cache()
        other, host = ask(1), ask(0)
        assert (cold.cached_tokens, other.cached_tokens, host.external_tokens) == (0, 0, 1200)
        assert not differences(cold, other) | differences(cold, host)
        assert len(list((tmp_path / "ssd").glob("flexkv-*"))) == 2
