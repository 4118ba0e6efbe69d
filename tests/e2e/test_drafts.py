"""Speculative decoding with n-grams: the same answers as an engine that guesses nothing and has no FlexKV."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.engine import RECOMPUTE_BOUND, Engine, prompt_tokens

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


@pytest.mark.hit
def test_guessed_tokens_are_stored_only_when_they_are_known(llama: Path) -> None:
    """The prompt repeats itself, so that n-grams are found; the second turn's prompt holds what the first one generated."""
    part = prompt_tokens(900, 150)
    prompt = part * 5
    with Engine(llama, with_flexkv=False) as engine:
        wanted = engine.ask(prompt, 100)
        follow_up = [*prompt, *wanted.token_ids, *part]
        second = engine.ask(follow_up, 20)
    with Engine(llama, {"host_bytes": "128MiB"}, {"speculative_config": NGRAM}) as engine:
        engine.ask(prompt, 100)
        engine.reset()
        first_turn = engine.ask(prompt, 100)
        engine.reset()
        second_turn = engine.ask(follow_up, 20)
        assert first_turn.external_tokens == 704
        assert second_turn.external_tokens >= 768, "generated tokens are stored, too"
        engine.check_integrity()
    for answer, expected in ((first_turn, wanted), (second_turn, second)):
        assert answer.token_ids == expected.token_ids
        assert answer.logprob_error(expected) <= RECOMPUTE_BOUND
