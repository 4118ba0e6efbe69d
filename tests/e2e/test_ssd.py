"""The SSD tier under a real engine: warm after a restart, larger than host memory, right after damage."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, prompt_tokens

SLOT_BYTES = 2 * 65536  # two layers of the tiny Llama, 64 tokens each
PROMPTS = [prompt_tokens(800 + i, 10 * BLOCK_TOKENS + 5) for i in range(6)]


def config(directory: Path, host_slots: int = 200) -> dict[str, object]:
    return {
        "ssd_dirs": [str(directory)],
        "ssd_bytes": "64MiB",
        "host_bytes": (2 << 20) + host_slots * (SLOT_BYTES + 16),
    }


@pytest.fixture(scope="module")
def expected(llama: Path) -> Iterator[list[Answer]]:
    with Engine(llama, with_flexkv=False) as engine:
        yield [engine.ask(prompt) for prompt in PROMPTS]


def assert_same(answer: Answer, wanted: Answer) -> None:
    assert answer.token_ids == wanted.token_ids
    assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND


def written(engine: Engine, blocks: int) -> None:
    """Wait until so many blocks are on the SSD."""
    deadline = time.monotonic() + 30
    while engine.manager.counters().ssd_written_blocks < blocks:
        assert time.monotonic() < deadline, engine.manager.counters()
        time.sleep(0.02)


@pytest.mark.hit
def test_restart_finds_everything(llama: Path, expected: list[Answer], tmp_path: Path) -> None:
    with Engine(llama, config(tmp_path)) as engine:
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            assert_same(engine.ask(prompt), wanted)
        written(engine, 10 * len(PROMPTS))
    with Engine(llama, config(tmp_path)) as engine:
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            answer = engine.ask(prompt)
            assert answer.external_tokens == 10 * BLOCK_TOKENS
            assert_same(answer, wanted)
        assert engine.manager.counters().ssd_read_blocks == 10 * len(PROMPTS)
        engine.check_integrity()
        engine.reset()
        for answer, wanted in zip(engine.ask_all(PROMPTS), expected, strict=True):
            assert_same(answer, wanted)
        engine.reset(external=True)
        assert engine.ask(PROMPTS[0]).external_tokens == 0


@pytest.mark.hit
def test_ssd_holds_what_host_memory_has_no_room_for(
    llama: Path, expected: list[Answer], tmp_path: Path
) -> None:
    with Engine(llama, config(tmp_path, host_slots=24)) as engine:
        for prompt in PROMPTS:
            engine.ask(prompt)
            written(engine, engine.manager.counters().stored_blocks)
        for _ in range(2):
            engine.reset()
            for prompt, wanted in zip(PROMPTS, expected, strict=True):
                answer = engine.ask(prompt)
                assert answer.external_tokens == 10 * BLOCK_TOKENS
                assert_same(answer, wanted)
        engine.reset()
        for answer, wanted in zip(engine.ask_all(PROMPTS), expected, strict=True):
            assert_same(answer, wanted)  # six loads at once want more host memory than there is
        engine.check_integrity()


def test_damage_on_the_media_is_recomputed(llama: Path, expected: list[Answer], tmp_path: Path) -> None:
    with Engine(llama, config(tmp_path)) as engine:
        for prompt in PROMPTS:
            engine.ask(prompt)
        written(engine, 10 * len(PROMPTS))
    (data,) = tmp_path.glob("flexkv-*/data")
    generator = np.random.default_rng(0)
    with data.open("r+b") as file:
        for offset in generator.integers(0, 60 * SLOT_BYTES, 40):
            file.seek(int(offset))
            byte = file.read(1)[0]
            file.seek(int(offset))
            file.write(bytes([byte ^ 0x10]))
    with Engine(llama, config(tmp_path)) as engine:
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            assert_same(engine.ask(prompt), wanted)
        assert engine.manager.counters().ssd_corrupt_blocks > 0
        engine.check_integrity()


def test_death_of_the_storage_process_costs_misses_only(
    llama: Path, expected: list[Answer], tmp_path: Path
) -> None:
    with Engine(llama, config(tmp_path, host_slots=24)) as engine:
        for prompt in PROMPTS:
            engine.ask(prompt)
            written(engine, engine.manager.counters().stored_blocks)
        for _ in range(3):
            pid = engine.manager._ssd.pid
            if pid > 0:
                os.kill(pid, signal.SIGKILL)
            engine.reset()
            for prompt, wanted in zip(PROMPTS, expected, strict=True):
                assert_same(engine.ask(prompt), wanted)
        deadline = time.monotonic() + 20
        while engine.manager._ssd.pid < 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        engine.reset()
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            assert_same(engine.ask(prompt), wanted)
        assert engine.manager.counters().ssd_restarts >= 1
        engine.check_integrity()
