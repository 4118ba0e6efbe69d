"""``--enable-flexkv`` on a real server: the same hits and the same answers as the native adapter on the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flexkv_core.cli.harness.client import Completion
from flexkv_core.cli.harness.sglang import BACKEND_ARGUMENTS, CPU_ARGUMENTS, CPU_ENVIRONMENT, SglangServer
from tests.e2e_sglang.checks import ask, differences, new_prompt

SETTINGS = "host_bytes: 48MiB\n"
LENGTHS = (16, 17, 97, 700, 1601)
TOGETHER = 6


def server_with(model: Path, folder: Path, choice: Sequence[str]) -> SglangServer:
    folder.mkdir()
    settings = folder / "flexkv.yaml"
    settings.write_text(SETTINGS)
    arguments = [
        *(*CPU_ARGUMENTS, *choice),
        *("--page-size", "1", "--max-total-tokens", "6000", "--chunked-prefill-size", "512"),
    ]
    environment = {**CPU_ENVIRONMENT, "FLEXKV_CONFIG_PATH": str(settings)}
    return SglangServer(model, arguments, environment, folder / "server.log")


def same_requests(server: SglangServer) -> list[Completion]:
    """What the two ways are compared by: each length three times (computed, device hit, FlexKV hit), a shared prefix, another tenant, the
    next turn of a conversation, several at once."""
    with server.client() as client:
        answers = []
        for length in LENGTHS:
            prompt = new_prompt(length, length)
            answers += [ask(client, prompt, salt="one"), ask(client, prompt, salt="one")]
            client.reset_prefix_cache()
            answers.append(ask(client, prompt, salt="one"))
        answers += [ask(client, prompt, salt=salt) for salt in ("two", None)]
        shared = new_prompt(20, 601)
        first = ask(client, [*shared, *new_prompt(21, 200)], tokens=70)
        client.reset_prefix_cache()
        answers += [first, ask(client, [*shared, *new_prompt(22, 300)])]
        answers.append(ask(client, [*shared, *new_prompt(21, 200), *first.token_ids, *new_prompt(23, 9)]))
        client.reset_prefix_cache()
    with ThreadPoolExecutor(TOGETHER) as threads:
        return answers + list(threads.map(lambda number: ask_alone(server, shared, number), range(TOGETHER)))


def ask_alone(server: SglangServer, shared: list[int], number: int) -> Completion:
    """By a connection of the thread's own."""
    with server.client() as client:
        return ask(client, [*shared, *new_prompt(30 + number, 100)])


@pytest.mark.extended
def test_same_hits_and_answers_as_the_native_adapter(llama: Path, tmp_path: Path) -> None:
    with server_with(llama, tmp_path / "native", BACKEND_ARGUMENTS) as server:
        wanted = same_requests(server)
    in_tree = ("--enable-flexkv", "--flexkv-config-file", str(tmp_path / "in-tree" / "flexkv.yaml"))
    with server_with(llama, tmp_path / "in-tree", in_tree) as server:
        answers = same_requests(server)
    found = [(answer.cached_tokens, answer.external_tokens) for answer in answers]
    assert found[: 3 * len(LENGTHS)] == [
        hit
        for length in LENGTHS
        for whole in [(length - 1) // 16 * 16]
        for hit in ((0, 0), (length - 1, 0), (whole, whole))
    ]
    # Which of those that run together finds what another has loaded is the scheduler's choice.
    assert found[:-TOGETHER] == [(one.cached_tokens, one.external_tokens) for one in wanted[:-TOGETHER]]
    for one, other in zip(wanted, answers, strict=True):
        assert not differences(one, other)
