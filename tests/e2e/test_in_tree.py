"""``"kv_connector":"FlexKVConnectorV1"``, vLLM's own class, with nothing patched: the same hits and answers as the native connector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.flexkv_connector import FlexKVConnectorV1

from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl
from flexkv_core.errors import TransferError
from flexkv_core.transfer.plan import TransferOp
from flexkv_kernels.copier import CpuCopier
from tests.e2e.checks import Scatter, hit_differences, patched_scatter
from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, prompt_tokens

CONFIG = {"host_bytes": "128MiB"}
OPTIONS = {"max_num_batched_tokens": 256}
TOGETHER = 6
LENGTHS = (BLOCK_TOKENS, BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS, 700, 1500)


def same_requests(engine: Engine) -> list[Answer]:
    """What the two connectors are compared by: each length three times (computed, device hit, FlexKV hit), a shared prefix, a salt,
    the next turn of a conversation, several at once."""
    engine.reset(external=True)
    answers = []
    for length in LENGTHS:
        prompt = prompt_tokens(length, length)
        answers += [engine.ask(prompt), engine.ask(prompt)]
        engine.reset()
        answers.append(engine.ask(prompt))
    shared = prompt_tokens(20, 600)
    engine.reset(external=True)
    answers.append(engine.ask([*shared, *prompt_tokens(21, 200)], tokens=70))
    engine.reset()
    answers.append(engine.ask([*shared, *prompt_tokens(22, 300)]))
    answers.append(engine.ask([*shared, *prompt_tokens(22, 300)], salt="theirs"))
    engine.reset()
    answers.append(engine.ask([*shared, *prompt_tokens(21, 200), *answers[-3].token_ids]))
    engine.reset()
    return answers + engine.ask_all([[*shared, *prompt_tokens(30 + i, 100)] for i in range(TOGETHER)])


@pytest.fixture(scope="module")
def native_answers(llama: Path) -> list[Answer]:
    """Comes first: one engine at a time may be alive."""
    with Engine(llama, CONFIG, OPTIONS) as engine:
        return same_requests(engine)


@pytest.fixture(scope="module")
def engine(llama: Path, native_answers: list[Answer]) -> Iterator[Engine]:
    with Engine(llama, CONFIG, OPTIONS, connector_name="FlexKVConnectorV1") as running:
        yield running


def test_vllms_own_class_and_our_door_serve(engine: Engine) -> None:
    assert isinstance(engine.connector, FlexKVConnectorV1)
    assert type(engine.connector._flexkv_connector) is FlexKVConnectorV1Impl


@pytest.mark.hit
@pytest.mark.parametrize("length", [BLOCK_TOKENS + 1, 1000])
def test_hit_equals_device_hit(engine: Engine, length: int) -> None:
    assert hit_differences(engine, prompt_tokens(length + 7, length)) == set()


def test_same_hits_and_answers_as_the_native_connector(engine: Engine, native_answers: list[Answer]) -> None:
    ours = same_requests(engine)
    assert sum(answer.external_tokens for answer in ours) > 4000, "too few hits to compare"
    for mine, native in zip(ours, native_answers, strict=True):
        assert (mine.cached_tokens, mine.external_tokens) == (native.cached_tokens, native.external_tokens)
        assert mine.token_ids == native.token_ids
        assert mine.logprob_error(native) <= RECOMPUTE_BOUND
    alone = slice(0, -TOGETHER)  # of those that run together, two engines need not form the same batches
    assert [mine.logprobs for mine in ours[alone]] == [native.logprobs for native in native_answers[alone]]
    engine.check_integrity()


def test_load_that_fails_is_computed_and_counted(engine: Engine) -> None:
    """The workers' results reach the scheduler, and what failed is not served."""
    prompt = prompt_tokens(90, 700)
    engine.reset(external=True)
    cold = engine.ask(prompt)
    engine.reset()
    failed = engine.manager.counters().failed_loads
    with patched_scatter(lambda scatter: _fails):
        again = engine.ask(prompt)
    assert again.token_ids == cold.token_ids
    assert again.logprob_error(cold) <= RECOMPUTE_BOUND
    assert engine.manager.counters().failed_loads == failed + 1
    engine.check_integrity()


def _fails(copier: CpuCopier, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
    raise TransferError("injected: the copy failed")


_: Scatter = _fails
