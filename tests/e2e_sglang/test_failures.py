"""A server whose loads are disturbed: whatever goes wrong, the answer is the recomputed one. Page size 16, the linker's own flags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flexkv_core.cli.harness.sglang import CPU_ARGUMENTS, CPU_ENVIRONMENT, SglangClient, SglangServer
from tests.e2e_sglang.checks import ask, differences, new_prompt
from tests.e2e_sglang.instrumented import instrumented


@dataclass
class Disturbed:
    client: SglangClient
    folder: Path

    def order(self, mode: str) -> None:
        (self.folder / "mode").write_text(mode)

    def log(self, kind: str, rid: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind and line["rid"] == rid]


@pytest.fixture(scope="module")
def running(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturbed]:
    folder = tmp_path_factory.mktemp("disturbed")
    arguments = [
        *CPU_ARGUMENTS,
        *("--page-size", "16", "--max-total-tokens", "8192"),
        *instrumented(folder, host_bytes="32MiB"),
    ]
    server = SglangServer(llama, arguments, CPU_ENVIRONMENT, folder / "server.log")
    with server, SglangClient(server.base_url) as client:
        yield Disturbed(client, folder)


@pytest.fixture
def disturbed(running: Disturbed) -> Iterator[Disturbed]:
    running.client.reset_prefix_cache()
    yield running
    running.order("")


def test_loads_bring_the_bytes_that_were_computed(disturbed: Disturbed) -> None:
    prompt = new_prompt(1, 801)
    cold = ask(disturbed.client, prompt, rid="cold")
    disturbed.client.reset_prefix_cache()
    host = ask(disturbed.client, prompt, rid="host")
    assert host.external_tokens == 800
    assert not differences(cold, host)
    (load,) = disturbed.log("load", "host")
    assert len(load["pages"]) == 50
    assert load["pages"] == disturbed.log("store", "cold")[-1]["pages"][:50]


def test_zeros_would_be_noticed(disturbed: Disturbed) -> None:
    """The comparison that the other tests make fails when a load brings zeros."""
    prompt = new_prompt(2, 801)
    cold = ask(disturbed.client, prompt, rid="computed")
    disturbed.client.reset_prefix_cache()
    disturbed.order("zeros")
    wrong = ask(disturbed.client, prompt, rid="zeros")
    assert wrong.external_tokens == 800
    assert differences(cold, wrong)
    assert disturbed.log("load", "zeros")[0]["pages"] != disturbed.log("store", "computed")[-1]["pages"][:50]


@pytest.mark.parametrize("mode", ["fail", "corrupt"])
def test_a_load_that_fails_is_recomputed(disturbed: Disturbed, mode: str) -> None:
    prompt = new_prompt(3 if mode == "fail" else 4, 801)
    cold = ask(disturbed.client, prompt)
    disturbed.client.reset_prefix_cache()
    disturbed.order(mode)
    again = ask(disturbed.client, prompt, rid=mode)
    assert not disturbed.log("load", mode)[0]["ok"]
    assert again.external_tokens == 0
    assert not differences(cold, again)
    # What it computed is stored anew where the copy was damaged, and found.
    disturbed.order("")
    disturbed.client.reset_prefix_cache()
    healed = ask(disturbed.client, prompt)
    assert healed.external_tokens == 800
    assert not differences(cold, healed)
