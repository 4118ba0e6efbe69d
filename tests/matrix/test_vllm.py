"""The real server of whatever vLLM is installed serves with FlexKV: hits, and identical answers, under both of the connector's names.

A version that needs patches gets them first, by the command a user types, and loses them afterwards; every file must then be what it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_core.cli.harness.client import Completion, VllmClient
from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, VllmServer
from flexkv_core.cli.patch.target import Target
from tests.matrix.patched import patched

CONNECTORS = ("FlexKVConnector", "FlexKVConnectorV1")
BLOCK_TOKENS = 64
PROMPT = [100 + i * 37 % 20_000 for i in range(1500)]
HIT_TOKENS = len(PROMPT) // BLOCK_TOKENS * BLOCK_TOKENS
RECOMPUTE_BOUND = 2.1e-5
EXTERNAL_HITS = "vllm:external_prefix_cache_hits_total"


@pytest.fixture(scope="module")
def engine() -> Iterator[Target]:
    """The installed engine, patched where its version needs it."""
    with patched("vllm") as target:
        yield target


@pytest.fixture(scope="module", params=CONNECTORS)
def client(
    engine: Target, model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[VllmClient]:
    transfer = {
        "kv_connector": request.param,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"host_bytes": "128MiB"},
    }
    arguments = [*CPU_ARGUMENTS, "--kv-transfer-config", json.dumps(transfer), "--max-model-len", "4096"]
    environment = {**CPU_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with VllmServer(model, arguments, environment, log) as server, VllmClient(server.base_url) as connected:
        yield connected


def reset(client: VllmClient, external: bool = False) -> None:
    """Empties the engine's prefix cache. Older versions do not say whether blocks are still held, so the stores are waited for first."""
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        time.sleep(1.0)
        reply = client._http.post("/reset_prefix_cache", params={"reset_external": external})
        reply.raise_for_status()
        if not reply.content or reply.json()["success"]:
            return
    raise TimeoutError("the engine did not reset its prefix cache")


def test_hit_and_identical_answer(client: VllmClient) -> None:
    reset(client, external=True)
    cold = client.complete(PROMPT, 12, logprobs=True)
    device = client.complete(PROMPT, 12, logprobs=True)
    reset(client)
    before = client.metrics().total(EXTERNAL_HITS)
    host = client.complete(PROMPT, 12, logprobs=True)
    print(f"cached tokens: {cold.cached_tokens}, {device.cached_tokens}, {host.cached_tokens}")
    assert (cold.cached_tokens, device.cached_tokens, host.cached_tokens) == (0, HIT_TOKENS, HIT_TOKENS)
    shows_connectors = bool(client.metrics().names(EXTERNAL_HITS))  # since 0.11.1
    if shows_connectors:
        assert client.metrics().total(EXTERNAL_HITS) - before == HIT_TOKENS, (
            "from FlexKV, not from the device"
        )
    assert (host.token_ids, host.logprobs) == (device.token_ids, device.logprobs)
    assert host.token_ids == cold.token_ids
    assert _error(host, cold) <= RECOMPUTE_BOUND
    if shows_connectors:
        assert client.metrics().total("vllm:flexkv_loaded_blocks_total") > 0


def test_reset_reaches_flexkv_and_salts_share_nothing(client: VllmClient) -> None:
    client.complete(PROMPT, 1)
    reset(client)
    assert client.complete(PROMPT, 1, cache_salt="theirs").cached_tokens == 0
    reset(client)
    assert client.complete(PROMPT, 1).cached_tokens == HIT_TOKENS
    reset(client, external=True)
    assert client.complete(PROMPT, 1).cached_tokens == 0


def _error(one: Completion, other: Completion) -> float:
    return max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
