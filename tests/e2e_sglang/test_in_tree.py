"""SGLang's own ``FlexKVRadixCache`` (``--enable-flexkv``) over this project's modules: hits, bytes, and tenants that must not share.

What it may ask and what it gets is what its calls here use; SGLang's class is the caller.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sglang_on_cpu
import torch
from sglang.srt.runtime_context import get_parallel

from flexkv_core.block_manager import BlockManager
from flexkv_core.cli.harness.cache_server import CacheServer
from flexkv_core.errors import ConfigError, TransferError
from flexkv_kernels.copier import CpuCopier
from flexkv_sglang import in_tree
from flexkv_sglang.preflight import check_before_weights
from tests.e2e_sglang.checks import new_prompt
from tests.e2e_sglang.tree import CONFIG, LAYERS, NativeTree, Pools, Tree, rounded


class InTree(Tree):
    """The same requests as the native adapter's tests send."""

    def __init__(self, model: str, page_size: int, tokens: int, dtype: torch.dtype = torch.float32) -> None:
        from sglang.srt.mem_cache.storage.flexkv.flexkv_radix_cache import FlexKVRadixCache

        sglang_on_cpu.register()  # in a server SGLang does it
        pools = Pools(model, page_size, tokens, dtype=dtype)
        config = SimpleNamespace(num_hidden_layers=LAYERS, attention_arch="AttentionArch.MHA")
        with get_parallel().override(world_group=SimpleNamespace(cpu_group=None)):
            cache = FlexKVRadixCache(
                pools.params,
                config,
                pools.server_args,
                tp_rank=0,
                tp_size=1,
                dp_rank=None,
                pp_rank=0,
                attn_cp_rank=0,
            )
        super().__init__(pools, cache)

    @property
    def manager(self) -> in_tree.InTreeManager:
        manager: in_tree.InTreeManager = self.cache.flexkv_connector.kv_manager
        return manager

    def pending_stores(self) -> int:
        """See :class:`Tree`."""
        return len(self.cache._inflight_store_nodes)

    def close(self) -> None:
        """See :class:`Tree`."""
        self.cache.shutdown()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., InTree]]:
    monkeypatch.setenv("FLEXKV_HOST_BYTES", "4MiB")
    (tmp_path / "config.json").write_text(CONFIG)
    made: list[InTree] = []

    def make_tree(page_size: int = 1, tokens: int = 512, dtype: torch.dtype = torch.float32) -> InTree:
        made.append(InTree(str(tmp_path), page_size, tokens, dtype))
        return made[-1]

    yield make_tree
    for tree in made:
        tree.close()


@pytest.mark.parametrize("page_size", [1, 16])
def test_bytes_come_back(make: Callable[..., InTree], page_size: int) -> None:
    tree, tokens = make(page_size), new_prompt(1, 201)
    tree.store(tokens)
    tree.flush()
    req = tree.request("again", tokens)
    assert tree.prefill(req) == 192
    assert tree.wrong_positions(req) == []


def same_requests(tree: Tree) -> list[tuple[int, int]]:
    """What the two ways are compared by: tokens found and, of them, loaded by FlexKV, of prompts that are new, repeated, repeated after a
    flush, that share a beginning on the device and behind it, that go on, and that another tenant asks."""
    found = []

    def ask(tokens: list[int], salt: str | None = None) -> None:
        req = tree.request(f"request {len(found)}", tokens, salt)
        tree.match(req)
        on_device = len(tree.cache.prefix_device_indices(req))
        loaded = tree.prefill(req)
        found.append((on_device + loaded, loaded))
        assert tree.wrong_positions(req) == []
        tree.finish(req)
        tree.settle()

    for length in (15, 16, 17, 161):
        ask(new_prompt(length, length))
        ask(new_prompt(length, length))
        tree.flush()
        ask(new_prompt(length, length))
    shared = new_prompt(20, 201)
    ask([*shared, *new_prompt(21, 100)])
    ask([*shared, *new_prompt(22, 120)])
    tree.flush()
    ask([*shared, *new_prompt(23, 40)])
    ask([*shared, *new_prompt(22, 120), *new_prompt(24, 60)])
    ask([*shared, *new_prompt(21, 100)], "theirs")
    return found


@pytest.mark.parametrize("page_size", [1, 16])
def test_same_hits_as_the_native_adapter(make: Callable[..., InTree], tmp_path: Path, page_size: int) -> None:
    native = NativeTree(str(tmp_path), page_size, 512, host_bytes="4MiB")
    wanted = same_requests(native)
    native.close()
    assert sum(loaded for _, loaded in wanted) > 450, "too few hits to compare"
    assert same_requests(make(page_size)) == wanted


def test_kv_kept_as_fp8(make: Callable[..., InTree], monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's values come back as the rounding says; a pool of another data type ends the process with the reason."""
    monkeypatch.setenv("FLEXKV_STORE_DTYPE", "fp8")
    tree, tokens = make(dtype=torch.bfloat16), new_prompt(3, 201)
    first = tree.request("first", tokens)
    tree.prefill(first)
    before = tree.values(first, 192).float()
    tree.finish(first)
    tree.settle()
    tree.flush()
    req = tree.request("again", tokens)
    assert tree.prefill(req) == 192
    wanted = rounded(before)
    assert torch.equal(tree.values(req, 192), wanted)
    assert not torch.equal(wanted.float(), before)
    with pytest.raises(SystemExit, match="has dtype float32; only bfloat16"):
        make()


def test_what_the_device_holds_is_not_loaded(make: Callable[..., InTree]) -> None:
    """The device ends within a block: the load begins there, not where the block does."""
    tree, tokens = make(), new_prompt(2, 201)
    tree.store(tokens)
    tree.flush()
    tree.prefill(tree.request("first", tokens[:50]))
    second = tree.request("second", tokens)
    assert tree.prefill(second) == 192 - 50
    assert tree.wrong_positions(second) == []


def test_tenants_do_not_share(make: Callable[..., InTree]) -> None:
    """On the way in and on the way out, by salt and by extra key."""
    tree, tokens = make(), new_prompt(3, 200)
    tree.store(tokens, "one")
    tree.flush()
    for name, salt, extra, expected in (
        ("other salt", "two", None, 0),
        ("no salt", None, None, 0),
        ("as extra key", None, "one", 0),
        ("both", "one", "one", 0),
        ("same", "one", None, 192),
    ):
        req = tree.request(name, tokens, salt)
        req.extra_key = extra
        assert tree.match(req) == expected, name
        tree.cache.release_aborted_request(req.cache_request_handle)


def test_a_caller_without_a_request_finds_and_stores_nothing(make: Callable[..., InTree]) -> None:
    """Nobody says whose tokens they are, so they are nobody's."""
    tree, tokens = make(), new_prompt(4, 160)
    tree.store(tokens)
    task, mask = tree.manager.get_match(np.array(tokens))
    assert (task, mask.any()) == (-1, False)
    task, mask = tree.manager.put_match(np.array(new_prompt(5, 160)))
    assert (task, mask.any()) == (-1, False)


def test_a_failed_load_is_computed(make: Callable[..., InTree], monkeypatch: pytest.MonkeyPatch) -> None:
    tree, tokens = make(), new_prompt(6, 161)
    tree.store(tokens)
    tree.flush()
    free = tree.allocator.available_size()

    def refuse(*arguments: Any) -> np.ndarray:
        raise TransferError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(CpuCopier, "scatter", refuse)
        req = tree.request("again", tokens)
        assert tree.match(req) == 160
        assert tree.load(req) == 0
    assert tree.allocator.available_size() == free
    assert tree.prefill(req) == 160  # what is whole in host memory is tried again
    assert tree.wrong_positions(req) == []


def test_a_match_that_is_given_up_pins_nothing(make: Callable[..., InTree]) -> None:
    tree, tokens = make(), new_prompt(7, 161)
    tree.store(tokens)
    tree.flush()
    req = tree.request("given up", tokens)
    assert tree.match(req) == 160
    tree.cache.release_aborted_request(req.cache_request_handle)
    assert not tree.manager._tasks
    assert isinstance(tree.manager.blocks, BlockManager)
    tree.manager.blocks.check_integrity()


def test_other_weights_find_nothing(make: Callable[..., InTree]) -> None:
    from flexkv_sglang.compat import in_tree_hooks

    tree, tokens = make(), new_prompt(8, 161)
    tree.store(tokens)
    in_tree_hooks._observe_weight_load(None, "disk")
    tree.flush()
    assert tree.match(tree.request("old", tokens)) == 0


def test_the_tiers_of_a_server(
    make: Callable[..., InTree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one process has stored, the next one finds: the memory is that of ``flexkv serve``."""
    monkeypatch.delenv("FLEXKV_HOST_BYTES")
    tokens = new_prompt(9, 201)
    with CacheServer(tmp_path, "16MiB") as server:
        monkeypatch.setenv("FLEXKV_SERVER", str(server.socket))
        first = make()
        wait_until_ready(first)
        first.store(tokens)
        first.close()
        second = make()
        wait_until_ready(second)
        req = second.request("again", tokens)
        assert second.prefill(req) == 192
        assert second.wrong_positions(req) == []


def wait_until_ready(tree: InTree) -> None:
    blocks, deadline = tree.manager.blocks, time.monotonic() + 20
    assert blocks is not None
    while not blocks.is_ready():
        assert time.monotonic() < deadline, "the server was not found"
        time.sleep(0.01)


def test_more_than_one_process_is_refused(tmp_path: Path) -> None:
    arguments = SimpleNamespace(tp_size=2, pp_size=1, dp_size=1, nnodes=1, speculative_algorithm=None)
    config = in_tree.InTreeConfig.from_env()
    with pytest.raises(ConfigError, match="flexkv-tiered"):
        config.post_init_from_sglang_config(sglang_config=None, server_args=arguments, page_size=1)


def test_module_of_another_distribution_is_left_alone_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its settings are not ours to refuse; the native adapter does without the module."""
    door = tmp_path / "flexkv" / "integration" / "config.py"
    door.parent.mkdir(parents=True)
    for file in (door, door.parent / "__init__.py", door.parent.parent / "__init__.py"):
        file.write_text("raise ImportError('of another distribution')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "flexkv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("FLEXKV_OF_THEIRS", "1")
    chosen = {"pp_size": 1, "disaggregation_mode": "null", "speculative_algorithm": None}
    with caplog.at_level(logging.WARNING, "flexkv_sglang.preflight"):
        check_before_weights(SimpleNamespace(enable_flexkv=True, radix_cache_backend=None, **chosen))
    assert f"will use the module flexkv in {tmp_path / 'flexkv'}, which is not of this project" in caplog.text
    assert "--radix-cache-backend flexkv-tiered" in caplog.text
    monkeypatch.delenv("FLEXKV_OF_THEIRS")
    (tmp_path / "config.json").write_text(CONFIG)
    tree, tokens = NativeTree(str(tmp_path), 16, 512, host_bytes="4MiB"), new_prompt(10, 161)
    tree.store(tokens)
    tree.flush()
    assert tree.match(tree.request("again", tokens)) == 160
    tree.close()
    assert "flexkv" not in sys.modules
