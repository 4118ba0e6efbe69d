"""A hit from FlexKV is the same as a hit in the engine's own cache: tokens, log-probabilities and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.checks import Scatter, compare, hit_differences, load_zeros, patched_scatter, swap_blocks
from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Engine, prompt_tokens

CHUNK_TOKENS = 256


@pytest.fixture(scope="module")
def engine(llama: Path) -> Iterator[Engine]:
    """Prompts longer than CHUNK_TOKENS are computed in several steps."""
    with Engine(llama, {"host_bytes": "256MiB"}, {"max_num_batched_tokens": CHUNK_TOKENS}) as running:
        yield running


@pytest.mark.hit
@pytest.mark.parametrize(
    "length", [BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS - 1, 3 * BLOCK_TOKENS, 3 * BLOCK_TOKENS + 1, 1000, 3000]
)
def test_hit_equals_device_hit_at_any_length(engine: Engine, length: int) -> None:
    assert hit_differences(engine, prompt_tokens(length, length)) == set()


@pytest.mark.parametrize("length", [1, BLOCK_TOKENS - 1, BLOCK_TOKENS])
def test_prompt_without_a_whole_block_to_load_is_a_miss(engine: Engine, length: int) -> None:
    prompt = prompt_tokens(length, length)
    engine.reset(external=True)
    first = engine.ask(prompt)
    engine.reset()
    again = engine.ask(prompt)
    assert (again.cached_tokens, again.external_tokens) == (0, 0)
    assert again.token_ids == first.token_ids


@pytest.mark.parametrize(
    ("sabotage", "noticed"),
    [
        (load_zeros, {"kv bytes", "log-probabilities against a device hit"}),
        (swap_blocks, {"kv bytes"}),
    ],
)
def test_comparison_notices_wrong_bytes(
    engine: Engine, sabotage: Callable[[Scatter], Scatter], noticed: set[str]
) -> None:
    with patched_scatter(sabotage):
        assert noticed <= hit_differences(engine, prompt_tokens(7, 700))
    assert hit_differences(engine, prompt_tokens(7, 700)) == set()


@pytest.mark.hit
def test_prompt_repeated_many_times(engine: Engine) -> None:
    prompt = prompt_tokens(11, 900)
    engine.reset(external=True)
    engine.ask(prompt)
    device = engine.ask(prompt)
    for _ in range(5):
        engine.reset()
        host = engine.ask(prompt)
        assert host.external_tokens == device.cached_tokens
        assert (host.token_ids, host.logprobs) == (device.token_ids, device.logprobs)


@pytest.mark.hit
def test_shared_prefix_is_loaded_and_the_rest_computed(engine: Engine) -> None:
    shared, one, other = prompt_tokens(20, 800), prompt_tokens(21, 500), prompt_tokens(22, 450)
    engine.reset(external=True)
    cold = engine.ask([*shared, *other])
    engine.reset(external=True)
    engine.ask([*shared, *one])
    device = engine.ask([*shared, *other])
    engine.reset(external=True)
    engine.ask([*shared, *one])
    engine.reset()
    host = engine.ask([*shared, *other])
    assert compare(cold, device, host) == set()
    assert host.external_tokens == len(shared) // BLOCK_TOKENS * BLOCK_TOKENS


@pytest.mark.hit
def test_prefix_on_the_device_and_the_rest_from_flexkv(engine: Engine) -> None:
    prompt = prompt_tokens(30, 1000)
    engine.reset(external=True)
    cold = engine.ask(prompt)
    computed = engine.kv_bytes(cold.blocks[: len(prompt) // BLOCK_TOKENS])
    device = engine.ask(prompt)
    engine.reset()
    engine.ask(prompt[:400])  # FlexKV brings this part to the device, where it stays
    host = engine.ask(prompt)
    assert 0 < host.external_tokens < host.cached_tokens == device.cached_tokens
    assert (host.token_ids, host.logprobs) == (device.token_ids, device.logprobs)
    loaded = engine.kv_bytes(host.blocks[: host.cached_tokens // BLOCK_TOKENS])
    assert np.array_equal(loaded, computed[:, : loaded.shape[1]])


@pytest.mark.hit
def test_next_turn_of_a_conversation_loads_what_was_generated(engine: Engine) -> None:
    prompt = prompt_tokens(40, 500)
    engine.reset(external=True)
    turn = engine.ask(prompt, tokens=100)
    follow_up = [*prompt, *turn.token_ids, *prompt_tokens(41, 50)]
    device = engine.ask(follow_up)
    engine.reset(external=True)
    engine.ask(prompt, tokens=100)
    engine.reset()
    host = engine.ask(follow_up)
    assert host.external_tokens == device.cached_tokens >= (len(prompt) + 64) // BLOCK_TOKENS * BLOCK_TOKENS
    assert (host.token_ids, host.logprobs) == (device.token_ids, device.logprobs)


@pytest.mark.hit
def test_requests_with_a_common_prefix_at_once(engine: Engine) -> None:
    shared = prompt_tokens(50, 600)
    prompts = [[*shared, *prompt_tokens(51 + i, 130 + 40 * i)] for i in range(12)]
    engine.reset(external=True)
    alone = []
    for prompt in prompts:
        engine.reset(external=True)
        alone.append(engine.ask(prompt))
    engine.reset(external=True)
    engine.ask_all(prompts)
    engine.reset()
    for answer, wanted in zip(engine.ask_all(prompts), alone, strict=True):
        assert answer.external_tokens > 0
        assert answer.token_ids == wanted.token_ids
        assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND


def test_salts_do_not_share(engine: Engine) -> None:
    prompt = prompt_tokens(60, 700)
    engine.reset(external=True)
    ours = engine.ask(prompt, salt="ours")
    for salt in ("theirs", None):
        engine.reset()
        other = engine.ask(prompt, salt=salt)
        assert (other.cached_tokens, other.external_tokens) == (0, 0)
        assert other.token_ids == ours.token_ids
    engine.reset()
    assert engine.ask(prompt, salt="ours").external_tokens > 0


def test_reset_with_the_connector_forgets_and_without_it_does_not(engine: Engine) -> None:
    prompt = prompt_tokens(70, 700)
    engine.reset(external=True)
    first = engine.ask(prompt)
    engine.reset()
    assert engine.ask(prompt).external_tokens > 0
    engine.reset(external=True)
    forgotten = engine.ask(prompt)
    assert (forgotten.cached_tokens, forgotten.external_tokens) == (0, 0)
    assert forgotten.token_ids == first.token_ids
