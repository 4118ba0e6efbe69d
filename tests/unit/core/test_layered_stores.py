"""Stores layer by layer: each layer is copied once it is written, all count together with the last, and what goes wrong ends the whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from flexkv_core.errors import TransferError
from flexkv_core.transfer.layered_stores import LayerCopy, LayeredStores, StoreEnd
from flexkv_core.transfer.plan import Delivery, OpStatus, TransferOp
from flexkv_core.types import Direction
from tests.unit.core.device import LAYERS, Device
from tests.unit.core.test_transfer import Rig

TIMEOUT_S = 30
COUNT = 9


class StoreRig(Rig):
    """The first ``COUNT`` blocks are computed layer by layer by :meth:`compute`."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"queue_ops_max": 3, "timeout_s": TIMEOUT_S, **settings})  # type: ignore[arg-type]
        self.computed = Device()
        for block in range(COUNT):
            self.computed.fill(block, block)
        self.copied: list[int] = []  # layers, the first of each copy
        self.device.copier.hold_layer = self.copied.append

    def store(self, op_id: int = 1, count: int = COUNT) -> TransferOp:
        return replace(self.op(op_id, Direction.STORE, count), delivery=Delivery.LAYERWISE)

    def compute(self, layer: int) -> None:
        self.device.tensors[layer].copy_(self.computed.tensors[layer])

    def run(self, op_id: int = 1, layers: int = LAYERS) -> None:
        for layer in range(layers):
            self.compute(layer)
            self.engine.layers_written([op_id], layer + 1)

    def ended(self) -> tuple[int, OpStatus, bool]:
        result = self.results.get(timeout=TIMEOUT_S)
        return result.op_id, result.status, bool(result.ok.all())

    def loads_what_was_computed(self) -> bool:
        for tensor in self.device.tensors:
            tensor.zero_()
        self.engine.submit(self.op(99, Direction.LOAD, COUNT))
        assert self.ended() == (99, OpStatus.DONE, True)
        return all(
            torch.equal(mine, theirs)
            for mine, theirs in zip(self.device.tensors, self.computed.tensors, strict=True)
        )


@pytest.fixture
def rig() -> Iterator[StoreRig]:
    rig = StoreRig()
    yield rig
    rig.close()


def wait_for(condition: threading.Event) -> None:
    assert condition.wait(TIMEOUT_S)


def test_each_layer_is_copied_while_the_next_ones_are_still_computed(rig: StoreRig) -> None:
    """What is copied is not looked at again: a layer may be overwritten with the last one's announcement at the earliest."""
    rig.engine.submit(rig.store())
    for layer in range(LAYERS - 1):
        begun = threading.Event()
        rig.device.copier.hold_layer = lambda layer, begun=begun: (rig.copied.append(layer), begun.set())
        rig.compute(layer)
        rig.engine.layers_written([1], layer + 1)
        wait_for(begun)
    assert rig.results.empty()
    assert not rig.host.checksums.any()
    rig.compute(LAYERS - 1)
    rig.engine.layers_written([1], LAYERS)
    assert rig.ended() == (1, OpStatus.DONE, True)
    assert rig.copied == list(range(LAYERS))
    assert rig.loads_what_was_computed()


@pytest.mark.parametrize("piece_blocks", [1, 4, 100])
def test_slots_hold_what_a_whole_store_puts_there(
    rig: StoreRig, monkeypatch: pytest.MonkeyPatch, piece_blocks: int
) -> None:
    monkeypatch.setattr(rig.engine, "_piece_blocks", piece_blocks)
    rig.engine.submit(rig.store())
    rig.run()
    assert rig.ended() == (1, OpStatus.DONE, True)
    layered = rig.host.checksums[:COUNT].copy()
    rig.engine.submit(rig.op(2, Direction.STORE, COUNT))
    assert rig.ended() == (2, OpStatus.DONE, True)
    assert (rig.host.checksums[:COUNT] == layered).all()
    assert rig.loads_what_was_computed()


def test_layers_that_are_told_at_once_are_copied_in_parts(rig: StoreRig) -> None:
    rig.engine.submit(rig.store())
    for layer in range(LAYERS):
        rig.compute(layer)
    rig.engine.layers_written([1], LAYERS)
    assert rig.ended() == (1, OpStatus.DONE, True)
    assert rig.copied == list(range(LAYERS))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_layer_whose_copy_fails_fails_the_store(rig: StoreRig, layer: int) -> None:
    def fail(first: int) -> None:
        if first == layer:
            raise TransferError("injected")

    rig.device.copier.hold_layer = fail
    rig.engine.submit(rig.store())
    rig.run()
    assert rig.ended() == (1, OpStatus.FAILED, False)
    assert not rig.host.checksums.any(), "nothing of it has a checksum that matches"
    rig.device.copier.hold_layer = rig.copied.append
    rig.engine.submit(rig.store(2))
    rig.run(2)
    assert rig.ended() == (2, OpStatus.DONE, True)


@pytest.mark.parametrize("layers", range(LAYERS))
def test_a_store_that_is_given_up_has_failed(rig: StoreRig, layers: int) -> None:
    rig.engine.submit(rig.store())
    rig.run(layers=layers)
    rig.engine.abandon([1, 77])
    assert rig.ended() == (1, OpStatus.FAILED, False)
    assert not rig.host.checksums.any()
    rig.engine.layers_written([1], LAYERS)  # says nothing more
    assert rig.engine.drain([1], 0)
    assert rig.results.empty()


def test_a_store_that_nobody_speaks_of_any_more_has_failed() -> None:
    rig = StoreRig(timeout_s=0.05)
    rig.engine.submit(rig.store())
    rig.run(layers=1)
    assert rig.ended() == (1, OpStatus.FAILED, False)
    rig.close()


def test_other_ops_run_while_a_store_waits_for_its_layers(rig: StoreRig) -> None:
    rig.engine.submit(rig.store())
    rig.run(layers=1)
    rig.engine.submit(replace(rig.op(2, Direction.STORE, 1), slots=rig.op(2, Direction.STORE, 20).slots[-1:]))
    assert rig.ended()[0] == 2
    rig.engine.submit(rig.store(3, 2))
    rig.run(3)
    assert rig.ended()[0] == 3
    rig.run(1)
    assert rig.ended() == (1, OpStatus.DONE, True)


def test_a_load_is_let_in_between_two_pieces(rig: StoreRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.engine, "_piece_blocks", 3)
    rig.engine.submit(rig.op(2, Direction.STORE, 1))
    assert rig.ended()[0] == 2
    copier, go_on, entered = rig.device.copier, threading.Event(), threading.Event()
    copier.hold_layer = lambda layer: (entered.set(), go_on.wait(TIMEOUT_S))
    copier.order.clear()
    rig.engine.submit(rig.store())
    rig.engine.layers_written([1], LAYERS)
    wait_for(entered)
    rig.engine.submit(rig.op(3, Direction.LOAD, 1))
    go_on.set()
    assert {rig.ended()[0], rig.ended()[0]} == {1, 3}
    assert copier.order.index(3) == 1


def test_too_many_are_refused_and_the_end_tells_of_all(rig: StoreRig) -> None:
    for op_id in range(1, 5):
        rig.engine.submit(rig.store(op_id))
    assert rig.ended() == (4, OpStatus.FAILED, False)
    rig.engine.close()
    assert {rig.ended() for _ in range(3)} == {(op_id, OpStatus.CANCELLED, False) for op_id in (1, 2, 3)}


def test_a_device_that_lags_is_given_a_quarter_of_the_layers_at_a_time() -> None:
    stores = LayeredStores(30, timeout_s=5)
    op = StoreRig.store(object.__new__(StoreRig))  # type: ignore[arg-type]
    stores.begin(op, now=0)
    assert stores.next(0) is None
    stores.written([op.op_id], 1, "first", now=1)
    stores.written([op.op_id], 30, "all", now=2)
    seen = []
    while isinstance(work := stores.next(3), LayerCopy):
        seen.append((len(work.layers), work.after))
        work.store.copied = work.layers.stop
    assert seen == [(7, "all")] * 4 + [(2, "all")]
    assert stores.next(7) is None
    assert stores.next(7.1) == (op, StoreEnd.LATE)
    stores.abandon([op.op_id])
    assert stores.next(3) == (op, StoreEnd.ABANDONED)
    stores.end(op.op_id)
    assert (len(stores), stores.next(100)) == (0, None)
