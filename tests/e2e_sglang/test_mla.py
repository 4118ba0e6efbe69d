"""A model with multi-head latent attention on a real server: its KV lies in one tensor a layer, of which all heads are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

pytestmark = pytest.mark.extended
ARGUMENTS = (
    *CPU_ARGUMENTS,
    *BACKEND_ARGUMENTS,
    *("--page-size", "16", "--max-total-tokens", "4096", "--chunked-prefill-size", "512"),
)


@pytest.fixture(scope="module")
def client(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SglangClient]:
    environment = {**CPU_ENVIRONMENT, "FLEXKV_HOST_BYTES": "32MiB"}
    log = tmp_path_factory.mktemp("mla") / "server.log"
    with SglangServer(tiny_model("mla"), ARGUMENTS, environment, log) as server, server.client() as client:
        yield client


def test_hits_give_the_same_answer(client: SglangClient) -> None:
    prompt = new_prompt(1, 1201)
    cold, device = ask(client, prompt), ask(client, prompt)
    client.reset_prefix_cache()
    host = ask(client, prompt)
    assert (cold.cached_tokens, device.cached_tokens, device.external_tokens) == (0, 1200, 0)
    assert (host.cached_tokens, host.external_tokens) == (1200, 1200)
    assert differences(cold, device) == differences(cold, host) == set()


def test_salts_share_nothing(client: SglangClient) -> None:
    prompt = new_prompt(2, 600)
    ask(client, prompt, salt="mine")
    client.reset_prefix_cache()
    assert ask(client, prompt, salt="theirs").cached_tokens == 0
    assert ask(client, prompt, salt="mine").external_tokens > 0
