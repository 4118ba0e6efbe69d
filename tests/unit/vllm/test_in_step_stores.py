"""Stores within a step: which, when each layer is told, and what is never kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import TransferError
from flexkv_core.transfer.engine import TransferEngine
from flexkv_core.transfer.plan import Delivery, OpStatus, TransferOp
from flexkv_core.types import Direction
from flexkv_kernels.copier import CpuCopier
from flexkv_vllm.in_step_stores import InStepStorePolicy, InStepStores
from tests.unit.core.device import LAYERS
from tests.unit.core.test_transfer import Rig
from tests.unit.vllm.test_tensor_parallel import BLOCK_TOKENS, GOT, PROMPT, PUT, PlayedEngine, make_request
from tests.unit.vllm.test_tensor_parallel import LAYERS as NAMES

TIMEOUT_S = 30


def policy(bytes_min: int = 1000, guesses: object = None, **settings: Any) -> InStepStorePolicy:
    config = FlexKVConfig(layerwise_store_bytes_min=bytes_min, **settings)
    return InStepStorePolicy(SimpleNamespace(speculative_config=guesses), config)  # type: ignore[arg-type]


def test_the_size_decides(caplog: pytest.LogCaptureFixture) -> None:
    assert policy().delivery(1000) is Delivery.LAYERWISE
    assert policy().delivery(999) is Delivery.WHOLE
    assert policy(0).delivery(1 << 40) is Delivery.WHOLE
    assert policy(guesses=SimpleNamespace(method="ngram")).delivery(1000) is Delivery.LAYERWISE
    assert not caplog.text
    assert policy(guesses=SimpleNamespace(method="eagle")).delivery(1000) is Delivery.WHOLE
    assert policy(store_dtype="fp8").delivery(1000) is Delivery.WHOLE
    assert caplog.text.count("layerwise_store_bytes_min has no effect") == 2


def test_off_unless_it_is_asked_for() -> None:
    assert not FlexKVConfig().layerwise_store_bytes_min


class StepRig(Rig):
    """One store of a step; what the transfer thread was told."""

    def __init__(self, layers: dict[str, int] | None = None) -> None:
        super().__init__(timeout_s=TIMEOUT_S)
        self.stores = InStepStores(layers or {f"l{n}": n for n in range(LAYERS)}, LAYERS, TIMEOUT_S)
        self.told: list[int] = []
        tell = self.engine.layers_written

        def watched(op_ids: Any, count: int) -> None:
            self.told.append(count)
            tell(op_ids, count)

        self.engine.layers_written = watched  # type: ignore[method-assign]

    def op_of(self, op_id: int = 1, delivery: Delivery = Delivery.LAYERWISE) -> TransferOp:
        return replace(self.op(op_id, Direction.STORE, 3), delivery=delivery)

    def submit(self, op: TransferOp) -> TransferEngine:
        self.engine.submit(op)
        return self.engine

    def announce(self, *names: str) -> None:
        for name in names:
            self.stores.written(name, self.submit)

    def ended(self) -> OpStatus:
        return self.results.get(timeout=TIMEOUT_S).status


@pytest.fixture
def rig() -> Iterator[StepRig]:
    rig = StepRig()
    yield rig
    rig.close()


def test_the_last_layer_is_told_behind_the_step(rig: StepRig) -> None:
    rig.stores.offer([rig.op_of(), rig.op_of(2, Delivery.WHOLE)])
    rig.announce("l0", "l1", "unknown", "l2")
    assert rig.told == [1, 2]
    assert rig.results.empty()
    assert rig.stores.end(keep=True) == {1}
    assert rig.told == [1, 2, LAYERS]
    assert rig.ended() is OpStatus.DONE
    assert rig.stores.end(keep=True) == set(), "once a step"


def test_a_step_that_computed_from_missing_bytes_keeps_nothing(rig: StepRig) -> None:
    """It is reported before the step is."""
    rig.stores.offer([rig.op_of()])
    rig.announce("l0", "l1", "l2")
    assert rig.stores.end(keep=False) == {1}
    assert rig.results.get_nowait().status is OpStatus.FAILED


def test_without_a_layer_nothing_is_begun(rig: StepRig) -> None:
    """As in a graph of the whole forward: the stores are still to be started."""
    rig.stores.offer([rig.op_of()])
    assert rig.stores.end(keep=True) == set()
    rig.announce("l0")
    assert not rig.told
    assert rig.engine.drain([1], 0)


@pytest.mark.parametrize("announced", [["l0"], ["l1", "l2"], ["l0", "l2"], ["l2", "l1"]])
def test_layers_that_are_not_announced_are_copied_behind_the_step(rig: StepRig, announced: list[str]) -> None:
    rig.stores.offer([rig.op_of()])
    rig.announce(*announced)
    assert rig.told == ([1] if announced[0] == "l0" else [])
    assert rig.stores.end(keep=True) == {1}
    assert rig.told[-1] == LAYERS
    assert rig.ended() is OpStatus.DONE


def test_a_layer_that_is_announced_twice_costs_the_store_and_all_later_ones(
    rig: StepRig, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first copy may have come between two writes."""
    rig.stores.offer([rig.op_of()])
    rig.announce("l0", "l0", "l1")
    assert rig.stores.end(keep=True) == {1}
    assert rig.ended() is OpStatus.FAILED
    assert "announced a layer twice" in caplog.text
    rig.stores.offer([rig.op_of(2)])
    rig.announce("l0", "l1")
    assert rig.stores.end(keep=True) == set()


def test_a_step_that_never_ended_keeps_nothing(rig: StepRig) -> None:
    rig.stores.offer([rig.op_of()])
    rig.announce("l0")
    rig.stores.offer([rig.op_of(2)])
    assert rig.ended() is OpStatus.FAILED
    rig.announce("l0")
    assert rig.stores.end(keep=True) == {2}


def test_layers_that_lie_in_one_place_are_told_when_all_are_written() -> None:
    rig = StepRig({"f0": 0, "w0": 0, "f1": 1, "w1": 1, "f2": 2})
    rig.stores.offer([rig.op_of()])
    rig.announce("w0", "w1", "f0")
    assert rig.told == [1]
    rig.announce("f1", "f2")
    assert rig.told == [1, 2]
    rig.stores.end(keep=True)
    rig.close()


@pytest.mark.parametrize("layers", [{"l0": 0, "l1": 1}, {"l0": 0}])
def test_segments_that_are_counted_otherwise_are_stored_whole(layers: dict[str, int]) -> None:
    """Layers of unlike sizes over each other are one segment."""
    rig = StepRig(layers)
    rig.stores.offer([rig.op_of()])
    rig.announce(*layers)
    assert rig.stores.end(keep=True) == set()
    rig.close()


@pytest.fixture
def played() -> Iterator[PlayedEngine]:
    engine = PlayedEngine(4, layerwise_store_bytes_min=1)
    yield engine
    engine.close()


def test_four_ranks_store_what_they_computed(played: PlayedEngine) -> None:
    """Also when a rank hears of no layer: its store is whole, the others' are not, and the block is one."""
    played.workers[2].layer_written = lambda name: None  # type: ignore[method-assign]
    first = make_request("first", PROMPT)
    played.put(first, PUT)
    assert played.scheduler.manager.counters().layerwise_stores == 1
    second = make_request("second", PROMPT)
    assert played.scheduler.matched_tokens(second, 0) == (5 * BLOCK_TOKENS, True)
    assert played.load(second, GOT, 5 * BLOCK_TOKENS) == [set()] * 4
    for rank in range(4):
        assert torch.equal(played.bytes_of(rank, GOT), played.bytes_of(rank, PUT))


@pytest.mark.parametrize("layer", range(len(NAMES)))
def test_a_layer_that_fails_on_one_rank_is_a_miss_for_all(
    played: PlayedEngine, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    gather, victim = CpuCopier.gather, played.workers[1]._copier

    def failing(copier: CpuCopier, op: TransferOp, after: object, layers: range | None = None) -> None:
        if copier is victim and layers is not None and layer in layers:
            raise TransferError("injected")
        gather(copier, op, after, layers)

    monkeypatch.setattr(CpuCopier, "gather", failing)
    first = make_request("first", PROMPT)
    played.put(first, PUT)
    played.scheduler.finished(first, [])
    second = make_request("second", PROMPT)
    assert played.scheduler.matched_tokens(second, 0) == (0, False)
    played.scheduler.manager.check_integrity()
    assert played.scheduler.manager.counters().failed_stores == 1


def test_layers_are_copied_while_the_step_goes_on(
    played: PlayedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather, copied, where = CpuCopier.gather, threading.Event(), []

    def watched(copier: CpuCopier, op: TransferOp, after: object, layers: range | None = None) -> None:
        gather(copier, op, after, layers)
        copied.set()

    monkeypatch.setattr(CpuCopier, "gather", watched)
    worker = played.workers[0]
    written = worker.layer_written

    def slow(name: str) -> None:
        written(name)
        if name != NAMES[-1]:
            where.append(copied.wait(TIMEOUT_S))

    worker.layer_written = slow  # type: ignore[method-assign]
    played.put(make_request("first", PROMPT), PUT)
    assert where == [True] * (len(NAMES) - 1)
