"""Shadow verification with engines of their own: the SSD's copy, shares below one, another dtype, off."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from flexkv_core.transfer.plan import TransferOp
from flexkv_core.types import KEY_BYTES, Tier
from flexkv_kernels.copier import CpuCopier
from tests.e2e.engine import BLOCK_TOKENS, Answer, Engine, prompt_tokens
from tests.e2e.test_ssd import config as ssd_config
from tests.e2e.test_ssd import written
from tests.e2e.test_verify import ALL, PROMPT, TOKENS, assert_same, counted, errors, set_slot


def poisoned(gather: Any, block: int) -> Any:
    """Stores zeros in the place of a prompt's block, with the checksum of zeros: from there on no tier knows better."""

    def gathering(copier: CpuCopier, op: TransferOp, after: object) -> None:
        gather(copier, op, after)
        if len(op.slots) > block:
            set_slot(
                copier._host,
                op.slots[block : block + 1],
                op.keys[KEY_BYTES * block : KEY_BYTES * (block + 1)],
                0,
            )

    return gathering


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.SSD], ids=["host", "ssd"])
def test_wrong_block_goes_from_the_ssd_as_well(
    llama: Path, tmp_path: Path, tier: Tier, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written wrong, with a right checksum: found in host memory, or after a restart where only the SSD has it; gone after the next."""
    ssd = {**ssd_config(tmp_path), "verify_sample": 1.0}
    with Engine(llama, ssd) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(CpuCopier, "gather", poisoned(CpuCopier.gather, 4))
            expected = engine.ask(PROMPT, TOKENS)
        written(engine, 10)
        if tier is Tier.HOST:
            alarm(engine, tier, expected, caplog)
    if tier is Tier.SSD:
        with Engine(llama, ssd) as engine:
            alarm(engine, tier, expected, caplog)
    with Engine(llama, {**ssd, "verify_sample": 0}) as engine:
        again = engine.ask(PROMPT, TOKENS)
        assert again.external_tokens == 10 * BLOCK_TOKENS, (
            "the right block was written in the place of the wrong one"
        )
        assert_same(again, expected)


def alarm(engine: Engine, tier: Tier, expected: Answer, caplog: pytest.LogCaptureFixture) -> None:
    """The prompt is asked once more; block 4 is found to be wrong in ``tier``, and stored anew."""
    engine.reset()
    stored, on_ssd = engine.manager.counters().stored_blocks, engine.manager.counters().ssd_written_blocks
    with caplog.at_level(logging.ERROR, "flexkv_vllm"):
        assert_same(engine.ask(PROMPT, TOKENS), expected)
    assert counted(engine) == (10, 1, 0)
    (record,) = errors(caplog)
    assert "block 4 " in record.getMessage()
    assert f"tier {tier.name}" in record.getMessage()
    anew = engine.manager.counters().stored_blocks - stored
    assert anew == 6, "the block and those that follow it"
    written(engine, on_ssd + anew)
    engine.check_integrity()


def test_off_by_default(llama: Path) -> None:
    with Engine(llama, {"host_bytes": "128MiB"}) as engine:
        engine.ask(PROMPT)
        engine.reset()
        assert engine.ask(PROMPT).external_tokens == 10 * BLOCK_TOKENS
        assert counted(engine) == (0, 0, 0)


def test_a_share_is_verified_and_the_rest_loaded(llama: Path) -> None:
    prompts = [prompt_tokens(2100 + i, 3 * BLOCK_TOKENS + 5) for i in range(12)]
    with Engine(llama, {"host_bytes": "128MiB", "verify_sample": 0.5}) as engine:
        expected = [engine.ask(prompt) for prompt in prompts]
        engine.reset()
        answers = [engine.ask(prompt) for prompt in prompts]
        loaded = sum(answer.external_tokens for answer in answers) // BLOCK_TOKENS
        checked, *others = counted(engine)
        assert (loaded + checked, others) == (3 * len(prompts), [0, 0])
        assert loaded > 0
        assert checked > 0
        for answer, wanted in zip(answers, expected, strict=True):
            assert_same(answer, wanted)


def test_bfloat16_raises_no_alarm(llama: Path) -> None:
    with Engine(llama, ALL, {"dtype": "bfloat16"}) as engine:
        prompts = [prompt_tokens(2200 + i, 300 + 211 * i) for i in range(6)]
        for prompt in prompts:
            engine.ask(prompt)
        engine.reset()
        engine.ask_all(prompts)
        checked, *others = counted(engine)
        assert (checked, others) == (sum((len(prompt) - 1) // BLOCK_TOKENS for prompt in prompts), [0, 0])
