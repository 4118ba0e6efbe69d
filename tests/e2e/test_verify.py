"""Shadow verification on a real engine: silent on what is right, and an alarm for wrong bytes whose checksum is right."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_core import native
from flexkv_core.keys import hash_tokens
from flexkv_core.storage.memory import HostSegment
from flexkv_core.types import KEY_BYTES
from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, prompt_tokens

PROMPT = prompt_tokens(2000, 10 * BLOCK_TOKENS + 5)
OTHER = prompt_tokens(2001, 10 * BLOCK_TOKENS + 5)
TOKENS = 48
"""Long enough that a finding is known before the request ends, and its blocks are stored anew; no further block fills."""
ALL = {"verify_sample": 1.0, "host_bytes": "128MiB"}


@pytest.fixture(scope="module")
def engine(llama: Path) -> Iterator[Engine]:
    with Engine(llama, ALL) as running:
        yield running


def host_slots(engine: Engine, prompt: list[int]) -> tuple[bytes, np.ndarray]:
    """Keys and host slots of the prompt's full blocks, as the index knows them."""
    keys = hash_tokens(engine.manager.root, np.array(prompt, np.int32), BLOCK_TOKENS)
    plan = engine.manager._cache.plan_get(keys)
    engine.manager._cache.finish_get(plan)
    return keys, plan.host_slots


def image(host: HostSegment, slot: int) -> np.ndarray:
    """A slot's bytes, a view."""
    address = host.address + slot * host.layout.slot_bytes
    return np.ctypeslib.as_array((ctypes.c_uint8 * host.layout.shard_bytes).from_address(address))


def set_slot(host: HostSegment, slot: np.ndarray, key: bytes, wrong: Any) -> None:
    """Other bytes in a slot (int32 [1]), and the checksum that goes with them: what no checksum can find."""
    layout = host.layout
    image(host, int(slot[0]))[:] = wrong
    found = np.zeros(1, np.uint32)
    native.crc32c_slots(host.address, layout.slot_bytes, 0, layout.shard_bytes, slot, key, found)
    host.checksums[slot, 0] = found


def assert_same(answer: Answer, wanted: Answer) -> None:
    assert answer.token_ids == wanted.token_ids
    assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


def counted(engine: Engine) -> tuple[int, int, int]:
    counters = engine.manager.counters()
    return counters.verify_checked, counters.verify_mismatches, counters.verify_skipped


def grew(engine: Engine, before: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(now - then for now, then in zip(counted(engine), before, strict=True))


def test_right_blocks_raise_no_alarm(engine: Engine) -> None:
    """Alone and in batches, with prefixes on the device: another batch shape than that which stored them."""
    prompts = [prompt_tokens(2010 + i, 300 + 211 * i) for i in range(8)]
    engine.reset(external=True)
    expected = [engine.ask(prompt) for prompt in prompts]
    before = counted(engine)
    for _ in range(2):
        engine.reset()
        answers = engine.ask_all(prompts)
        for answer, wanted in zip(answers, expected, strict=True):
            assert answer.external_tokens == 0, "a sampled hit is computed again"
            assert_same(answer, wanted)
    blocks = sum((len(prompt) - 1) // BLOCK_TOKENS for prompt in prompts)
    assert grew(engine, before) == (2 * blocks, 0, 0)
    engine.check_integrity()


WRONG = ("zeros", "block of the same prompt", "block of another prompt", "layers swapped", "one token", "nan")


def block_bytes(engine: Engine, prompt: list[int], block: int) -> np.ndarray:
    return image(engine.manager.host, int(host_slots(engine, prompt)[1][block])).copy()


def wrong_bytes(engine: Engine, kind: str) -> np.ndarray:
    right = block_bytes(engine, PROMPT, 4)
    if kind == "zeros":
        return np.zeros_like(right)
    if kind == "block of the same prompt":
        return block_bytes(engine, PROMPT, 5)
    other = block_bytes(engine, OTHER, 4)
    if kind == "block of another prompt":
        return other
    if kind == "layers swapped":
        return np.roll(right, len(right) // 2)
    values = right.view(np.float32).reshape(2, 2, 2, -1)  # layers, heads, K and V
    if kind == "nan":
        values[1, 1, 1, 77] = np.nan
    else:  # V of one token in one head and layer
        values[1, 0, 1, 64 * 7 : 64 * 8] = other.view(np.float32).reshape(2, 2, 2, -1)[
            1, 0, 1, 64 * 7 : 64 * 8
        ]
    return right


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_block_with_a_right_checksum(
    engine: Engine, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine.reset(external=True)
    expected = engine.ask(PROMPT, TOKENS)
    engine.ask(OTHER)
    engine.reset()
    wrong = wrong_bytes(engine, kind)
    keys, slots = host_slots(engine, PROMPT)
    set_slot(engine.manager.host, slots[4:5], keys[KEY_BYTES * 4 : KEY_BYTES * 5], wrong)
    before = counted(engine)
    with caplog.at_level(logging.ERROR, "flexkv_vllm"):
        assert_same(engine.ask(PROMPT, TOKENS), expected)
    assert grew(engine, before) == (10, 1, 0)
    (record,) = errors(caplog)
    for word in ("block 4 ", "request-", "tier HOST", keys[KEY_BYTES * 4 : KEY_BYTES * 5].hex()):
        assert word in record.getMessage()
    engine.check_integrity()
    engine.reset()
    before = counted(engine)
    assert_same(engine.ask(PROMPT, TOKENS), expected)
    assert grew(engine, before) == (10, 0, 0), "the right block was stored in the place of the wrong one"
    assert slots[4] not in host_slots(engine, PROMPT)[1], "its slot is in quarantine"
