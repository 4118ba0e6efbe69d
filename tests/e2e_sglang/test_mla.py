"""A model with multi-head latent attention on a real server: its KV lies in one tensor a layer, of which all heads are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexkv_core.cli.harness.sglang import CPU_ARGUMENTS, CPU_ENVIRONMENT, SglangClient, SglangServer
from tests.e2e_sglang.checks import ask, differences, new_prompt
from tests.e2e_sglang.instrumented import instrumented

pytestmark = pytest.mark.extended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mla")


@pytest.fixture(scope="module")
def client(tiny_model: Callable[[str], Path], folder: Path) -> Iterator[SglangClient]:
    arguments = [
        *CPU_ARGUMENTS,
        *("--page-size", "16", "--max-total-tokens", "4096", "--chunked-prefill-size", "512"),
        *instrumented(folder, host_bytes="32MiB"),
    ]
    server = SglangServer(tiny_model("mla"), arguments, CPU_ENVIRONMENT, folder / "server.log")
    with server, server.client() as client:
        yield client


def test_hits_give_the_same_answer(client: SglangClient) -> None:
    prompt = new_prompt(1, 1201)
    cold, device = ask(client, prompt), ask(client, prompt)
    client.reset_prefix_cache()
    host = ask(client, prompt)
    assert (cold.cached_tokens, device.cached_tokens, device.external_tokens) == (0, 1200, 0)
    assert (host.cached_tokens, host.external_tokens) == (1200, 1200)
    assert differences(cold, device) == differences(cold, host) == set()


def test_zeros_would_be_noticed(client: SglangClient, folder: Path) -> None:
    prompt = new_prompt(3, 801)
    cold = ask(client, prompt)
    client.reset_prefix_cache()
    (folder / "mode").write_text("zeros")
    wrong = ask(client, prompt)
    (folder / "mode").write_text("")
    assert wrong.external_tokens == 800
    assert differences(cold, wrong)


def test_salts_share_nothing(client: SglangClient) -> None:
    prompt = new_prompt(2, 600)
    ask(client, prompt, salt="mine")
    client.reset_prefix_cache()
    assert ask(client, prompt, salt="theirs").cached_tokens == 0
    assert ask(client, prompt, salt="mine").external_tokens > 0
