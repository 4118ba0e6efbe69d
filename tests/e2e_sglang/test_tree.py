"""SGLang's pools and tree with FlexKV behind them, without a model: bytes, locks and slots, as requests come and go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import ConfigError, TransferError
from flexkv_kernels.copier import CpuCopier
from flexkv_sglang.compat import engine as engine_compat
from flexkv_sglang.compat import tree as tree_compat
from flexkv_sglang.layout import check_supported
from flexkv_sglang.preflight import check_before_weights
from tests.e2e_sglang.checks import new_prompt
from tests.e2e_sglang.tree import CONFIG, NativeTree, rounded

MakeTree = Callable[..., NativeTree]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeTree]:
    """Makes trees and closes them."""
    made: list[NativeTree] = []
    (tmp_path / "config.json").write_text(CONFIG)

    def make_tree(page_size: int = 1, tokens: int = 512, **settings: object) -> NativeTree:
        made.append(NativeTree(str(tmp_path), page_size, tokens, **{"host_bytes": "4MiB", **settings}))
        return made[-1]

    yield make_tree
    for tree in made:
        tree.close()


@pytest.mark.parametrize("page_size", [1, 4, 16, 32])
def test_bytes_come_back(make: MakeTree, page_size: int) -> None:
    tree, tokens = make(page_size), new_prompt(1, 201)
    tree.store(tokens)
    tree.flush()
    req = tree.request("again", tokens)
    assert tree.prefill(req) == 192
    assert tree.wrong_positions(req) == []
    tree.linker.side.manager.check_integrity()


@pytest.mark.parametrize("page_size", [1, 16])
def test_latent_attention(make: MakeTree, page_size: int) -> None:
    """One tensor a layer: its bytes come back, and another tenant gets none of them."""
    tree, tokens = make(page_size, is_mla=True), new_prompt(14, 201)
    tree.store(tokens, "mine")
    tree.flush()
    assert tree.match(tree.request("theirs", tokens, "theirs")) == 0
    req = tree.request("again", tokens, "mine")
    assert tree.prefill(req) == 192
    assert tree.wrong_positions(req) == []


@pytest.mark.parametrize("is_mla", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
def test_kv_kept_as_fp8(make: MakeTree, page_size: int, is_mla: bool) -> None:
    """A page's values come back as the rounding says, a scale for each page of each tensor."""
    tree, tokens = (
        make(page_size, is_mla=is_mla, dtype=torch.bfloat16, store_dtype="fp8"),
        new_prompt(15, 201),
    )
    first = tree.request("first", tokens)
    tree.prefill(first)
    before = tree.values(first, 192).float()
    tree.finish(first)
    tree.settle()
    tree.flush()
    req = tree.request("again", tokens)
    assert tree.prefill(req) == 192
    wanted = rounded(before.reshape(len(before), 192 // page_size, -1)).reshape(before.shape)
    assert torch.equal(tree.values(req, 192), wanted)
    assert not torch.equal(wanted.float(), before)


def test_fp8_of_a_pool_in_float32_is_refused(make: MakeTree) -> None:
    with pytest.raises(ConfigError, match="has dtype float32; only bfloat16"):
        make(store_dtype="fp8")


def test_only_what_the_device_lacks_is_loaded(make: MakeTree) -> None:
    tree, tokens = make(), new_prompt(2, 201)
    tree.store(tokens)
    tree.flush()
    first = tree.request("first", tokens[:50] + new_prompt(3, 20))
    tree.prefill(first)  # loads 48 and computes 2 that the next one shares
    second = tree.request("second", tokens)
    assert tree.prefill(second) == 192 - 50
    assert tree.wrong_positions(second) == []


def test_growing_sequences_are_stored_once(make: MakeTree) -> None:
    tree, tokens = make(), new_prompt(4, 150)
    tree.store(tokens[:100])
    before = tree.linker.side.manager.counters().stored_blocks
    tree.store(tokens)
    assert (before, tree.linker.side.manager.counters().stored_blocks) == (6, 9)


def test_salts_separate(make: MakeTree) -> None:
    tree, tokens = make(), new_prompt(5, 100)
    tree.store(tokens, "one")
    tree.flush()
    assert [tree.match(tree.request(f"salt {salt}", tokens, salt)) for salt in ("two", None, "one")] == [
        0,
        0,
        96,
    ]


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_failed_load_gives_its_slots_back(
    make: MakeTree, monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    tree, tokens = make(page_size), new_prompt(6, 161)
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
    assert tree.match(req) == 0  # it is not asked for twice
    assert tree.prefill(req) == 0
    assert tree.wrong_positions(req) == []
    assert tree.linker.side.manager.counters().failed_loads == 1


def test_a_damaged_block_is_computed(make: MakeTree) -> None:
    tree, tokens = make(), new_prompt(7, 161)
    tree.store(tokens)
    tree.flush()
    host = tree.linker.side.manager.host
    host.checksums[:] ^= 1
    req = tree.request("again", tokens)
    assert tree.prefill(req) == 0
    assert tree.wrong_positions(req) == []


def test_an_abort_in_the_queue_leaves_nothing(make: MakeTree) -> None:
    tree, tokens = make(), new_prompt(8, 161)
    tree.store(tokens)
    tree.flush()
    free = tree.allocator.available_size()
    req = tree.request("given up", tokens)
    assert tree.match(req) == 160
    tree.cache.release_aborted_request(req.cache_request_handle)
    assert not tree.cache.linker.hit_markers
    assert tree.allocator.available_size() == free


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_retracted_request_gives_all_back_and_hits_again(make: MakeTree, page_size: int) -> None:
    """Also after a load: nothing stays locked, and when its turn comes again FlexKV has what it had computed."""
    tree, tokens = make(page_size), new_prompt(16, 161)
    free = tree.allocator.available_size()
    req = tree.request("makes room", tokens)
    for found in (0, 160, 160):
        assert tree.prefill(req) == found
        assert tree.wrong_positions(req) == []
        tree.retract(req)
        tree.settle()
        tree.allocator.evict_to_free_tokens(tree.cache, free)
        assert tree.allocator.available_size() == free
    assert not tree.cache.linker.hit_markers


def test_a_store_locks_its_node_until_it_has_ended(make: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the copy runs nothing may overwrite its slots; an eviction that needs them waits for it and goes on."""
    tree, tokens = make(tokens=256), new_prompt(9, 200)
    may_copy = threading.Event()
    gather = CpuCopier.gather

    def slow(*arguments: Any) -> None:
        may_copy.wait(10)
        gather(*arguments)

    monkeypatch.setattr(CpuCopier, "gather", slow)
    req = tree.request("stored", tokens)
    tree.prefill(req)
    tree.finish(req)
    tree.step()
    assert tree.linker.side.pending_stores == 1
    threading.Timer(0.2, may_copy.set).start()
    other = tree.request("needs the room", new_prompt(10, 200))
    tree.prefill(other)
    assert may_copy.is_set()
    tree.finish(other)
    tree.settle()
    tree.flush()
    again = tree.request("again", tokens)
    assert tree.prefill(again) == 192
    assert tree.wrong_positions(again) == []


def test_eviction_of_both_tiers(make: MakeTree) -> None:
    """Many more sequences than fit: what is found is right, what is not is computed."""
    tree = make(page_size=16, tokens=1024, host_bytes=(2 << 20) + 64 * 4096)
    rng = np.random.default_rng(0)
    prompts = [new_prompt(20 + n, 161) for n in range(12)]
    loaded = 0
    for _ in range(60):
        number = int(rng.zipf(1.5)) % len(prompts)
        req = tree.request(f"{number}-{rng.random()}", prompts[number])
        loaded += tree.prefill(req)
        assert tree.wrong_positions(req) == []
        tree.finish(req)
        tree.step()
    tree.settle()
    assert loaded
    assert tree.linker.side.manager.counters().evicted_blocks
    tree.linker.side.manager.check_integrity()


def test_other_weights_find_nothing(make: MakeTree) -> None:
    tree, tokens = make(), new_prompt(11, 161)
    tree.store(tokens)
    tree.cache.linker.weights_change()
    tree.store(new_prompt(12, 161))  # neither stored nor found until the tree is empty
    tree.flush()
    assert tree.match(tree.request("old", tokens)) == 0
    assert tree.match(tree.request("between", new_prompt(12, 161))) == 0
    tree.store(tokens)
    tree.flush()
    assert tree.match(tree.request("new", tokens)) == 160


@pytest.mark.parametrize("salt", [None, "one"])
def test_a_restart_finds_the_ssd(make: MakeTree, tmp_path: Path, salt: str | None) -> None:
    settings = {"ssd_dirs": [str(tmp_path)], "ssd_bytes": "64MiB"}
    tree, tokens = make(**settings), new_prompt(13, 161)
    tree.store(tokens, salt)
    tree.close()
    again = make(**settings)
    req = again.request("again", tokens, salt)
    again.cache.linker.queued(req)
    while again.cache.linker.held([req]):
        time.sleep(0.001)
    assert again.linker.side.manager.counters().prefetched_blocks == 10
    assert again.prefill(req) == 160
    assert again.wrong_positions(req) == []


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"hots_bytes": 1}, "hots_bytes"),
        ({"tokens_per_block": 24}, "multiple"),
        ({"verify_sample": 0.5}, "verify_sample"),
    ],
)
def test_bad_settings_are_refused(make: MakeTree, settings: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make(page_size=16, **settings)


def test_events_tell_what_is_where(make: MakeTree) -> None:
    """Replayed, they give what the host tier holds."""
    tree = make(page_size=16, tokens=1024, host_bytes=(2 << 20) + 16 * 4096)
    held: set[int] = set()
    for number in range(4):
        tokens = new_prompt(40 + number, 161)
        tree.store(tokens, "tenant")
        for event in tree.cache.take_events():
            if getattr(event, "medium", "GPU") == "GPU":  # SGLang's own
                continue
            assert event.medium == "CPU_PINNED"
            if type(event).__name__ == "BlockRemoved":
                assert held.issuperset(event.block_hashes)
                held.difference_update(event.block_hashes)
            else:
                assert event.token_ids == tokens[:160]
                assert event.cache_salt == "tenant"
                held.update(event.block_hashes)
    assert len(held) == tree.linker.side.manager.usage()[0]
    assert tree.linker.side.manager.counters().evicted_blocks


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"components": ("FULL", "SWA")}, "SWA"),
        ({"components": ("FULL", "MAMBA")}, "MAMBA"),
        ({"has_draft_kv": True}, "draft"),
        ({"pool": type("SWAKVPool", (), {})()}, "SWAKVPool"),
    ],
)
def test_what_cannot_be_served_right_is_refused(make: MakeTree, change: dict[str, Any], word: str) -> None:
    engine = replace(make().linker._engine, **change)
    with pytest.raises(ConfigError, match=word):
        check_supported(engine, FlexKVConfig())


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ({"pp_size": 2}, "pp-size"),
        ({"disaggregation_mode": "prefill"}, "disaggregation"),
        ({"speculative_algorithm": "EAGLE3"}, "EAGLE3"),
        ({"setting": "1"}, "FLEXKV_HOTS_BYTES"),
    ],
)
@pytest.mark.parametrize("way", ["backend", "linker", "in-tree"])
def test_what_is_known_early_is_refused_early(
    monkeypatch: pytest.MonkeyPatch, option: dict[str, Any], word: str, way: str
) -> None:
    linker = {"linker": "FlexKVLinker", "linker_module_path": "flexkv_sglang.linker"}
    arguments = SimpleNamespace(
        radix_cache_backend="flexkv-tiered" if way == "backend" else None,
        enable_flexkv=way == "in-tree",
        flexkv_config_file=None,
        unified_cache_external_linker_config=linker if way == "linker" else None,
        **{"pp_size": 1, "disaggregation_mode": "null", "speculative_algorithm": None, **option},
    )
    if "setting" in option:
        monkeypatch.setenv("FLEXKV_HOTS_BYTES", "1")
    with pytest.raises(ConfigError, match=word):
        check_before_weights(arguments)


@pytest.mark.parametrize(
    ("version", "way"), [("0.5.23", True), ("0.5.23.post1", True), ("0.6.0", True), ("0.5.22", False)]
)
def test_which_way_a_version_has(monkeypatch: pytest.MonkeyPatch, version: str, way: bool) -> None:
    monkeypatch.setattr(tree_compat, "engine_version", lambda: version)
    assert tree_compat.has_linker() is way


@pytest.mark.parametrize(
    "worker", [SimpleNamespace(ps=SimpleNamespace(dp_rank=1)), SimpleNamespace(dp_rank=1)]
)
def test_which_of_several_engines_an_older_worker_is(worker: Any) -> None:
    assert engine_compat._dp_rank(worker) == 1
    assert engine_compat._dp_rank(None) == 0
