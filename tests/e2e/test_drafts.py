"""Speculative decoding: the answers of an engine that guesses nothing and has no FlexKV, whoever guesses.

vLLM's proposers import numba, after which no second engine starts in a process: its scan for kernels trips over it. So each of these
engines has a process of its own, forked from one that has imported vLLM.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, prompt_tokens

PART = prompt_tokens(900, 150)
PROMPT = PART * 5
"""It repeats itself, so that n-grams are found. 750 tokens, 11 blocks and a part."""
GUESSES = 3
TARGETS = {"ngram": "llama", "draft_model": "llama", "eagle": "llama", "eagle3": "llama", "mtp": "mtp"}
LAYERS = {"ngram": 2, "draft_model": 4, "eagle": 3, "eagle3": 3, "mtp": 3}
"""With KV: those of the model and those of the drafter."""
WITHHELD = {"eagle": BLOCK_TOKENS, "eagle3": BLOCK_TOKENS, "mtp": BLOCK_TOKENS}
"""Tokens of a hit that are computed all the same."""

Expected = Callable[[str], tuple[Answer, Answer]]


@dataclass(frozen=True)
class Seen:
    """What an engine that guesses did with two turns. ``wrong_bytes``: loaded blocks that differ from what was computed, all layers
    together, those of the drafter too. ``accepted``: guesses that were right: when the first turn was computed, and when it was a hit."""

    first_turn: Answer
    second_turn: Answer
    layers: int
    wrong_bytes: list[tuple[int, int]]
    accepted: tuple[int, int]


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[[str], Path]) -> Expected:
    """A prompt's answer and that of the next turn, by model; one engine a model."""
    known: dict[str, tuple[Answer, Answer]] = {}

    def answers(kind: str) -> tuple[Answer, Answer]:
        if kind not in known:
            with Engine(tiny_model(kind), with_flexkv=False) as engine:
                first = engine.ask(PROMPT, 100)
                known[kind] = first, engine.ask(_follow_up(first), 20)
        return known[kind]

    return answers


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.e2e.engine"])
    return context


@pytest.mark.hit
@pytest.mark.parametrize(
    "method",
    [
        "ngram",
        "draft_model",
        "eagle3",
        *(pytest.param(name, marks=pytest.mark.extended) for name in ("eagle", "mtp")),
    ],
)
def test_answers_are_those_of_an_engine_that_does_not_guess(
    tiny_model: Callable[[str], Path], expected: Expected, processes: BaseContext, method: str
) -> None:
    """The second turn's prompt holds what the first one generated: guessed tokens are stored only when they are known."""
    wanted, second = expected(TARGETS[method])
    target = tiny_model(TARGETS[method])
    drafter = {"draft_model": target, "mtp": None, "ngram": None}
    speculative = {"method": method, "num_speculative_tokens": GUESSES}
    if method == "ngram":
        speculative |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    elif model := drafter.get(method, tiny_model(method) if method not in drafter else None):
        speculative["model"] = str(model)
    with ProcessPoolExecutor(1, mp_context=processes) as pool:
        seen = pool.submit(_two_turns, target, speculative, _follow_up(wanted)).result(timeout=180)
    withheld = WITHHELD.get(method, 0)
    assert seen.layers == LAYERS[method]
    assert seen.first_turn.external_tokens == 704 - withheld
    assert seen.second_turn.external_tokens >= 768 - withheld, "generated tokens are stored, too"
    for answer, right in ((seen.first_turn, wanted), (seen.second_turn, second)):
        assert answer.token_ids == right.token_ids
        assert answer.logprob_error(right) <= RECOMPUTE_BOUND
    assert seen.wrong_bytes == []
    if method == "draft_model":  # of the same weights: it guesses right, unless its own KV is wrong
        assert seen.accepted[0] > 50
        assert seen.accepted[1] == seen.accepted[0]


def _follow_up(first: Answer) -> list[int]:
    return [*PROMPT, *first.token_ids, *PART]


def _two_turns(model: Path, speculative: dict[str, object], follow_up: Sequence[int]) -> Seen:
    """Both prompts answered by an engine that guesses, each with only FlexKV to take blocks from."""
    if "SABOTAGED_LOADS" in os.environ:
        importlib.import_module("tests.e2e.sabotaged_connector")
    with Engine(model, {"host_bytes": "128MiB"}, {"speculative_config": speculative}) as engine:
        cold = engine.ask(PROMPT, 100)
        computed = engine.held_bytes(cold, len(PROMPT) + 100)
        accepted = [_accepted(engine)]
        turns = []
        wrong = []
        for prompt, tokens in ((PROMPT, 100), (follow_up, 20)):
            engine.reset()
            turns.append(engine.ask(prompt, tokens))
            accepted.append(_accepted(engine))
            loaded = engine.held_bytes(turns[-1], turns[-1].cached_tokens)
            wrong += [place for place, data in loaded.items() if data != computed[place]]
        engine.check_integrity()
        layers = len(engine.kv_tensors)
    return Seen(turns[0], turns[1], layers, wrong, (accepted[0], accepted[1] - accepted[0]))


def _accepted(engine: Engine) -> int:
    """Guesses that were right, since the start."""
    found = [
        metric for metric in engine.llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens"
    ]
    return int(found[0].value)
