"""One server with FlexKV by one flag, page size 1, chunked prefill and an SSD tier, and the same server started again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from flexkv_core.cli.harness.client import Completion
from flexkv_core.cli.harness.sglang import (
    BACKEND_ARGUMENTS,
    CPU_ARGUMENTS,
    CPU_ENVIRONMENT,
    SglangClient,
    SglangServer,
)
from tests.e2e_sglang.checks import ask, differences, new_prompt

ARGUMENTS = (
    *CPU_ARGUMENTS,
    *BACKEND_ARGUMENTS,
    *(
        "--page-size",
        "1",
        "--max-total-tokens",
        "6000",
        "--chunked-prefill-size",
        "512",
        "--max-running-requests",
        "16",
    ),
)


@pytest.fixture(scope="module")
def server(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "ssd").mkdir()
    environment = {
        **CPU_ENVIRONMENT,
        "FLEXKV_HOST_BYTES": "16MiB",
        "FLEXKV_SSD_DIRS": f'["{folder}/ssd"]',
        "FLEXKV_SSD_BYTES": "512MiB",
        # Every so many steps one of several requests that run makes room, as if the device were full.
        "SGLANG_TEST_RETRACT": "1",
        "SGLANG_TEST_RETRACT_INTERVAL": "10",
    }
    with SglangServer(llama, ARGUMENTS, environment, folder / "server.log") as server:
        yield server


@pytest.fixture
def client(server: SglangServer) -> Iterator[SglangClient]:
    with SglangClient(server.base_url) as client:
        yield client


def test_hits_give_the_same_answer(client: SglangClient) -> None:
    prompt = new_prompt(1, 1601)  # three chunks, and hits of both kinds end at 1,600
    cold = ask(client, prompt)
    device = ask(client, prompt)
    client.reset_prefix_cache()
    host = ask(client, prompt)
    assert (cold.cached_tokens, device.external_tokens) == (0, 0)
    assert device.cached_tokens == host.cached_tokens == host.external_tokens == 1600
    assert not differences(cold, device)
    assert not differences(cold, host)
    # The prefill is the same computation on the same bytes. (Decoding with this attention repeats itself within the bound only.)
    assert host.logprobs[0] == device.logprobs[0]
    assert not differences(device, host)


def test_a_hit_behind_what_the_device_holds(client: SglangClient) -> None:
    """The device holds the first 100 tokens, which is no whole block; FlexKV brings the rest of 800."""
    prompt = new_prompt(2, 801)
    cold = ask(client, prompt)
    client.reset_prefix_cache()
    ask(client, new_prompt(2, 801)[:100] + new_prompt(3, 20), tokens=1)
    mixed = ask(client, prompt)
    assert mixed.cached_tokens == 800
    assert 700 <= mixed.external_tokens < 800
    assert not differences(cold, mixed)


def test_salts_do_not_share(client: SglangClient) -> None:
    prompt = new_prompt(4, 401)
    cold = ask(client, prompt, salt="one")
    client.reset_prefix_cache()
    other, plain, same = (ask(client, prompt, salt=salt) for salt in ("two", None, "one"))
    assert (other.cached_tokens, plain.cached_tokens, same.external_tokens) == (0, 0, 400)
    assert not differences(cold, other) | differences(cold, plain) | differences(cold, same)


def test_generated_tokens_are_found(client: SglangClient) -> None:
    prompt = new_prompt(5, 97)
    first = ask(client, prompt, tokens=64)
    longer = [*prompt, *first.token_ids, *new_prompt(6, 10)]
    client.reset_prefix_cache()
    found = ask(client, longer)
    client.reset_prefix_cache()
    assert found.external_tokens >= 144
    assert not differences(ask(client, longer, salt="fresh"), found)


def test_aborts_leave_nothing_behind(server: SglangServer, client: SglangClient) -> None:
    """Requests that hit are given up at any moment; afterwards the pool is as empty as it was, so that a full one still fits."""
    prompts = [new_prompt(10 + n, 1201) for n in range(3)]
    answers = [ask(client, prompt) for prompt in prompts]
    for round_number in range(6):
        client.reset_prefix_cache()
        threads = [
            threading.Thread(target=_give_up, args=(server.base_url, prompt, 0.02 * (round_number + 1)))
            for prompt in prompts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    client.reset_prefix_cache()
    assert client.complete(new_prompt(20, 5000), 4).finish_reason == "length"
    client.reset_prefix_cache()
    for prompt, cold in zip(prompts, answers, strict=True):
        assert not differences(cold, ask(client, prompt))


def test_64_at_once_and_more_than_the_host_tier_holds(server: SglangServer, client: SglangClient) -> None:
    """More than the device and the host tier hold together, asked all at once, twice: evictions, retractions, loads from the SSD."""
    prompts = [new_prompt(100 + n % 32, 241 + 16 * (n % 5)) for n in range(64)]

    def one(number: int) -> Completion:
        with SglangClient(server.base_url) as own:
            return ask(own, prompts[number], tokens=6)

    with ThreadPoolExecutor(64) as pool:
        first = list(pool.map(one, range(64)))
        client.reset_prefix_cache()
        second = list(pool.map(one, range(64)))
    assert sum(answer.external_tokens for answer in second) > 5_000
    assert client.metrics().total("sglang:num_retracted_requests_total") > 0
    for cold, warm in zip(first, second, strict=True):
        # Batches differ, and with them the last bits: the answers must not.
        assert cold.token_ids == warm.token_ids


def test_metrics_tell_what_was_loaded(client: SglangClient) -> None:
    metrics = client.metrics()
    assert metrics.total("sglang:flexkv_hit_tokens_total") > 5_000
    assert metrics.total("sglang:flexkv_failed_loads_total") == 0
    assert metrics.total("sglang:flexkv_host_blocks_used") > 0


def test_the_ssd_survives_a_restart(server: SglangServer, client: SglangClient) -> None:
    """Last in this file: it starts the server again."""
    prompt = new_prompt(1, 1601)
    before = ask(client, prompt)
    server.stop()
    server.start()
    with SglangClient(server.base_url) as again:
        after = ask(again, prompt)
        assert after.external_tokens == 1600
        assert not differences(before, after)


def _give_up(base_url: str, prompt: list[int], after_s: float) -> None:
    """Ask, and close the connection after so many seconds."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 256, "ignore_eos": True},
        "stream": True,
    }
    try:
        with (
            httpx.Client(base_url=base_url, timeout=after_s) as http,
            http.stream("POST", "/generate", json=body) as reply,
        ):
            for _ in reply.iter_lines():
                pass
    except httpx.TimeoutException:
        pass
