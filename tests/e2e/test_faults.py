"""What goes wrong in a transfer costs a recomputation and never an answer, under the one-line configuration."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from flexkv_core.errors import TransferError
from flexkv_core.transfer.plan import TransferOp
from flexkv_kernels.copier import CpuCopier
from tests.e2e.checks import Scatter, patched_scatter
from tests.e2e.engine import RECOMPUTE_BOUND, Engine, prompt_tokens


@pytest.fixture(scope="module")
def engine(llama: Path) -> Iterator[Engine]:
    """Nothing but ``{"kv_connector":"FlexKVConnector","kv_role":"kv_both"}``."""
    with Engine(llama) as running:
        yield running


def _fail_once(scatter: Scatter) -> Scatter:
    failures = iter([TransferError("injected: the copy failed")])

    def failing(copier: CpuCopier, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        for failure in failures:
            raise failure
        return scatter(copier, op, after, verify)

    return failing


def _corrupt_slot(position: int) -> Callable[[Scatter], Scatter]:
    """Flips one bit in the slot of the load's block ``position`` before it is copied, once."""

    def replace(scatter: Scatter) -> Scatter:
        turns = iter([position])

        def corrupting(
            copier: CpuCopier, op: TransferOp, after: object, verify: bool
        ) -> npt.NDArray[np.bool_]:
            assert verify, "checksums are verified by default"
            for turn in turns:
                address = copier._host.address + int(op.slots[turn]) * copier._host.layout.slot_bytes + 4321
                byte = ctypes.c_uint8.from_address(address)
                byte.value ^= 0x10
            return scatter(copier, op, after, verify)

        return corrupting

    return replace


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize(
    "fault",
    [_fail_once, _corrupt_slot(0), _corrupt_slot(5), _corrupt_slot(-1)],
    ids=["copy fails", "first slot corrupt", "sixth slot corrupt", "last slot corrupt"],
)
def test_failed_load_is_recomputed(engine: Engine, fault: Callable[[Scatter], Scatter], others: int) -> None:
    """Alone, and while other requests load and run."""
    prompts = [prompt_tokens(600 + i, 900) for i in range(1 + others)]
    engine.reset(external=True)
    expected = [engine.ask(prompt) for prompt in prompts]
    engine.reset()
    with patched_scatter(fault):
        answers = engine.ask_all(prompts)
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.finish_reason == "length"
        assert answer.token_ids == wanted.token_ids
        assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND
    engine.check_integrity()
    engine.reset()
    for answer, wanted in zip(engine.ask_all(prompts), expected, strict=True):
        assert answer.external_tokens > 0, "the prompt is cached again after the failure"
        assert answer.token_ids == wanted.token_ids


def test_corrupt_slot_is_counted_and_dropped(engine: Engine) -> None:
    prompt = prompt_tokens(700, 900)
    engine.reset(external=True)
    wanted = engine.ask(prompt)
    before = engine.manager.counters().corrupt_blocks
    engine.reset()
    with patched_scatter(_corrupt_slot(3)):
        engine.ask(prompt)
    assert engine.manager.counters().corrupt_blocks == before + 1
    engine.reset()
    again = engine.ask(prompt)
    assert again.token_ids == wanted.token_ids
    assert again.external_tokens > 3 * engine.block_tokens, "the block was recomputed and stored again"


def test_failed_store_is_a_later_miss(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_tokens(710, 900)

    def failing(copier: CpuCopier, op: TransferOp, after: object) -> None:
        raise TransferError("injected: the copy failed")

    engine.reset(external=True)
    with monkeypatch.context() as patch:
        patch.setattr(CpuCopier, "gather", failing)
        wanted = engine.ask(prompt)
    engine.check_integrity()
    engine.reset()
    missed = engine.ask(prompt)
    assert (missed.external_tokens, missed.token_ids) == (0, wanted.token_ids)
    engine.reset()
    assert engine.ask(prompt).external_tokens > 0
