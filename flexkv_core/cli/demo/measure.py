"""The demo's measurement: each question is recomputed once, then asked in turns with and without the engine's own cache; others are asked
again after the server was stopped, after it was killed, and after an engine beside ``flexkv serve`` was started again."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from flexkv_core.cli.harness.client import Completion, VllmClient
from flexkv_core.cli.harness.document import Document, make_document, prompt_text

ANSWER_TOKENS = 24
_PROMPT_TOKENS = 4000
_SPARE_TOKENS = 100  # documents of as many entries differ by a few tokens
_EXTERNAL_HITS = ("vllm:external_prefix_cache_hits_total", "vllm:flexkv_hit_tokens_total")
"""What vLLM says it took from a connector, and what FlexKV says it gave; the smaller growth counts. SGLang says it with each answer."""
_WARM_UP_SEED = 1
_DOCUMENT_SEED = 2
_OTHER_DOCUMENTS_SEED = 10
_SHARED_DOCUMENTS = 2
"""Of the third act, which has to compute them once more: its cache is a new one."""
_SETTLE_ROUNDS = 1
"""Turns of the warm-up prompt, so that no one-time cost of either path falls on a question."""


class State(Enum):
    """Where the prompt's KV cache comes from."""

    RECOMPUTE = "recomputed"
    DEVICE_HIT = "engine's own cache"
    HOST_HIT = "FlexKV, host memory"
    SSD_HIT = "FlexKV, SSD, after a restart"
    SSD_HIT_AFTER_KILL = "FlexKV, SSD, after SIGKILL"
    SHARED_HIT = "flexkv serve, host memory, after a restart"


SSD_STATES = (State.SSD_HIT, State.SSD_HIT_AFTER_KILL)


@dataclass(frozen=True)
class Ask:
    """One question asked once. ``external_tokens`` are the tokens that the engine took from FlexKV for it.

    ``question`` numbers the prompts; ``text`` is what was asked.
    """

    question: int
    text: str
    state: State
    answer: Completion
    external_tokens: int


@dataclass(frozen=True)
class Report:
    """All that was asked, and what follows from it."""

    asks: tuple[Ask, ...]

    def ttft_ms(self, *states: State) -> float:
        """Median time to the first token in these states."""
        return statistics.median(ask.answer.ttft_ms for state in states for ask in self._of(state))

    def cached_tokens(self, state: State) -> int:
        """Median number of prompt tokens that the engine did not compute."""
        return int(statistics.median(ask.answer.cached_tokens for ask in self._of(state)))

    def external_tokens(self, state: State) -> int:
        """Median number of prompt tokens that came from FlexKV."""
        return int(statistics.median(ask.external_tokens for ask in self._of(state)))

    def host_to_device_ratio(self) -> float:
        """Median over the turns of host hit / device hit; a busy moment of the machine moves it less than it moves a median time."""
        turns = zip(self._of(State.HOST_HIT), self._of(State.DEVICE_HIT), strict=True)
        return statistics.median(host.answer.ttft_ms / device.answer.ttft_ms for host, device in turns)

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
        for state in self._hit_states():
            for ask in self._of(state):
                if ask.external_tokens == 0 or ask.external_tokens < wanted // 2:
                    found.append(
                        f"question {ask.question + 1}, {state.value}: FlexKV served {ask.external_tokens} tokens"
                        f" of {wanted}"
                    )
            if self.ttft_ms(state) >= self.ttft_ms(State.RECOMPUTE):
                found.append(f"a hit was not faster than recomputing: {state.value}")
        return found

    @property
    def states(self) -> list[State]:
        """Those in which anything was asked."""
        asked = {ask.state for ask in self.asks}
        return [state for state in State if state in asked]

    def _hit_states(self) -> list[State]:
        """What was asked of FlexKV, in host memory at least."""
        asked = {State.HOST_HIT, *(ask.state for ask in self.asks)}
        return [state for state in State if state in asked - {State.RECOMPUTE, State.DEVICE_HIT}]

    def _of(self, state: State) -> Iterator[Ask]:
        return (ask for ask in self.asks if ask.state is state)


class Course:
    """What is asked, in order: :meth:`first_act` and :meth:`prepare_restart` on one server, :meth:`after_restart` on each of the next two;
    then :meth:`fill_shared` on one that uses ``flexkv serve``, and :meth:`after_engine_restart` on its successor.

    ``progress`` is called with a line before each question. The documents are cut to fit a model with a short context.
    """

    def __init__(self, questions: int, rounds: int, progress: Callable[[str], None]) -> None:
        self._questions, self._rounds, self._progress = questions, rounds, progress
        self._shared = min(questions, _SHARED_DOCUMENTS)
        self._lights = 0
        self.asks: list[Ask] = []

    @property
    def report(self) -> Report:
        """Of all that was asked so far."""
        return Report(tuple(self.asks))

    def first_act(self, client: VllmClient) -> None:
        """Several questions about one document; each hit is measured ``rounds`` times, device and host in turns."""
        self._lights = _lights_that_fit(client, self._questions)
        self._warm_up(client)
        document = self._document(_DOCUMENT_SEED)
        for question in range(self._questions):
            prompt, text = _prompt(client, document, question), document.questions[question]
            self._progress(f"question {question + 1} of {self._questions} ({len(prompt)} tokens): {text}")
            self.asks += _ask_in_turns(client, prompt, question, text, self._rounds)

    def prepare_restart(self, client: VllmClient) -> None:
        """One question about each of several documents, so that each can be found once on the SSD after a restart."""
        self._progress(f"asking about {self._questions} other documents, which go to the SSD")
        self._ask_about_others(client, State.RECOMPUTE, self._questions)

    def after_restart(self, client: VllmClient, state: State) -> None:
        """The same questions as in :meth:`prepare_restart`, to a server that has just started."""
        self._warm_up(client)
        self._ask_about_others(client, state, self._questions)

    def fill_shared(self, client: VllmClient) -> None:
        """Some of these questions once more to an engine whose cache, a server's, is empty: they are recomputed."""
        self._warm_up(client)
        self._progress(f"asking an engine that keeps its cache in flexkv serve about {self._shared} of them")
        self._ask_about_others(client, State.RECOMPUTE, self._shared)

    def after_engine_restart(self, client: VllmClient) -> None:
        """The same questions as in :meth:`fill_shared`, to an engine that has just started."""
        self._warm_up(client)
        self._ask_about_others(client, State.SHARED_HIT, self._shared)

    def _ask_about_others(self, client: VllmClient, state: State, count: int) -> None:
        for number in range(count):
            document = self._document(_OTHER_DOCUMENTS_SEED + number)
            text = f"{document.questions[number]} (document {number + 2})"
            prompt = _prompt(client, document, number)
            # A salt, because all prompts begin with the chat template, which may fill a small block.
            self.asks.append(
                _ask(client, prompt, self._questions + number, text, state, f"document {number}")
            )

    def _warm_up(self, client: VllmClient) -> None:
        self._progress("warming up with another document")
        warm_up = _prompt(client, self._document(_WARM_UP_SEED), 0)
        client.reset_prefix_cache()
        client.complete(warm_up, ANSWER_TOKENS)
        for _ in range(_SETTLE_ROUNDS):
            client.reset_prefix_cache()
            client.complete(warm_up, ANSWER_TOKENS)

    def _document(self, seed: int) -> Document:
        return make_document(seed, self._lights, self._questions)


def _ask_in_turns(
    client: VllmClient, prompt: list[int], question: int, text: str, rounds: int
) -> Iterator[Ask]:
    """Recomputed once, then ``rounds`` pairs, so that a noisy machine is noisy for both kinds of hit. A salt of its own keeps the question
    from the blocks of those before it, which share the document."""
    salt = f"question {question}"
    yield _ask(client, prompt, question, text, State.RECOMPUTE, salt)
    for _ in range(rounds):
        yield _ask(client, prompt, question, text, State.DEVICE_HIT, salt)
        client.reset_prefix_cache()
        yield _ask(client, prompt, question, text, State.HOST_HIT, salt)


def _ask(
    client: VllmClient, prompt: list[int], question: int, text: str, state: State, salt: str | None = None
) -> Ask:
    before = client.metrics()
    answer = client.complete(prompt, ANSWER_TOKENS, cache_salt=salt)
    external = answer.external_tokens
    if external is None:
        after = client.metrics()
        external = int(min(after.total(name) - before.total(name) for name in _EXTERNAL_HITS))
    return Ask(question, text, state, answer, external)


def _prompt(client: VllmClient, document: Document, question: int) -> list[int]:
    return client.tokenize(prompt_text(document, question), chat=True)


def _lights_that_fit(client: VllmClient, questions: int) -> int:
    """Entries of the register for a prompt of about 4,000 tokens, fewer if the model's context is shorter."""
    few, many = (
        len(_prompt(client, make_document(_DOCUMENT_SEED, n, questions), 0))
        for n in (questions, 3 * questions)
    )
    tokens_per_light = (many - few) / (2 * questions)
    room = min(_PROMPT_TOKENS, client.context_tokens_max - ANSWER_TOKENS - _SPARE_TOKENS)
    return max(questions, int((room - few) / tokens_per_light) + questions)
