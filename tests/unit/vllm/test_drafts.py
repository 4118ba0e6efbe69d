"""Drafters with KV at the connector's interface: what is refused, what names the KV, and what of it is stored and loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config
from vllm.v1.kv_cache_interface import MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import ConfigError
from flexkv_vllm import drafts
from flexkv_vllm.layout import check_supported, identity, ranks_of, slot_layout
from tests.unit.vllm.test_group_layouts import full, laid_out, vllm_config, window
from tests.unit.vllm.test_tensor_parallel import (
    BLOCK_TOKENS,
    GOT,
    PROMPT,
    PUT,
    PlayedEngine,
    leave,
    make_request,
)

DRAFTER_LIES: dict[str, dict[str, Any]] = {
    "beside equal layers": {"f0": full(), "f1": full(), "drafter": full()},
    "beside larger layers": {"f0": full(), "f1": full(), "drafter": full(num_kv_heads=1)},
    "beside windows": {"f": full(), "w0": window(), "w1": window(), "drafter": full()},
}
METHODS = ("draft_model", "eagle", "eagle3", "mtp")


def drafter(method: str, model: str = "/drafter", use_mla: bool = False) -> dict[str, Any]:
    draft = SimpleNamespace(model=model, revision=None, quantization=None, use_mla=use_mla)
    return {
        "method": method,
        "num_speculative_tokens": 3,
        "draft_model_config": draft,
        "use_eagle": lambda: method != "draft_model",
        "use_eagle_block_drop": lambda: method != "draft_model",
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lies", DRAFTER_LIES)
def test_drafters_are_served_wherever_their_layers_lie(lies: str, method: str) -> None:
    config = vllm_config(speculative_config=drafter(method))
    found, _ = laid_out(config, DRAFTER_LIES[lies], KVCacheLayout.LBHNC)
    check_supported(config, found, FlexKVConfig())


@pytest.mark.parametrize(
    ("fields", "settings", "words"),
    [
        ({"speculative_config": drafter("dflash")}, {}, "method 'dflash' is not supported; allowed: ngram"),
        (
            {"speculative_config": drafter("eagle"), "parallel_config": {"pipeline_parallel_size": 2}},
            {},
            "pipeline_parallel_size = 2: .* method 'eagle' adds the drafter's layers",
        ),
        (
            {"speculative_config": drafter("mtp")},
            {"verify_sample": 0.5},
            "verify_sample = 0.5: with .* 'mtp'",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    fields: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    config = vllm_config(**fields)
    found, _ = laid_out(config, {"f0": full(), "f1": full()}, KVCacheLayout.LBHNC)
    with pytest.raises(ConfigError, match=words):
        check_supported(config, found, FlexKVConfig(**settings))


def test_version_that_saves_before_the_drafter_has_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "STORES_AFTER_DRAFTS", False)
    with pytest.raises(ConfigError, match="saves KV after the drafter has run"):
        drafts.check_drafter(vllm_config(speculative_config=drafter("eagle")), FlexKVConfig())
    drafts.check_drafter(vllm_config(speculative_config={"method": "ngram"}), FlexKVConfig())


def test_a_draft_model_may_be_verified() -> None:
    """Its KV depends on the tokens before, like the model's."""
    drafts.check_drafter(
        vllm_config(speculative_config=drafter("draft_model")), FlexKVConfig(verify_sample=0.5)
    )


def test_each_drafter_has_keys_of_its_own(tmp_path: Path) -> None:
    """Slots with a drafter's layers, or with another's, are not those of the model alone."""
    config = vllm_config()
    found, _ = laid_out(config, DRAFTER_LIES["beside equal layers"], KVCacheLayout.LBHNC)

    def named(settings: FlexKVConfig | None = None) -> dict[str, object]:
        return identity(config, found, settings or FlexKVConfig())

    seen = [named()]
    weights = tmp_path / "model.safetensors"
    for method in METHODS:
        for content in (b"weights", b"others, as long"):
            weights.write_bytes(content)
            config.speculative_config = SimpleNamespace(**drafter(method, str(tmp_path)))
            seen.append(named())
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])
    config.speculative_config = SimpleNamespace(**drafter("ngram"))
    assert named() == seen[0]

    # MTP within the model: a name of the user's own stands for all weights, and where they lie is no part of it.
    settings, names = FlexKVConfig(model_id="mine"), []
    for folder in ("/here", "/there"):
        config.model_config.model = folder
        config.speculative_config = SimpleNamespace(**drafter("mtp", folder))
        names.append(named(settings))
    assert names[0] == names[1]


def test_what_is_stored_and_loaded() -> None:
    def config(method: str | None, lookahead: int = 0) -> Any:
        made = vllm_config(**({"speculative_config": drafter(method)} if method else {}))
        made.num_prefill_lookahead_tokens = lookahead
        return made

    for method, lookahead, unsettled, withheld in (
        (None, 0, 0, 0),
        ("draft_model", 0, 0, 0),
        ("eagle", 1, 0, 1),
        ("mtp", 1, 0, 1),
        ("mtp", 3, 2, 1),  # modules that read up to three tokens ahead
    ):
        assert drafts.unsettled_tokens(config(method, lookahead)) == unsettled
        assert drafts.withheld_blocks(config(method, lookahead)) == withheld


def test_ranks_share_latent_kv_only_where_the_drafter_keeps_latent_kv_too() -> None:
    """A drafter of another kind has other heads on every rank. The scheduler, which knows one layer of the group, must agree."""
    latent = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32)
    for of_drafter, use_mla, shards in ((latent, True, 1), (full(), False, 2)):
        parallel = {"tensor_parallel_size": 2}
        config = vllm_config(parallel_config=parallel, speculative_config=drafter("eagle3", use_mla=use_mla))
        worker, _ = laid_out(config, {"m0": latent, "m1": latent, "drafter": of_drafter}, KVCacheLayout.LBHNC)
        scheduler = generate_scheduler_kv_cache_config([worker])
        assert ranks_of(config, worker).shard_count == ranks_of(config, scheduler).shard_count == shards
        settings = FlexKVConfig()
        assert slot_layout(config, worker, settings) == slot_layout(config, scheduler, settings)


@pytest.mark.parametrize(
    ("method", "lookahead", "stored", "withheld"),
    [("draft_model", 0, 5, 0), ("eagle", 1, 5, 1), ("eagle3", 1, 5, 1), ("mtp", 1, 5, 1), ("mtp", 5, 4, 1)],
)
def test_a_hit_with_a_drafter(method: str, lookahead: int, stored: int, withheld: int) -> None:
    """Of the engine's three layers the last is the drafter's. 83 tokens are computed; modules that read five tokens ahead will write the
    last four of them once more, and so a part of the fifth block. The engine holds as much of its own as it would be given."""
    speculative = SimpleNamespace(**drafter(method))
    parts = {"speculative_config": speculative, "num_prefill_lookahead_tokens": lookahead}
    engine = PlayedEngine(2, parts)
    try:
        first = make_request("first", PROMPT)
        engine.put(first, PUT)
        leave(engine, first)
        assert engine.scheduler.manager.counters().stored_blocks == stored
        tokens = (stored - withheld) * BLOCK_TOKENS
        again = make_request("again", PROMPT)
        assert engine.scheduler.matched_tokens(again, tokens) == (0, False)
        assert engine.scheduler.matched_tokens(again, 0) == (tokens, True)
        assert engine.load(again, GOT, tokens) == [set(), set()]
        count = stored - withheld
        for rank in range(2):
            loaded, written = engine.bytes_of(rank, GOT[:count]), engine.bytes_of(rank, PUT[:count])
            assert torch.equal(loaded, written), "of the drafter's layer, too"
    finally:
        engine.close()
