"""Models whose layers keep their KV in several groups: sliding windows beside full attention, under vLLM's hybrid manager.

A window of 256 tokens, chunks of 256: a prompt of 1,000 tokens leaves the window in every layer that has one while it is computed. Every store is
layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from flexkv_core.errors import TransferError
from flexkv_core.transfer.plan import TransferOp
from flexkv_kernels.copier import CpuCopier
from tests.e2e.checks import Scatter, hit_differences, patched_scatter
from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, prompt_tokens

WINDOW = 256
DEVICE_BLOCKS = 110
"""For both groups: enough for any test's requests but those that are to be preempted."""
OPTIONS = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": DEVICE_BLOCKS}
PREEMPTED = [prompt_tokens(700 + i, 480 + 20 * i) for i in range(8)]
PREEMPTED_TOKENS = 180


@pytest.fixture(scope="module")
def hybrid(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("hybrid")


@pytest.fixture(scope="module")
def engine(hybrid: Path) -> Iterator[Engine]:
    config = {"host_bytes": "256MiB", "layerwise_store_bytes_min": 1}
    with Engine(hybrid, config, OPTIONS) as running:
        kinds = sorted(type(group.kv_cache_spec).__name__ for group in running.groups)
        assert kinds == ["FullAttentionSpec", "SlidingWindowSpec"], "vLLM's hybrid manager is on"
        yield running


def _assert_same(answer: Answer, wanted: Answer) -> None:
    assert answer.token_ids == wanted.token_ids
    assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND


@pytest.mark.hit
@pytest.mark.parametrize("length", [BLOCK_TOKENS + 1, WINDOW, WINDOW + 1, 1000, 3000])
def test_hit_equals_device_hit_at_any_length(engine: Engine, length: int) -> None:
    assert hit_differences(engine, prompt_tokens(length, length)) == set()


def test_load_leaves_out_what_has_left_the_window(engine: Engine) -> None:
    prompt = prompt_tokens(1, 1601)
    engine.reset(external=True)
    engine.ask(prompt)
    engine.reset()
    loaded: list[npt.NDArray[np.int64]] = []

    def watched(scatter: Scatter) -> Scatter:
        def copy(copier: CpuCopier, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
            loaded.append(op.blocks.reshape(len(op.slots), -1))
            return scatter(copier, op, after, verify)

        return copy

    with patched_scatter(watched):
        assert engine.ask(prompt).external_tokens == 1600
    parts = (np.concatenate(loaded) >= 0).sum(axis=0)
    assert sorted(parts) == [WINDOW // BLOCK_TOKENS, 1600 // BLOCK_TOKENS]


@pytest.mark.hit
def test_window_on_the_device_and_the_rest_from_flexkv(engine: Engine) -> None:
    """What the device has of each group stays; with a hit behind its window nothing of it is needed."""
    for held in (320, 1000):
        prompt = prompt_tokens(30 + held, 1100)
        engine.reset(external=True)
        cold = engine.ask(prompt)
        engine.reset()
        engine.ask(prompt[:held])
        host = engine.ask(prompt)
        assert 0 < host.external_tokens < host.cached_tokens == 1088
        _assert_same(host, cold)
        computed = engine.held_bytes(cold, 1088)
        assert all(computed[place] == data for place, data in engine.held_bytes(host, 1088).items())


@pytest.mark.hit
def test_next_turn_loads_what_was_generated(engine: Engine) -> None:
    """More is generated than the window holds: each block is stored before it leaves."""
    prompt = prompt_tokens(40, 500)
    engine.reset(external=True)
    turn = engine.ask(prompt, tokens=330)
    follow_up = [*prompt, *turn.token_ids, *prompt_tokens(41, 50)]
    engine.reset()
    host = engine.ask(follow_up)
    assert host.external_tokens == 768, "829 tokens have been computed"
    engine.reset(external=True)
    _assert_same(host, engine.ask(follow_up))


@pytest.mark.hit
def test_requests_with_a_common_prefix_at_once(engine: Engine) -> None:
    shared = prompt_tokens(50, 600)
    prompts = [[*shared, *prompt_tokens(51 + i, 130 + 140 * i)] for i in range(6)]
    alone = []
    for prompt in prompts:
        engine.reset(external=True)
        alone.append(engine.ask(prompt))
    engine.reset(external=True)
    engine.ask_all(prompts)
    engine.reset()
    for answer, wanted in zip(engine.ask_all(prompts), alone, strict=True):
        assert answer.external_tokens > 0
        _assert_same(answer, wanted)


@pytest.mark.hit
def test_preempted_requests_give_the_same_answers(engine: Engine) -> None:
    """What they lose is another's at once, in both groups; two at a time they are not preempted."""
    expected: list[Answer] = []
    for first in range(0, len(PREEMPTED), 2):
        engine.reset(external=True)
        expected += engine.ask_all(PREEMPTED[first : first + 2], PREEMPTED_TOKENS)
    assert not any(answer.preemptions for answer in expected)
    engine.reset(external=True)
    cold = engine.ask_all(PREEMPTED, PREEMPTED_TOKENS)
    assert any(answer.preemptions for answer in cold), "the test needs preemptions"
    engine.reset()
    hits = engine.ask_all(PREEMPTED, PREEMPTED_TOKENS)
    assert any(answer.preemptions for answer in hits)
    assert sum(answer.external_tokens for answer in hits) > 0
    for wanted, *answers in zip(expected, cold, hits, strict=True):
        for answer in answers:
            _assert_same(answer, wanted)
    assert engine.free_blocks() == DEVICE_BLOCKS - 1  # vLLM keeps block 0 for itself
    engine.check_integrity()


def test_prefix_of_which_the_window_is_gone_is_not_stored(engine: Engine) -> None:
    """FlexKV has nothing, the device the end of the prefix: its beginning cannot be stored, and nothing is that would follow it."""
    prompt = prompt_tokens(60, 1000)
    engine.reset(external=True)
    wanted = engine.ask(prompt)
    engine.manager.reset()
    again = engine.ask([*prompt, *prompt_tokens(61, 300)])
    assert again.cached_tokens == 960
    assert engine.manager.usage()[0] == 0, "no room was taken for what cannot be stored"
    engine.reset()
    _assert_same(engine.ask(prompt), wanted)


def _fail_once(scatter: Scatter) -> Scatter:
    failures = iter([TransferError("injected: the copy failed")])

    def failing(copier: CpuCopier, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        for failure in failures:
            raise failure
        return scatter(copier, op, after, verify)

    return failing


def _corrupt_sixth(scatter: Scatter) -> Scatter:
    turns = iter([5])

    def corrupting(copier: CpuCopier, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        for turn in turns:
            copier._host.checksums[op.slots[turn], 0] ^= 1
        return scatter(copier, op, after, verify)

    return corrupting


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("fault", [_fail_once, _corrupt_sixth])
def test_failed_load_is_recomputed(engine: Engine, fault: Callable[[Scatter], Scatter], others: int) -> None:
    prompts = [prompt_tokens(600 + i, 900) for i in range(1 + others)]
    engine.reset(external=True)
    expected = [engine.ask(prompt) for prompt in prompts]
    engine.reset()
    with patched_scatter(fault):
        answers = engine.ask_all(prompts)
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.finish_reason == "length"
        _assert_same(answer, wanted)
    engine.check_integrity()
    engine.reset()
    for answer, wanted in zip(engine.ask_all(prompts), expected, strict=True):
        assert answer.external_tokens > 0, "the prompt is cached again after the failure"
        _assert_same(answer, wanted)
