"""Whatever vLLM is installed: loads that fail, that are aborted, and requests that are preempted never change an answer.

What older versions do there was wrong, or is done by our patches; see the headers of ``aborted-loads``, ``load-failures`` and
``resumed-loads`` under ``patches/vllm``. One real server, whose device holds few blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import httpx
import pytest

from flexkv_core.cli.harness.client import Completion, VllmClient
from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, VllmServer
from flexkv_core.cli.patch.series import version_key
from tests.matrix.patched import patched
from tests.matrix.test_vllm import BLOCK_TOKENS, RECOMPUTE_BOUND, _error, reset
from tests.matrix.turns import MIDDLE_IS_MISSING, NOTHING_COMES, SLOW, SLOW_S

DEVICE_BLOCKS = 40
TOKENS = 12
OTHERS_TOKENS = 60
LONG = 14 * BLOCK_TOKENS + 1


def prompt(seed: int, length: int) -> list[int]:
    return [100 + (seed * 7919 + i * 37) % 20_000 for i in range(length)]


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    transfer = {
        "kv_connector": "TroubledConnector",
        "kv_connector_module_path": "tests.matrix.troubled_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"host_bytes": "256MiB"},
    }
    arguments = [
        *(*CPU_ARGUMENTS, "--kv-transfer-config", json.dumps(transfer), "--max-model-len", "2048"),
        *("--num-gpu-blocks-override", str(DEVICE_BLOCKS)),
    ]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with patched("vllm"), VllmServer(model, arguments, CPU_ENVIRONMENT, log) as running:
        yield running


@pytest.fixture
def client(server: VllmServer) -> Iterator[VllmClient]:
    """Everything is empty."""
    with VllmClient(server.base_url) as connected:
        reset(connected, external=True)
        yield connected


def ask_all(
    server: VllmServer, prompts: list[list[int]], tokens: int, salt: str | None = None
) -> list[Completion]:
    """Together, by a connection each."""

    def ask(wanted: list[int]) -> Completion:
        with VllmClient(server.base_url) as connected:
            return connected.complete(wanted, tokens, logprobs=True, ignore_eos=True, cache_salt=salt)

    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(ask, prompts))


def assert_same(one: Completion, other: Completion) -> None:
    assert one.token_ids == other.token_ids
    assert _error(one, other) <= RECOMPUTE_BOUND


def test_trouble_with_loads(server: VllmServer, client: VllmClient) -> None:
    """One load a turn, in the order that the connector has."""
    failing = (NOTHING_COMES, MIDDLE_IS_MISSING)
    prompts = [prompt(1 + turn, LONG) for turn in (*failing, SLOW)]
    others = [prompt(10 + i, 11 * BLOCK_TOKENS) for i in range(3)]
    wanted = [client.complete(each, TOKENS, logprobs=True) for each in prompts]
    expected = ask_all(server, others, OTHERS_TOKENS)
    for turn in failing:
        reset(client)
        found, device = (client.complete(prompts[turn], TOKENS, logprobs=True) for _ in range(2))
        print(f"cached tokens: {found.cached_tokens} of {LONG}, then {device.cached_tokens}")
        assert_same(found, wanted[turn])
        # Recent versions count what was promised where a part of it came.
        assert found.cached_tokens < LONG - 1 or turn == MIDDLE_IS_MISSING
        assert device.cached_tokens == LONG - 1, (
            "what came, and what was computed instead, is in the engine's cache"
        )
        assert_same(device, wanted[turn])
    reset(client)
    with pytest.raises(httpx.ReadTimeout), VllmClient(server.base_url, timeout_s=SLOW_S / 3) as impatient:
        impatient.complete(prompts[SLOW], TOKENS)
    # They compute in whatever is free while the load that nobody waits for goes on.
    for answer, one in zip(ask_all(server, others, OTHERS_TOKENS, "theirs"), expected, strict=True):
        assert answer.cached_tokens == 0
        assert_same(answer, one)
    reset(client)
    last = client.complete(prompts[SLOW], TOKENS, logprobs=True)
    assert last.cached_tokens == LONG - 1, "nothing of the device is held by the request that went away"
    assert_same(last, wanted[SLOW])


@pytest.mark.skipif(
    version_key(metadata.version("vllm")) < version_key("0.11.1"),
    reason="vLLM's own attention on CPUs computes one token of a resumed request whose prompt is computed, however many it has",
)
def test_preempted_requests_give_the_same_answers(server: VllmServer, client: VllmClient) -> None:
    """Eight requests of 8 to 10 blocks that each grow by two do not fit; whoever is preempted comes back by a load."""
    prompts = [prompt(30 + i, 480 + 20 * i) for i in range(8)]
    wanted = [client.complete(each, 140, logprobs=True, ignore_eos=True) for each in prompts]
    before = client.metrics().total("vllm:num_preemptions_total")
    for _ in range(2):
        reset(client)
        for answer, one in zip(ask_all(server, prompts, 140), wanted, strict=True):
            assert_same(answer, one)
    assert client.metrics().total("vllm:num_preemptions_total") > before, "the test needs preemptions"
