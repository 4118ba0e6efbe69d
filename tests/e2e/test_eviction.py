"""Too little room in the host tier: it evicts, stores what fits, and never answers wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, prompt_tokens

SLOT_BYTES = 2 * 65536  # two layers of the tiny Llama, 64 tokens each
HOST_SLOTS = 32
TEN_BLOCKS = [prompt_tokens(500 + i, 10 * BLOCK_TOKENS + 5) for i in range(8)]
LONG = prompt_tokens(520, 46 * BLOCK_TOKENS + 5)


def _assert_same(answer: Answer, wanted: Answer) -> None:
    assert answer.token_ids == wanted.token_ids
    assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND


@pytest.mark.hit
def test_small_host_tier_evicts_and_stays_right(llama: Path) -> None:
    """Eight prompts of ten blocks go through 32 slots, three times; a prompt of 46 blocks stores what fits."""
    expected = {}
    with Engine(llama, with_flexkv=False) as engine:
        for prompt in [*TEN_BLOCKS, LONG]:
            expected[tuple(prompt)] = engine.ask(prompt)
    with Engine(llama, {"host_bytes": HOST_SLOTS * SLOT_BYTES}) as engine:
        for prompt in 3 * TEN_BLOCKS:
            engine.reset()
            _assert_same(engine.ask(prompt), expected[tuple(prompt)])
            engine.check_integrity()
        assert engine.manager.counters().evicted_blocks >= 2 * len(TEN_BLOCKS) * 10 - HOST_SLOTS
        engine.reset()
        assert engine.ask(TEN_BLOCKS[-1]).external_tokens == 10 * BLOCK_TOKENS
        engine.reset()
        _assert_same(engine.ask(LONG), expected[tuple(LONG)])
        engine.reset()
        again = engine.ask(LONG)
        assert 0 < again.external_tokens <= HOST_SLOTS * BLOCK_TOKENS
        _assert_same(again, expected[tuple(LONG)])
        engine.check_integrity()
