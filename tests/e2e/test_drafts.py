"""Speculative decoding with n-grams: the same answers as an engine that guesses nothing and has no FlexKV."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.engine import RECOMPUTE_BOUND, Answer, Engine, prompt_tokens

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
    # vLLM's n-gram proposer imports numba, and after that no second engine starts in a process: its scan for kernels trips over it.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        first_turn, second_turn = pool.submit(_two_turns, llama, prompt, follow_up).result(timeout=180)
    assert first_turn.external_tokens == 704
    assert second_turn.external_tokens >= 768, "generated tokens are stored, too"
    for answer, expected in ((first_turn, wanted), (second_turn, second)):
        assert answer.token_ids == expected.token_ids
        assert answer.logprob_error(expected) <= RECOMPUTE_BOUND


def _two_turns(model: Path, prompt: Sequence[int], follow_up: Sequence[int]) -> tuple[Answer, Answer]:
    """The answers of an engine that guesses to both prompts, each with only FlexKV to take blocks from."""
    if "SABOTAGED_LOADS" in os.environ:
        importlib.import_module("tests.e2e.sabotaged_connector")
    with Engine(model, {"host_bytes": "128MiB"}, {"speculative_config": NGRAM}) as engine:
        engine.ask(prompt, 100)
        engine.reset()
        first_turn = engine.ask(prompt, 100)
        engine.reset()
        second_turn = engine.ask(follow_up, 20)
        engine.check_integrity()
    return first_turn, second_turn
