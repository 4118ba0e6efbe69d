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
from flexkv_core.transfer.plan import TransferOp
from flexkv_core.types import KEY_BYTES, Tier
from flexkv_kernels.copier import CpuCopier
from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, prompt_tokens
from tests.e2e.test_ssd import config as ssd_config
from tests.e2e.test_ssd import written

PROMPT = prompt_tokens(2000, 10 * BLOCK_TOKENS + 5)
OTHER = prompt_tokens(2001, 10 * BLOCK_TOKENS + 5)
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
    expected = engine.ask(PROMPT, tokens=12)
    engine.ask(OTHER)
    engine.reset()
    wrong = wrong_bytes(engine, kind)
    keys, slots = host_slots(engine, PROMPT)
    set_slot(engine.manager.host, slots[4:5], keys[KEY_BYTES * 4 : KEY_BYTES * 5], wrong)
    before = counted(engine)
    with caplog.at_level(logging.ERROR, "flexkv_vllm"):
        assert_same(engine.ask(PROMPT, tokens=12), expected)
    assert grew(engine, before) == (10, 1, 0)
    (record,) = caplog.records
    for word in ("block 4 ", "request-", "tier HOST", keys[KEY_BYTES * 4 : KEY_BYTES * 5].hex()):
        assert word in record.getMessage()
    engine.check_integrity()
    engine.reset()
    before = counted(engine)
    assert_same(engine.ask(PROMPT, tokens=12), expected)
    assert grew(engine, before) == (10, 0, 0), "the right block was stored in the place of the wrong one"
    assert slots[4] not in host_slots(engine, PROMPT)[1], "its slot is in quarantine"


def poisoned(gather: Any, block: int) -> Any:
    """Stores zeros in the place of a prompt's block, with the checksum of zeros: from there on no tier knows better."""

    def gathering(copier: CpuCopier, op: TransferOp, after: object) -> None:
        gather(copier, op, after)
        if len(op.slots) > block:
            set_slot(copier._host, op.slots[block : block + 1], op.keys[16 * block : 16 * block + 16], 0)

    return gathering


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.SSD], ids=["host", "ssd"])
def test_wrong_block_goes_from_the_ssd_as_well(
    llama: Path, tmp_path: Path, tier: Tier, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written wrong, with a right checksum: found in host memory, or after a restart where only the SSD has it; gone after the next."""
    ssd = {**ssd_config(tmp_path), "verify_sample": 1.0}
    with Engine(llama, ssd) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(CpuCopier, "gather", poisoned(CpuCopier.gather, 4))
            expected = engine.ask(PROMPT, tokens=12)
        written(engine, 10)
        if tier is Tier.HOST:
            alarm(engine, tier, expected, caplog)
    if tier is Tier.SSD:
        with Engine(llama, ssd) as engine:
            alarm(engine, tier, expected, caplog)
    with Engine(llama, {**ssd, "verify_sample": 0}) as engine:
        again = engine.ask(PROMPT, tokens=12)
        assert again.external_tokens == 10 * BLOCK_TOKENS, (
            "the right block was written in the place of the wrong one"
        )
        assert_same(again, expected)


def alarm(engine: Engine, tier: Tier, expected: Answer, caplog: pytest.LogCaptureFixture) -> None:
    """The prompt is asked once more; block 4 is found to be wrong in ``tier``, and stored anew."""
    engine.reset()
    stored, on_ssd = engine.manager.counters().stored_blocks, engine.manager.counters().ssd_written_blocks
    with caplog.at_level(logging.ERROR, "flexkv_vllm"):
        assert_same(engine.ask(PROMPT, tokens=12), expected)
    assert counted(engine) == (10, 1, 0)
    (record,) = caplog.records
    assert "block 4 " in record.getMessage()
    assert f"tier {tier.name}" in record.getMessage()
    anew = engine.manager.counters().stored_blocks - stored
    assert anew == 6, "the block and those that follow it"
    written(engine, on_ssd + anew)
    engine.check_integrity()


def test_off_by_default(llama: Path) -> None:
    with Engine(llama, {"host_bytes": "128MiB"}) as engine:
        engine.ask(PROMPT)
        engine.reset()
        assert engine.ask(PROMPT).external_tokens == 10 * BLOCK_TOKENS
        assert counted(engine) == (0, 0, 0)


def test_a_share_is_verified_and_the_rest_loaded(llama: Path) -> None:
    prompts = [prompt_tokens(2100 + i, 3 * BLOCK_TOKENS + 5) for i in range(12)]
    with Engine(llama, {"host_bytes": "128MiB", "verify_sample": 0.5}) as engine:
        expected = [engine.ask(prompt) for prompt in prompts]
        engine.reset()
        answers = [engine.ask(prompt) for prompt in prompts]
        loaded = sum(answer.external_tokens for answer in answers) // BLOCK_TOKENS
        checked, *others = counted(engine)
        assert (loaded + checked, others) == (3 * len(prompts), [0, 0])
        assert loaded > 0
        assert checked > 0
        for answer, wanted in zip(answers, expected, strict=True):
            assert_same(answer, wanted)


def test_bfloat16_raises_no_alarm(llama: Path) -> None:
    with Engine(llama, ALL, {"dtype": "bfloat16"}) as engine:
        prompts = [prompt_tokens(2200 + i, 300 + 211 * i) for i in range(6)]
        for prompt in prompts:
            engine.ask(prompt)
        engine.reset()
        engine.ask_all(prompts)
        checked, *others = counted(engine)
        assert (checked, others) == (sum((len(prompt) - 1) // BLOCK_TOKENS for prompt in prompts), [0, 0])
