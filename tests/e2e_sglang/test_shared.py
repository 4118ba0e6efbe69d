"""SGLang on tiers that are not its own: those of a ``flexkv serve``, and a store that several engines share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexkv_core.cli.harness import server as vllm_server
from flexkv_core.cli.harness.cache_server import CacheServer
from flexkv_core.cli.harness.client import Completion, VllmClient
from flexkv_core.cli.harness.sglang import BACKEND_ARGUMENTS, CPU_ARGUMENTS, CPU_ENVIRONMENT, SglangServer
from flexkv_core.config import as_environment
from flexkv_core.serve.link import ask_status
from tests.e2e_sglang.checks import differences, new_prompt
from tests.e2e_sglang.tree import NativeTree

ROOT = Path(__file__).parents[2]
PROMPT = new_prompt(70, 1601)
FOUND = 1600
"""All that may be found: whole blocks of 16 tokens under SGLang, of 64 under vLLM."""
BLOCKS = {16: FOUND // 16, 64: FOUND // 64}
PATIENT = {"remote_lookup_deadline_ms": 10_000, "remote_read_deadline_ms": 10_000}


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


@pytest.mark.extended
def test_servers_of_both_engines_beside_flexkv_serve(llama: Path, tmp_path: Path) -> None:
    """Of one model, whose KV the engines lay out each in its own way: each finds what it stored itself, in the server's memory, and when
    another server has taken over, in the store; meanwhile both compute."""
    cache = CacheServer(tmp_path, "64MiB", {"remote_url": f"dir:{tmp_path}/store", **PATIENT}, models=2)
    settings = {"server": str(cache.socket), "server_deadline_ms": 1000, **PATIENT}
    with (
        sglang_beside(llama, tmp_path, settings) as sglang,
        vllm_beside(llama, tmp_path, settings) as vllm,
        sglang.client() as first,
        vllm.client() as second,
    ):
        clients: list[VllmClient] = [first, second]
        alone = [ask_again(client) for client in clients]
        with cache:
            wait_until(lambda: is_connected(cache.socket, len(clients)))
            cold = [ask_again(client) for client in clients]
            memory = [ask_again(client) for client in clients]
            wait_until(lambda: counted(cache.socket, "remote_written_blocks") == BLOCKS)
        away = [ask_again(client) for client in clients]
        with cache:
            wait_until(lambda: is_connected(cache.socket, len(clients)))
            store = [ask_again(client) for client in clients]
            assert counted(cache.socket, "remote_read_blocks") == BLOCKS
    for answers, found in ((alone, 0), (cold, 0), (memory, FOUND), (away, 0), (store, FOUND)):
        assert [answer.cached_tokens for answer in answers] == [found, found]
        for one, other in zip(alone, answers, strict=True):
            assert not differences(one, other)


def sglang_beside(model: Path, folder: Path, settings: dict[str, object]) -> SglangServer:
    arguments = (*CPU_ARGUMENTS, *BACKEND_ARGUMENTS, "--page-size", "16", "--max-total-tokens", "4096")
    environment = {**CPU_ENVIRONMENT, **as_environment(settings)}
    return SglangServer(model, arguments, environment, folder / "sglang.log")


def vllm_beside(model: Path, folder: Path, settings: dict[str, object]) -> vllm_server.VllmServer:
    """In the environment of vLLM's own tests, of which SGLang's must see nothing."""
    arguments = (
        *vllm_server.CPU_ARGUMENTS,
        "--kv-transfer-config",
        vllm_server.transfer_config(settings),
        *("--max-model-len", "4096"),
    )
    prefix = ("env", "-u", "PYTHONPATH", "-u", "SGLANG_USE_CPU_ENGINE", str(ROOT / "scripts/env"))
    return vllm_server.VllmServer(
        model,
        arguments,
        vllm_server.CPU_ENVIRONMENT,
        folder / "vllm.log",
        python="python",
        prefix=prefix,
    )


def ask_again(client: VllmClient) -> Completion:
    """With the engine's own cache empty."""
    client.reset_prefix_cache()
    return client.complete(PROMPT, 8, logprobs=True, ignore_eos=True)


def is_connected(socket: Path, models: int) -> bool:
    """Whether so many models are served, each to an engine that is there."""
    served = [model["clients"] for model in models_of(socket)]
    return len(served) == models and all(any(c["connected"] for c in clients) for clients in served)


def counted(socket: Path, name: str) -> dict[int, int]:
    """A counter of each model, by the tokens of its blocks."""
    return {model["tokens_per_block"]: model["counters"][name] for model in models_of(socket)}


def models_of(socket: Path) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = ask_status(socket, 5.0)["models"]  # type: ignore[assignment]
    return models


def test_trees_that_share_a_server(tmp_path: Path) -> None:
    """The second comes after the first has gone; then the server goes, and nothing is found."""
    cache = CacheServer(tmp_path, "4MiB")
    settings = {"server": str(cache.socket), "server_deadline_ms": 1000}
    tokens = new_prompt(72, 401)
    with cache:
        first = tree(tmp_path, **settings)
        store(first, tokens)
        first.close()
        second = tree(tmp_path, **settings)
        assert second.match(second.request("salted", tokens, "a salt")) == 0
        again = second.request("again", tokens)
        assert second.prefill(again) == 400
        assert second.wrong_positions(again) == []
        second.finish(again)
        second.settle()
    second.flush()
    alone = second.request("alone", tokens)
    assert second.prefill(alone) == 0
    assert second.wrong_positions(alone) == []
    second.close()


def test_a_store_without_a_server(tmp_path: Path) -> None:
    """What one engine wrote, another with nothing of its own finds before its request leaves the queue."""
    settings = {"host_bytes": "4MiB", "remote_url": f"dir:{tmp_path}/store", **PATIENT}
    tokens = new_prompt(71, 401)
    first = tree(tmp_path, **settings)
    wait_until(lambda: first.linker.side.manager._remote.pid > 0)
    store(first, tokens)
    first.close()
    second = tree(tmp_path, **settings)
    wait_until(lambda: second.linker.side.manager._remote.pid > 0)
    again, other = second.request("again", tokens), second.request("other", tokens, "a salt")
    for request in (again, other):
        second.cache.linker.queued(request)
    wait_until(lambda: not second.cache.linker.held([again, other]))
    assert second.match(other) == 0
    assert second.prefill(again) == 400
    assert second.wrong_positions(again) == []
    assert second.linker.side.manager.counters().remote_read_blocks == 25
    second.linker.side.manager.check_integrity()
    second.close()


def tree(folder: Path, **settings: object) -> NativeTree:
    """SGLang's own, without a model; a folder that is made once names one."""
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    return NativeTree(str(model), 16, 512, **settings)


def store(tree: NativeTree, tokens: list[int]) -> None:
    """A request comes, is answered and goes."""
    req = tree.request("stored", tokens)
    tree.prefill(req)
    tree.finish(req)
    tree.settle()
