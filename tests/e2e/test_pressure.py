"""Too little room on the device: preemption, blocks used again at once, and requests that end at any moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, prompt_tokens

DEVICE_BLOCKS = 40


PREEMPTED = [prompt_tokens(100 + i, 480 + 20 * i) for i in range(8)]
LARGE = [prompt_tokens(200 + i, 1700) for i in range(6)]
ABORTED = prompt_tokens(300, 1100)
MANY = [prompt_tokens(400 + i, 400) for i in range(6)]
PREEMPTED_TOKENS = 140

Expected = Callable[[list[int]], Answer]


@pytest.fixture(scope="module")
def expected(llama: Path) -> Expected:
    """The answers of the same model with room for everything and without FlexKV, by prompt."""
    answers: dict[tuple[int, ...], Answer] = {}
    with Engine(llama, with_flexkv=False) as engine:
        for prompts, tokens in ((PREEMPTED, PREEMPTED_TOKENS), ([*LARGE, ABORTED, *MANY], 8)):
            answers.update(zip(map(tuple, prompts), engine.ask_all(prompts, tokens), strict=True))
    return lambda prompt: answers[tuple(prompt)]


@pytest.fixture(scope="module")
def small(llama: Path, expected: Expected) -> Iterator[Engine]:
    """40 blocks on the device; a host tier that holds everything."""
    options = {"num_gpu_blocks_override": DEVICE_BLOCKS, "max_num_batched_tokens": 512, "max_model_len": 2048}
    with Engine(llama, {"host_bytes": "256MiB"}, options) as running:
        yield running


def _assert_same(answer: Answer, wanted: Answer) -> None:
    assert answer.token_ids == wanted.token_ids
    assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND


def _assert_nothing_held(engine: Engine) -> None:
    assert engine.free_blocks() == DEVICE_BLOCKS - 1  # vLLM keeps block 0 for itself
    engine.check_integrity()


@pytest.mark.hit
def test_preempted_requests_give_the_same_answers(small: Engine, expected: Expected) -> None:
    """Eight requests of 8 to 12 blocks that each grow by two do not fit into 40 blocks."""
    small.reset(external=True)
    first = small.ask_all(PREEMPTED, PREEMPTED_TOKENS)
    assert sum(answer.preemptions for answer in first) > 0, "the test needs preemptions"
    small.reset()
    again = small.ask_all(PREEMPTED, PREEMPTED_TOKENS)
    assert sum(answer.external_tokens for answer in again) > 0
    for prompt, *answers in zip(PREEMPTED, first, again, strict=True):
        for answer in answers:
            _assert_same(answer, expected(prompt))
    _assert_nothing_held(small)


@pytest.mark.hit
def test_blocks_used_again_while_stores_run(small: Engine, expected: Expected) -> None:
    """Each prompt takes most of the device: no store may read what the next prompt wrote."""
    small.reset(external=True)
    for prompt in LARGE:
        _assert_same(small.ask(prompt), expected(prompt))
    for prompt in LARGE:
        answer = small.ask(prompt)
        assert answer.external_tokens == 1700 // BLOCK_TOKENS * BLOCK_TOKENS
        _assert_same(answer, expected(prompt))
    _assert_nothing_held(small)


@pytest.mark.parametrize("cached", ["nothing", "host"])
def test_abort_at_any_moment_leaves_nothing_behind(small: Engine, expected: Expected, cached: str) -> None:
    for steps in range(8):
        small.reset(external=True)
        if cached == "host":
            small.ask(ABORTED[:900])
            small.reset()
        request_id = small.add(ABORTED, 8)
        for _ in range(steps):
            small.step()
        small.abort(request_id)
        small.settle()
        _assert_nothing_held(small)
        small.reset()
        _assert_same(small.ask(ABORTED), expected(ABORTED))


@pytest.mark.hit
def test_abort_of_some_while_others_go_on(small: Engine, expected: Expected) -> None:
    small.reset(external=True)
    small.ask_all(MANY[:3])
    small.reset()
    ids = [small.add(prompt, 8) for prompt in MANY]
    small.step()
    for request_id in ids[::2]:
        small.abort(request_id)
    small.settle()
    _assert_nothing_held(small)
    small.reset()
    for prompt, answer in zip(MANY, small.ask_all(MANY), strict=True):
        _assert_same(answer, expected(prompt))
