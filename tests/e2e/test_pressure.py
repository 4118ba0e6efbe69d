"""Too little room: preemption, a small host tier, and requests that end at any moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, prompt_tokens

DEVICE_BLOCKS = 40
SLOT_BYTES = 2 * 65536  # two layers of the tiny Llama, 64 tokens each
HOST_SLOTS = 32


@pytest.fixture(scope="module")
def small(llama: Path) -> Iterator[Engine]:
    """40 blocks on the device; a host tier that holds everything."""
    options = {"num_gpu_blocks_override": DEVICE_BLOCKS, "max_num_batched_tokens": 512, "max_model_len": 2048}
    with Engine(llama, {"host_bytes": "256MiB"}, options) as running:
        yield running


@pytest.fixture(scope="module")
def reference(llama: Path) -> Iterator[Engine]:
    """The same model with room for everything, without FlexKV."""
    with Engine(llama, with_flexkv=False) as running:
        yield running


def _expected(reference: Engine, prompts: list[list[int]], tokens: int) -> list[Answer]:
    answers = []
    for prompt in prompts:
        reference.reset()
        answers.append(reference.ask(prompt, tokens))
    return answers


def _assert_same(answers: list[Answer], expected: list[Answer]) -> None:
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.token_ids == wanted.token_ids
        assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND


def test_preempted_requests_give_the_same_answers(small: Engine, reference: Engine) -> None:
    """Eight requests of 8 to 12 blocks that each grow by two do not fit into 40 blocks."""
    prompts = [prompt_tokens(100 + i, 480 + 20 * i) for i in range(8)]
    expected = _expected(reference, prompts, 140)
    small.reset(external=True)
    first = small.ask_all(prompts, 140)
    assert sum(answer.preemptions for answer in first) > 0, "the test needs preemptions"
    _assert_same(first, expected)
    small.reset()
    again = small.ask_all(prompts, 140)
    assert sum(answer.external_tokens for answer in again) > 0
    _assert_same(again, expected)
    assert small.free_blocks() == DEVICE_BLOCKS - 1  # vLLM keeps block 0 for itself
    small.check_integrity()


def test_blocks_used_again_while_stores_run(small: Engine, reference: Engine) -> None:
    """Prompts one after the other, each of which takes most of the device: no store may read what the next one wrote."""
    prompts = [prompt_tokens(200 + i, 1700) for i in range(6)]
    expected = _expected(reference, prompts, 8)
    small.reset(external=True)
    _assert_same([small.ask(prompt) for prompt in prompts], expected)
    for prompt, wanted in zip(prompts, expected, strict=True):
        answer = small.ask(prompt)
        assert answer.external_tokens == 1700 // BLOCK_TOKENS * BLOCK_TOKENS
        _assert_same([answer], [wanted])
    small.check_integrity()


@pytest.mark.parametrize("cached", ["nothing", "host"])
def test_abort_at_any_moment_leaves_nothing_behind(small: Engine, reference: Engine, cached: str) -> None:
    prompt = prompt_tokens(300, 1100)
    wanted = _expected(reference, [prompt], 8)[0]
    for steps in range(8):
        small.reset(external=True)
        if cached == "host":
            small.ask(prompt[:900])
            small.reset()
        request_id = small.add(prompt, 8)
        for _ in range(steps):
            small.step()
        small.abort(request_id)
        small.settle()
        assert small.free_blocks() == DEVICE_BLOCKS - 1
        small.check_integrity()
        small.reset()
        _assert_same([small.ask(prompt)], [wanted])


def test_abort_of_some_while_others_go_on(small: Engine, reference: Engine) -> None:
    prompts = [prompt_tokens(400 + i, 400) for i in range(6)]
    expected = _expected(reference, prompts, 8)
    small.reset(external=True)
    small.ask_all(prompts[:3])
    small.reset()
    ids = [small.add(prompt, 8) for prompt in prompts]
    small.step()
    for request_id in ids[::2]:
        small.abort(request_id)
    small.settle()
    assert small.free_blocks() == DEVICE_BLOCKS - 1
    small.check_integrity()
    small.reset()
    _assert_same(small.ask_all(prompts), expected)


def test_small_host_tier_evicts_and_stays_right(llama: Path, reference: Engine) -> None:
    """Eight prompts of ten blocks go through 32 slots; a prompt of 46 blocks stores what fits."""
    prompts = [prompt_tokens(500 + i, 10 * BLOCK_TOKENS + 5) for i in range(8)]
    long_prompt = prompt_tokens(520, 46 * BLOCK_TOKENS + 5)
    expected = _expected(reference, prompts, 8)
    expected_long = _expected(reference, [long_prompt], 8)
    with Engine(llama, {"host_bytes": HOST_SLOTS * SLOT_BYTES}) as engine:
        for _ in range(3):
            for prompt, wanted in zip(prompts, expected, strict=True):
                engine.reset()
                _assert_same([engine.ask(prompt)], [wanted])
                engine.check_integrity()
        engine.reset()
        last = engine.ask(prompts[-1])
        assert last.external_tokens == 10 * BLOCK_TOKENS
        engine.reset()
        _assert_same([engine.ask(long_prompt)], expected_long)
        engine.reset()
        again = engine.ask(long_prompt)
        assert 0 < again.external_tokens <= HOST_SLOTS * BLOCK_TOKENS
        _assert_same([again], expected_long)
        engine.check_integrity()
