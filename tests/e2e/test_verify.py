"""Shadow verification on a real engine: silent on what is right, and an alarm for wrong bytes whose checksum is right."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv_core import native
from flexkv_core.types import KEY_BYTES
from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, prompt_tokens
from tests.e2e.test_ssd import SLOT_BYTES, written

PROMPT = prompt_tokens(2000, 10 * BLOCK_TOKENS + 5)
OTHER = prompt_tokens(2001, 10 * BLOCK_TOKENS + 5)
ALL = {"verify_sample": 1.0, "host_bytes": "128MiB"}


@pytest.fixture(scope="module")
def engine(llama: Path) -> Iterator[Engine]:
    with Engine(llama, ALL) as running:
        yield running


def host_slots(engine: Engine, prompt: list[int]) -> tuple[bytes, np.ndarray]:
    """Keys and host slots of the prompt's full blocks, as the index knows them."""
    side = engine.connector._scheduler
    from flexkv_core.keys import KeyChain, namespace_root

    count = len(prompt) // BLOCK_TOKENS
    chain = KeyChain(namespace_root(side.manager.root, ()), BLOCK_TOKENS)
    chain.extend(prompt, len(prompt))
    plan = side.manager._cache.plan_get(chain.keys(count))
    side.manager._cache.finish_get(plan)
    return chain.keys(count), plan.host_slots


def slot_bytes(engine: Engine, slot: int) -> np.ndarray:
    import ctypes

    host = engine.manager.host
    address = host.address + int(slot) * host.layout.slot_bytes
    return np.ctypeslib.as_array((ctypes.c_uint8 * host.layout.shard_bytes).from_address(address))


def overwrite(engine: Engine, block: int, wrong: np.ndarray, prompt: list[int]) -> int:
    """Other bytes in the slot of a block, and the checksum that goes with them: what no checksum can find."""
    keys, slots = host_slots(engine, prompt)
    host, slot = engine.manager.host, slots[block : block + 1]
    slot_bytes(engine, int(slot[0]))[:] = wrong
    found = np.zeros(1, np.uint32)
    key = keys[KEY_BYTES * block : KEY_BYTES * (block + 1)]
    native.crc32c_slots(
        host.address, host.layout.slot_bytes, 0, host.layout.shard_bytes, slot.astype(np.int32), key, found
    )
    host.checksums[slot, 0] = found
    return int(slot[0])


def assert_same(answer: Answer, wanted: Answer) -> None:
    assert answer.token_ids == wanted.token_ids
    assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND


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


def wrong_bytes(engine: Engine, kind: str) -> np.ndarray:
    right = slot_bytes(engine, int(host_slots(engine, PROMPT)[1][4])).copy()
    if kind == "zeros":
        return np.zeros_like(right)
    if kind == "block of the same prompt":
        return slot_bytes(engine, int(host_slots(engine, PROMPT)[1][5])).copy()
    other = slot_bytes(engine, int(host_slots(engine, OTHER)[1][4])).copy()
    if kind == "block of another prompt":
        return other
    if kind == "layers swapped":
        return np.roll(right, len(right) // 2)
    values = right.view(np.float32).reshape(2, 2, 2, -1)  # layers, heads, K and V
    if kind == "nan":
        values[1, 1, 1, 77] = np.nan
    else:  # V of one token in one head and layer
        values[1, 0, 1, 64 * 7 : 64 * 8] = other.view(np.float32).reshape(2, 2, 2, -1)[1, 0, 1, 64 * 7 : 64 * 8]
    return right


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_block_with_a_right_checksum(
    engine: Engine, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine.reset(external=True)
    expected = engine.ask(PROMPT, tokens=12)
    engine.ask(OTHER)
    engine.reset()
    slot = overwrite(engine, 4, wrong_bytes(engine, kind), PROMPT)
    before = counted(engine)
    with caplog.at_level(logging.ERROR, "flexkv_vllm"):
        assert_same(engine.ask(PROMPT, tokens=12), expected)
    assert grew(engine, before) == (10, 1, 0)
    (record,) = caplog.records
    key = host_slots(engine, PROMPT)[0][KEY_BYTES * 4 : KEY_BYTES * 5].hex()
    for word in ("block 4", "request-", "HOST", key):
        assert word in record.getMessage()
    engine.check_integrity()
    engine.reset()
    before = counted(engine)
    assert_same(engine.ask(PROMPT, tokens=12), expected)
    assert grew(engine, before) == (10, 0, 0), "the right block was stored in the place of the wrong one"
    assert slot not in host_slots(engine, PROMPT)[1], "its slot is in quarantine"


def test_wrong_block_goes_from_the_ssd_as_well(llama: Path, tmp_path: Path) -> None:
    """Written wrong, with a right checksum: found after a restart, when only the SSD has it, and gone after the next."""
    ssd = {
        "ssd_dirs": [str(tmp_path)],
        "ssd_bytes": "64MiB",
        "host_bytes": (2 << 20) + 200 * (SLOT_BYTES + 16),
    }
    with Engine(llama, ssd) as engine:
        expected = engine.ask(PROMPT)
        written(engine, 10)
    (data,) = tmp_path.glob("flexkv-*/data")
    with Engine(llama, ssd) as engine:
        engine.ask(PROMPT)
        zeros = np.zeros(SLOT_BYTES, np.uint8)
        overwrite(engine, 4, zeros, PROMPT)
        engine.manager._cache  # noqa: B018
    with Engine(llama, {**ssd, "verify_sample": 1.0}) as engine:
        assert_same(engine.ask(PROMPT), expected)
        assert counted(engine) == (10, 0, 0)
        assert engine.manager.counters().ssd_read_blocks == 10
        engine.check_integrity()
    assert data.exists()
