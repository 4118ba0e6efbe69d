"""The demo's measurement: each question is recomputed once, then asked in turns with and without the engine's own cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from flexkv_core.cli.harness.client import Completion, VllmClient
from flexkv_core.cli.harness.document import Document, make_document, prompt_text

ANSWER_TOKENS = 24
_PROMPT_TOKENS = 3300
_SPARE_TOKENS = 100  # documents of as many entries differ by a few tokens
_EXTERNAL_HITS = ("vllm:external_prefix_cache_hits_total", "vllm:flexkv_hit_tokens_total")
"""What vLLM says it took from a connector, and what FlexKV says it gave; the smaller growth counts."""
_WARM_UP_SEED = 1
_DOCUMENT_SEED = 2
_SETTLE_ROUNDS = 1
"""Turns of the warm-up prompt, so that no one-time cost of either path falls on a question."""


class State(Enum):
    """Where the prompt's KV cache comes from."""

    RECOMPUTE = "recomputed"
    DEVICE_HIT = "engine's own cache"
    HOST_HIT = "FlexKV, host memory"


@dataclass(frozen=True)
class Ask:
    """One question asked once. ``external_tokens`` are the tokens that the engine took from FlexKV for it."""

    question: int
    state: State
    answer: Completion
    external_tokens: int


@dataclass(frozen=True)
class Report:
    """All that was asked, and what follows from it."""

    document: Document
    asks: tuple[Ask, ...]

    def ttft_ms(self, state: State) -> float:
        """Median time to the first token in this state."""
        return statistics.median(ask.answer.ttft_ms for ask in self._of(state))

    def cached_tokens(self, state: State) -> int:
        """Median number of prompt tokens that the engine did not compute."""
        return int(statistics.median(ask.answer.cached_tokens for ask in self._of(state)))

    def external_tokens(self, state: State) -> int:
        """Median number of prompt tokens that came from FlexKV."""
        return int(statistics.median(ask.external_tokens for ask in self._of(state)))

    def identical(self, state: State) -> bool:
        """Whether every answer in this state equals the recomputed one of its question, token for token."""
        wanted = {ask.question: ask.answer.token_ids for ask in self._of(State.RECOMPUTE)}
        return all(ask.answer.token_ids == wanted[ask.question] for ask in self._of(state))

    def faults(self) -> list[str]:
        """What keeps the demo from being a success, in words; empty when it is one."""
        found = [
            f"answers differ from the recomputed ones: {s.value}" for s in State if not self.identical(s)
        ]
        if any(ask.answer.cached_tokens for ask in self._of(State.RECOMPUTE)):
            found.append("a question that should have been recomputed found tokens in a cache")
        if any(ask.external_tokens for ask in self._of(State.DEVICE_HIT)):
            found.append("a question that the engine's own cache should have served took tokens from FlexKV")
        wanted = self.cached_tokens(State.DEVICE_HIT)
        for ask in self._of(State.HOST_HIT):
            if ask.external_tokens == 0 or ask.external_tokens < wanted // 2:
                found.append(
                    f"question {ask.question + 1}: FlexKV served {ask.external_tokens} tokens of {wanted}"
                )
        if self.ttft_ms(State.HOST_HIT) >= self.ttft_ms(State.RECOMPUTE):
            found.append("a hit in host memory was not faster than recomputing")
        return found

    def _of(self, state: State) -> Iterator[Ask]:
        return (ask for ask in self.asks if ask.state is state)


def measure(client: VllmClient, questions: int, rounds: int, progress: Callable[[str], None]) -> Report:
    """Asks ``questions`` questions about one document; each hit is measured ``rounds`` times, device and host in turns.

    ``progress`` is called with a line before each question. The document is cut to fit a model with a short context.
    """
    lights = _lights_that_fit(client, questions)
    progress("warming up with another document")
    warm_up = make_document(_WARM_UP_SEED, lights, questions)
    list(_ask_in_turns(client, _prompt(client, warm_up, 0), 0, _SETTLE_ROUNDS))
    document = make_document(_DOCUMENT_SEED, lights, questions)
    asks: list[Ask] = []
    for question in range(questions):
        prompt = _prompt(client, document, question)
        progress(
            f"question {question + 1} of {questions} ({len(prompt)} tokens): {document.questions[question]}"
        )
        asks += _ask_in_turns(client, prompt, question, rounds)
    return Report(document, tuple(asks))


def _ask_in_turns(client: VllmClient, prompt: list[int], question: int, rounds: int) -> Iterator[Ask]:
    """Recomputed once with every cache empty, then ``rounds`` pairs, so that a noisy machine is noisy for both kinds of hit."""
    client.reset_prefix_cache(external=True)
    yield _ask(client, prompt, question, State.RECOMPUTE)
    for _ in range(rounds):
        yield _ask(client, prompt, question, State.DEVICE_HIT)
        client.reset_prefix_cache()
        yield _ask(client, prompt, question, State.HOST_HIT)


def _ask(client: VllmClient, prompt: list[int], question: int, state: State) -> Ask:
    before = client.metrics()
    answer = client.complete(prompt, ANSWER_TOKENS)
    after = client.metrics()
    return Ask(
        question, state, answer, int(min(after.total(name) - before.total(name) for name in _EXTERNAL_HITS))
    )


def _prompt(client: VllmClient, document: Document, question: int) -> list[int]:
    return client.tokenize(prompt_text(document, question), chat=True)


def _lights_that_fit(client: VllmClient, questions: int) -> int:
    """Entries of the register for a prompt of about 3,300 tokens, fewer if the model's context is shorter."""
    few, many = (
        len(_prompt(client, make_document(_DOCUMENT_SEED, n, questions), 0))
        for n in (questions, 3 * questions)
    )
    tokens_per_light = (many - few) / (2 * questions)
    room = min(_PROMPT_TOKENS, client.context_tokens_max - ANSWER_TOKENS - _SPARE_TOKENS)
    return max(questions, int((room - few) / tokens_per_light) + questions)
