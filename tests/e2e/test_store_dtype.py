"""KV kept as fp8 under a real engine in bfloat16: what a hit brings is exactly what the rounding says, from every tier, and an engine that
keeps exact bytes finds none of it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from flexkv_kernels.quantising import QuantisingCpuCopier
from tests.e2e.engine import BLOCK_TOKENS, Answer, Engine, prompt_tokens

BLOCKS = 10
PROMPT = prompt_tokens(2500, BLOCKS * BLOCK_TOKENS + 5)
BF16 = {"dtype": "bfloat16"}
TIERS_S = 30


def tiers(folder: Path) -> dict[str, object]:
    (folder / "ssd").mkdir(exist_ok=True)
    return {
        "host_bytes": "64MiB",
        "ssd_dirs": [str(folder / "ssd")],
        "ssd_bytes": "64MiB",
        "remote_url": f"dir:{folder}/store",
        "remote_lookup_deadline_ms": 20_000,
        "remote_read_deadline_ms": 20_000,
    }


def held(engine: Engine, answer: Answer) -> np.ndarray:
    """uint16 [layers, blocks, values]: the prompt's full blocks in the engine's own tensors."""
    return engine.kv_bytes(answer.blocks[:BLOCKS]).view(np.uint16)


def rounded(bits: np.ndarray) -> np.ndarray:
    """What comes back of ``bits``: a scale for each layer of each block."""
    values = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float()
    scale = values.abs().amax(-1, keepdim=True) / 448
    back = ((values / scale).to(torch.float8_e4m3fn).float() * scale).to(torch.bfloat16)
    return back.view(torch.int16).numpy().view(np.uint16)


def computed(engine: Engine) -> tuple[Answer, np.ndarray]:
    """The prompt's answer without a cache, and what a hit must bring; its blocks are in every tier then."""
    wait_until_up(engine)
    cold = engine.ask(PROMPT)
    assert cold.external_tokens == 0
    wanted = rounded(held(engine, cold))
    assert not (wanted == held(engine, cold)).all()
    for what in ("ssd_written_blocks", "remote_written_blocks"):
        wait_for(what, engine, BLOCKS)
    return cold, wanted


def wait_for(what: str, engine: Engine, blocks: int) -> None:
    deadline = time.monotonic() + TIERS_S
    while getattr(engine.manager.counters(), what) < blocks:
        assert time.monotonic() < deadline, engine.manager.counters()
        time.sleep(0.02)


def wait_until_up(engine: Engine) -> None:
    deadline = time.monotonic() + TIERS_S
    while engine.manager._remote is not None and engine.manager._remote.pid < 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_hits_bring_rounded_values_and_exact_engines_find_none(llama: Path, tmp_path: Path) -> None:
    """Two engines over the same directories and the same store."""
    with Engine(llama, {"store_dtype": "fp8", **tiers(tmp_path)}, BF16) as engine:
        cold, wanted = computed(engine)
        engine.reset()
        hit = engine.ask(PROMPT)
        assert hit.external_tokens == BLOCKS * BLOCK_TOKENS
        assert (held(engine, hit) == wanted).all()
        slot_bytes = engine.manager.layout.slot_bytes
        engine.check_integrity()

    with Engine(llama, tiers(tmp_path), BF16) as engine:
        wait_until_up(engine)
        exact = engine.ask(PROMPT)
        assert exact.external_tokens == 0, "an exact engine read rounded bytes"
        assert exact.token_ids == cold.token_ids
        right = held(engine, exact)
        engine.reset()
        again = engine.ask(PROMPT)
        assert again.external_tokens == BLOCKS * BLOCK_TOKENS
        assert (held(engine, again) == right).all()
        assert slot_bytes < 0.6 * engine.manager.layout.slot_bytes


@pytest.mark.extended
def test_every_tier_brings_rounded_values(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the SSD after a restart, from host memory layer by layer, and from the store alone."""
    layerwise: list[int] = []
    scatter_layers = QuantisingCpuCopier.scatter_layers

    def watched(copier, op, after, on_layer):  # type: ignore[no-untyped-def]
        layerwise.append(op.op_id)
        scatter_layers(copier, op, after, on_layer)

    monkeypatch.setattr(QuantisingCpuCopier, "scatter_layers", watched)
    with Engine(llama, {"store_dtype": "fp8", **tiers(tmp_path)}, BF16) as engine:
        _, wanted = computed(engine)

    settings = {"store_dtype": "fp8", "layerwise_bytes_max": "1GiB", **tiers(tmp_path)}
    with Engine(llama, settings, {**BF16, "async_scheduling": False}) as engine:
        wait_until_up(engine)
        from_ssd = engine.ask(PROMPT)
        assert from_ssd.external_tokens == BLOCKS * BLOCK_TOKENS
        assert (held(engine, from_ssd) == wanted).all()
        assert engine.manager.counters().ssd_read_blocks == BLOCKS
        engine.reset()
        by_layers = engine.ask(PROMPT)
        assert by_layers.external_tokens == BLOCKS * BLOCK_TOKENS
        assert layerwise
        assert (held(engine, by_layers) == wanted).all()
        assert by_layers.token_ids == from_ssd.token_ids

    alone = {name: value for name, value in tiers(tmp_path).items() if not name.startswith("ssd")}
    with Engine(llama, {"store_dtype": "fp8", **alone}, BF16) as engine:
        wait_until_up(engine)
        from_store = engine.ask(PROMPT)
        assert from_store.external_tokens == BLOCKS * BLOCK_TOKENS
        assert (held(engine, from_store) == wanted).all()
        assert engine.manager.counters().remote_read_blocks == BLOCKS


def test_an_engine_in_float32_is_refused(llama: Path) -> None:
    with pytest.raises(Exception, match=r"store_dtype = fp8: .* has dtype float32; only bfloat16"):
        Engine(llama, {"store_dtype": "fp8", "host_bytes": "64MiB"}).__enter__()
