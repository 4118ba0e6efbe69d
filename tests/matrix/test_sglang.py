"""The real server of whatever SGLang is installed serves with FlexKV: hits, identical answers, and tenants that share nothing.

By the native backend, and by SGLang's own ``--enable-flexkv`` where the version has it or a patch gives it to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from flexkv_core.cli.harness.client import Completion
from flexkv_core.cli.harness.server import free_port
from flexkv_core.cli.harness.sglang import (
    BACKEND_ARGUMENTS,
    CPU_ARGUMENTS,
    CPU_ENVIRONMENT,
    SglangClient,
    SglangServer,
)
from flexkv_core.cli.patch.target import Target
from tests.matrix.patched import patched

WAYS = {"backend": BACKEND_ARGUMENTS, "in-tree": ("--enable-flexkv",)}
PAGES = {"backend": 16, "in-tree": 1}
PROMPT = [100 + i * 37 % 20_000 for i in range(1501)]
HIT_TOKENS = 1488
"""All blocks of 16 tokens before the last token."""
RECOMPUTE_BOUND = 2.1e-5
TOKENS = 12


@dataclass(frozen=True)
class Served:
    """A server, and a connection to it."""

    server: SglangServer
    client: SglangClient

    def ask(self, tenant: str | None = None, prompt: list[int] = PROMPT) -> Completion:
        """Greedy, with log-probabilities, to a fixed length."""
        return self.client.complete(prompt, TOKENS, logprobs=True, ignore_eos=True, extra_key=tenant)

    def counted(self, name: str) -> float:
        return self.client.metrics().total(f"sglang:flexkv_{name}_total")


@pytest.fixture(scope="module")
def engine() -> Iterator[Target]:
    """The installed engine, patched where its version needs it."""
    with patched("sglang") as target:
        yield target


@pytest.fixture(scope="module", params=list(WAYS))
def served(
    engine: Target, model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Served]:
    way = request.param
    arguments = [
        *CPU_ARGUMENTS,
        *WAYS[way],
        *("--page-size", str(PAGES[way]), "--max-total-tokens", "8192", "--chunked-prefill-size", "512"),
    ]
    environment = {
        **CPU_ENVIRONMENT,
        "TRITON_INTERPRET": "1",  # before 0.5.22 slots of pages are handed out by a Triton kernel, on a CPU too
        "SGLANG_GRPC_PORT": str(free_port()),  # 0.5.13 adds 10,000 to its port, which may be too much
        "FLEXKV_HOST_BYTES": "128MiB",
    }
    log = tmp_path_factory.mktemp("sglang") / "server.log"
    with SglangServer(model, arguments, environment, log) as server, server.client() as client:
        print(f"SGLang {engine.version} by {way}")
        yield Served(server, client)


def test_hit_and_identical_answer(served: Served) -> None:
    served.client.reset_prefix_cache()
    cold, device = served.ask(), served.ask()
    served.client.reset_prefix_cache()
    host = served.ask()
    print(f"cached tokens: {cold.cached_tokens}, {device.cached_tokens}, {host.cached_tokens}")
    assert cold.cached_tokens == 0
    assert device.cached_tokens >= HIT_TOKENS
    assert device.external_tokens == 0
    assert (host.cached_tokens, host.external_tokens) == (HIT_TOKENS, HIT_TOKENS), (
        "from FlexKV, not the device"
    )
    for other in (device, host):
        assert other.token_ids == cold.token_ids
        assert _error(other, cold) <= RECOMPUTE_BOUND


def test_tenants_share_nothing(served: Served) -> None:
    served.ask("mine")
    served.client.reset_prefix_cache()
    assert [served.ask(tenant).cached_tokens for tenant in ("theirs", "mine")] == [0, HIT_TOKENS]


def test_what_the_device_lacks_is_added(served: Served) -> None:
    """A prefix on the device, more of it in the host tier, the rest computed."""
    whole = [token + 1 for token in PROMPT]
    first = served.ask(prompt=whole)
    served.client.reset_prefix_cache()
    served.ask(prompt=whole[:400])
    again = served.ask(prompt=whole)
    assert again.cached_tokens == HIT_TOKENS
    assert 0 < again.external_tokens < HIT_TOKENS
    assert again.token_ids == first.token_ids
    assert _error(again, first) <= RECOMPUTE_BOUND


def test_more_than_the_device_holds(served: Served) -> None:
    """Requests together, whose prompts push each other out of the device; each answer is the one of an empty cache."""
    prompts = [[token + 10 * number for token in PROMPT] for number in range(1, 9)]

    def ask_all() -> list[Completion]:
        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(lambda prompt: _alone(served, prompt), prompts))

    first, second = ask_all(), ask_all()
    assert [answer.cached_tokens for answer in first] == [0] * len(prompts)
    assert sum(answer.external_tokens for answer in second) >= HIT_TOKENS
    for cold, other in zip(first, second, strict=True):
        assert other.token_ids == cold.token_ids
        assert _error(other, cold) <= RECOMPUTE_BOUND


def _alone(served: Served, prompt: list[int]) -> Completion:
    """By a connection of the thread's own."""
    with served.server.client() as client:
        return Served(served.server, client).ask(prompt=prompt)


def test_counters_show_it(served: Served) -> None:
    deadline = time.monotonic() + 20
    while not served.counted("loaded_blocks") and time.monotonic() < deadline:
        time.sleep(1.1)  # they are published once a second, by a scheduler that runs
        served.client.reset_prefix_cache()
        served.ask()
    assert served.counted("stored_blocks") >= HIT_TOKENS // 16
    assert served.counted("loaded_blocks") >= HIT_TOKENS // 16
    assert served.counted("failed_loads") == 0


def _error(one: Completion, other: Completion) -> float:
    return max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
