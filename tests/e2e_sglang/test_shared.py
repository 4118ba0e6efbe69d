"""SGLang's pools and tree on tiers that are not its own: those of a ``flexkv serve``, and a store that several engines share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from flexkv_core.cli.harness.cache_server import CacheServer
from tests.e2e_sglang.checks import new_prompt
from tests.e2e_sglang.tree import NativeTree

PATIENT = {"remote_lookup_deadline_ms": 10_000, "remote_read_deadline_ms": 10_000}


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


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
