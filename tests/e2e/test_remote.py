"""A store that two engines share: the second answers from what the first computed, and a bad store costs misses only.

The local directory stands for all stores here; what each of the others does is shown on managers, in tests/integration."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, prompt_tokens

PROMPTS = [prompt_tokens(900 + i, 10 * BLOCK_TOKENS + 5) for i in range(4)]


def config(url: str) -> dict[str, object]:
    return {
        "remote_url": url,
        "host_bytes": "64MiB",
        "remote_lookup_deadline_ms": 20_000,
        "remote_read_deadline_ms": 20_000,
    }


def assert_same(answer: Answer, wanted: Answer) -> None:
    assert answer.token_ids == wanted.token_ids
    assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND


def wait_until_up(engine: Engine) -> None:
    deadline = time.monotonic() + 30
    while engine.manager._remote.pid < 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.hit
def test_the_second_engine_answers_from_what_the_first_computed(llama: Path, tmp_path: Path) -> None:
    url = f"dir:{tmp_path}/store"
    with Engine(llama, config(url)) as engine:
        wait_until_up(engine)
        expected = [engine.ask(prompt) for prompt in PROMPTS]
        salted = engine.ask(PROMPTS[0], salt="a tenant")
        assert all(answer.external_tokens == 0 for answer in [*expected, salted])
    with Engine(llama, config(url)) as engine:  # host memory of its own: all that it finds is in the store
        wait_until_up(engine)
        for prompt, wanted in zip(PROMPTS[:2], expected, strict=False):
            answer = engine.ask(prompt)
            assert answer.external_tokens == 10 * BLOCK_TOKENS
            assert_same(answer, wanted)
        for answer, wanted in zip(engine.ask_all(PROMPTS), expected, strict=True):
            assert_same(answer, wanted)
        counters = engine.manager.counters()
        assert counters.remote_read_blocks == 10 * len(PROMPTS)
        other = engine.ask(PROMPTS[0], salt="another tenant")
        assert other.external_tokens == 0, "a tenant read what another wrote"
        assert_same(other, expected[0])
        assert engine.ask(PROMPTS[0], salt="a tenant").external_tokens == 10 * BLOCK_TOKENS
        engine.check_integrity()
        for value in (tmp_path / "store").rglob("*"):
            if value.is_file():
                value.write_bytes(value.read_bytes()[:-1] + b"\0")
        engine.reset()
        engine.manager._cache.reset()  # as in another engine; a reset by the user would look elsewhere
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            assert_same(engine.ask(prompt), wanted)
        assert engine.manager.counters().remote_corrupt_blocks > 0
        engine.check_integrity()


@pytest.mark.hit
def test_prefill_and_decode_apart(llama: Path, tmp_path: Path) -> None:
    """The producer only writes, and loads nothing even of its own; the consumer only reads, and keeps nothing of what it computes."""
    settings = config(f"dir:{tmp_path}/store")
    with Engine(llama, settings, role="kv_producer") as producer:
        wait_until_up(producer)
        first_tokens = [producer.ask(prompt, tokens=1) for prompt in PROMPTS]
        expected = [producer.ask(prompt) for prompt in PROMPTS]
        producer.reset()
        again = producer.ask(PROMPTS[0])
        assert (again.cached_tokens, again.external_tokens) == (0, 0)
        assert_same(again, expected[0])
    written = files_below(tmp_path)
    assert written
    # With nothing remembered of what the store has, an engine that uses a block offers it to the store again.
    with Engine(llama, {**settings, "remote_known_s": 0}, role="kv_consumer") as consumer:
        wait_until_up(consumer)
        for prompt, first, wanted in zip(PROMPTS, first_tokens, expected, strict=True):
            answer = consumer.ask(prompt)
            assert answer.external_tokens == 10 * BLOCK_TOKENS
            assert answer.token_ids[:1] == first.token_ids
            assert_same(answer, wanted)
        own = prompt_tokens(990, 10 * BLOCK_TOKENS + 5)
        computed = consumer.ask(own)
        consumer.reset()
        again = consumer.ask(own)
        assert (computed.external_tokens, again.external_tokens) == (0, 0)
        assert_same(again, computed)
        counters = consumer.manager.counters()
        assert counters.stored_blocks == counters.remote_written_blocks == 0
        consumer.check_integrity()
    assert files_below(tmp_path) == written


def files_below(folder: Path) -> set[Path]:
    return {file for file in folder.rglob("*") if file.is_file()}
