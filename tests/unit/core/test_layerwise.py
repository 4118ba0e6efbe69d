"""Loads layer by layer: bytes are there when a layer is said to be, checked, and a failure is told before anything is read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from flexkv_core.errors import LayoutError, TransferError
from flexkv_core.layout import DeviceSegments, KVLayout
from flexkv_core.storage.memory import HostSegment, arrival_mark
from flexkv_core.tasks import KVResponseStatus
from flexkv_core.transfer import layers as layers_module
from flexkv_core.transfer.layers import LayerProgress, LayerStatus
from flexkv_core.transfer.plan import Delivery, OpStatus, TransferOp
from flexkv_core.types import Direction
from flexkv_kernels import CpuCopier, pieces_of
from tests.unit.core.device import BLOCK_TOKENS, LAYERS, Device, places
from tests.unit.core.test_transfer import Rig

TIMEOUT_S = 30
COUNT = 9


class LayerRig(Rig):
    """Slots 0 … COUNT - 1 hold what :meth:`Device.fill` wrote; the device's blocks are zero again."""

    def __init__(self) -> None:
        super().__init__(queue_ops_max=8, timeout_s=TIMEOUT_S)
        for block in range(COUNT):
            self.device.fill(block, block)
        self.stored = [tensor.clone() for tensor in self.device.tensors]
        self.engine.submit(self.op(1, Direction.STORE, COUNT))
        assert self.results.get(timeout=TIMEOUT_S).status is OpStatus.DONE
        for tensor in self.device.tensors:
            tensor.zero_()

    def load(self, op_id: int = 2) -> TransferOp:
        return replace(self.op(op_id, Direction.LOAD, COUNT), delivery=Delivery.LAYERWISE)

    def layer_is_there(self, layer: int) -> bool:
        return torch.equal(self.device.tensors[layer], self.stored[layer])

    def wait(self, count: int, op_id: int = 2, timeout_s: float = TIMEOUT_S) -> LayerStatus:
        return self.engine.wait_layers(op_id, count, timeout_s)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[LayerRig]:
    rig = LayerRig()
    monkeypatch.setattr(rig.engine, "_load_piece_blocks", 2)
    yield rig
    rig.close()


def test_a_layer_may_be_read_while_the_next_ones_are_still_coming(rig: LayerRig) -> None:
    steps = [threading.Event() for _ in range(LAYERS)]
    rig.device.copier.hold_layer = lambda layer: steps[layer].wait(TIMEOUT_S)
    rig.engine.submit(rig.load())
    assert rig.engine.layer_count == LAYERS
    assert rig.wait(0) is LayerStatus.READY
    for layer in range(LAYERS):
        assert rig.wait(layer + 1, timeout_s=0.02) is LayerStatus.LATE
        steps[layer].set()
        assert rig.wait(layer + 1) is LayerStatus.READY
        assert rig.layer_is_there(layer)
        assert layer + 2 >= LAYERS or not rig.layer_is_there(layer + 2)  # the next one is being copied
    result = rig.results.get(timeout=TIMEOUT_S)
    assert (result.status, result.ok.all()) == (OpStatus.DONE, True)
    assert rig.wait(1) is LayerStatus.READY  # also when the load has ended


def test_a_thread_that_waits_is_woken_by_the_layer(rig: LayerRig) -> None:
    go_on = threading.Event()
    rig.device.copier.hold_layer = lambda layer: layer == 0 or go_on.wait(TIMEOUT_S)
    rig.engine.submit(rig.load())
    seen: list[tuple[LayerStatus, bool]] = []

    def reader() -> None:
        status = rig.wait(LAYERS)
        seen.append((status, rig.layer_is_there(LAYERS - 1)))

    thread = threading.Thread(target=reader)
    thread.start()
    assert rig.wait(1) is LayerStatus.READY
    assert not seen
    go_on.set()
    thread.join(TIMEOUT_S)
    assert seen == [(LayerStatus.READY, True)]


def test_damage_is_told_before_the_first_layer_and_the_rest_arrives(rig: LayerRig) -> None:
    rig.host.checksums[5, 0] ^= 1
    published: list[int] = []
    rig.device.copier.hold_layer = published.append
    rig.device.copier.hold.clear()
    rig.engine.submit(rig.load())
    assert rig.wait(1) is LayerStatus.FAILED
    assert rig.wait(0) is LayerStatus.FAILED
    assert not published
    rig.device.copier.hold.set()
    result = rig.results.get(timeout=TIMEOUT_S)
    assert (result.status, np.flatnonzero(~result.ok).tolist()) == (OpStatus.DONE, [5])
    assert not rig.device.holds(5, 5)
    assert all(rig.device.holds(block, block) for block in range(COUNT) if block != 5)
    assert rig.wait(LAYERS) is LayerStatus.FAILED


def test_a_tentative_load_is_checked_last(rig: LayerRig) -> None:
    """Its layers come first; the damage is told before it is reported, and nothing of the block counts."""
    rig.host.checksums[5, 0] ^= 1
    checked = threading.Event()
    matches = rig.host.matches

    def late(*arguments: object) -> object:
        assert checked.wait(TIMEOUT_S)
        return matches(*arguments)

    rig.host.matches = late  # type: ignore[method-assign]
    rig.engine.submit(replace(rig.load(), delivery=Delivery.TENTATIVE))
    rig.engine.submit(rig.op(3, Direction.STORE))
    layers = rig.engine._layers
    assert layers.wait(2, LAYERS, TIMEOUT_S)[0] is LayerStatus.READY
    assert layers.wait(2, 0, 0)[0] is LayerStatus.LATE
    assert rig.results.empty()
    checked.set()
    assert rig.engine.drain([2], TIMEOUT_S)
    assert rig.wait(LAYERS) is LayerStatus.FAILED
    assert np.flatnonzero(~rig.results.get(timeout=TIMEOUT_S).ok).tolist() == [5]


def test_a_tentative_load_that_is_whole(rig: LayerRig) -> None:
    rig.engine.submit(replace(rig.load(), delivery=Delivery.TENTATIVE))
    assert rig.wait(LAYERS) is LayerStatus.READY
    assert all(rig.layer_is_there(layer) for layer in range(LAYERS))
    assert rig.wait(0) is LayerStatus.READY
    assert rig.results.get(timeout=TIMEOUT_S).ok.all()


def test_a_copy_that_fails_between_two_layers_fails_the_load(rig: LayerRig) -> None:
    def fail(layer: int) -> None:
        if layer == 1:
            raise TransferError("injected")

    rig.device.copier.hold_layer = fail
    rig.engine.submit(rig.load())
    assert rig.wait(LAYERS) is LayerStatus.FAILED
    result = rig.results.get(timeout=TIMEOUT_S)
    assert (result.status, result.ok.any()) == (OpStatus.FAILED, False)
    rig.device.copier.hold_layer = lambda layer: None
    rig.engine.submit(rig.load(3))
    assert rig.wait(LAYERS, 3) is LayerStatus.READY


def test_a_load_that_is_refused_cancelled_or_unknown_has_failed(rig: LayerRig) -> None:
    rig.device.copier.hold.clear()
    rig.device.copier.entered.clear()
    rig.engine.submit(rig.load(2))
    assert rig.device.copier.entered.wait(TIMEOUT_S)
    rig.engine.submit(rig.load(3))
    rig.engine.cancel(3)
    for op_id in range(4, 13):
        rig.engine.submit(rig.load(op_id))  # the last finds the queue full
    for op_id in (3, 12, 99):
        assert rig.wait(1, op_id) is LayerStatus.FAILED
    rig.device.copier.hold.set()
    assert rig.wait(LAYERS, 11) is LayerStatus.READY


def test_awaited_slots_come_first(rig: LayerRig) -> None:
    op = replace(rig.load(), awaited=np.arange(COUNT) >= COUNT - 2)
    rig.engine.submit(op)
    assert rig.wait(0, timeout_s=0.02) is LayerStatus.LATE
    rig.host.arrivals[COUNT - 1] = arrival_mark(2, ok=True)
    assert rig.wait(1, timeout_s=0.02) is LayerStatus.LATE
    rig.host.arrivals[COUNT - 2] = arrival_mark(2, ok=True)
    assert rig.wait(LAYERS) is LayerStatus.READY
    assert all(rig.layer_is_there(layer) for layer in range(LAYERS))


def test_a_slot_that_did_not_arrive_fails_the_load(rig: LayerRig) -> None:
    rig.engine.submit(replace(rig.load(), awaited=np.arange(COUNT) == 3))
    rig.host.arrivals[3] = arrival_mark(2, ok=False)
    assert rig.wait(1) is LayerStatus.FAILED
    assert np.flatnonzero(~rig.results.get(timeout=TIMEOUT_S).ok).tolist() == [3]


def test_helping_thread_checks_a_part_of_the_load(rig: LayerRig) -> None:
    threads: set[int] = set()
    both = threading.Barrier(2)
    matches = rig.host.matches

    def watched(*arguments: object) -> object:
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            both.wait(TIMEOUT_S)
        return matches(*arguments)

    rig.host.matches = watched  # type: ignore[method-assign]
    rig.engine.submit(rig.load())
    rig.engine.help(TIMEOUT_S)
    assert rig.wait(LAYERS) is LayerStatus.READY
    assert threading.get_ident() in threads


def test_what_has_ended_is_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "ENDED_MAX", 3)
    progress = LayerProgress()
    for op_id in range(6):
        progress.begin(op_id)
        progress.end(op_id, whole=True)
    found = [progress.wait(op_id, 1, 0)[0] for op_id in range(6)]
    assert found == [LayerStatus.FAILED] * 3 + [LayerStatus.READY] * 3


def test_waiting_has_a_deadline() -> None:
    progress = LayerProgress()
    progress.begin(1)
    started = time.monotonic()
    assert progress.wait(1, 1, 0.05)[0] is LayerStatus.LATE
    assert time.monotonic() - started >= 0.05


@pytest.mark.parametrize("k_and_v_apart", [False, True])
@pytest.mark.parametrize("left_out", [(), (0,), (1, 4, 5)])
def test_layers_of_slots_of_several_blocks(k_and_v_apart: bool, left_out: tuple[int, ...]) -> None:
    """Each layer's copy moves its own bytes and no others, wherever its segments lie among the slot's."""
    tensors = [torch.randint(0, 255, (12, 24), dtype=torch.uint8) for _ in range(6)]
    layers = [0, 1, 2, 0, 1, 2] if k_and_v_apart else [0, 0, 1, 1, 2, 2]
    copier = CpuCopier.from_tensors(tensors, layers=layers)
    host = HostSegment.create(4, KVLayout(8, 4, copier.segments.block_bytes, shard_count=2))
    copier.bind(host, 1)
    blocks = np.array([7, 3, 11, 0, 2, 5])
    slots = np.array([2, 0, 3], np.int32)
    copier.gather(TransferOp(1, Direction.STORE, bytes(48), slots, blocks), None)
    stored = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    wanted = blocks.copy()
    wanted[list(left_out)] = -1
    there = wanted[wanted >= 0]
    seen = []

    def look(layer: object) -> None:
        seen.append([index for index, tensor in enumerate(tensors) if tensor.any()])

    load = TransferOp(2, Direction.LOAD, bytes(48), slots, wanted, delivery=Delivery.LAYERWISE)
    copier.scatter_layers(load, None, look)
    assert seen == [[index for index, layer in enumerate(layers) if layer <= done] for done in range(3)]
    for tensor, before in zip(tensors, stored, strict=True):
        assert torch.equal(tensor[there], before[there])
        others = np.setdiff1d(np.arange(12), there)
        assert not tensor[others].any()
    host.close()


def test_layers_that_do_not_fit_are_refused() -> None:
    places = np.array([4096, 8192, 12288])
    for layers in ([0, 1], [0, 2, 2], [1, 1, 2], [-1, 0, 1]):
        with pytest.raises(LayoutError, match="found layers"):
            DeviceSegments(places, np.full(3, 16), 16, 4, np.array(layers))
    with pytest.raises(LayoutError, match="expected one a tensor"):
        pieces_of([torch.zeros(4, 4)], layers=[0, 1])
    assert DeviceSegments(places, np.full(3, 16), 16, 4).layer_count == 1


def test_a_caller_of_the_token_api_awaits_layers_by_its_counter() -> None:
    device = Device()
    manager = device.manager()
    tokens, others = np.arange(64), np.arange(1000, 1048)
    for place, sequence in ((0, tokens), (4, others)):
        blocks = list(range(place, place + len(sequence) // BLOCK_TOKENS))
        for block in blocks:
            device.fill(block, block)
        manager.wait(manager.put_async(sequence, places(blocks)))
    stored = [tensor.clone() for tensor in device.tensors]
    for tensor in device.tensors:
        tensor.zero_()
    steps = [threading.Event() for _ in range(LAYERS)]
    device.copier.hold_layer = lambda layer: steps[layer].wait(TIMEOUT_S)
    tasks = [manager.get_match(sequence)[0] for sequence in (tokens, others, np.arange(5000, 5032))]
    mappings = [places([0, 1, 2, 3]), places([4, 5, 6]), places([8, 9])[:0]]
    manager.launch(tasks, mappings, layerwise_transfer=True, counter_id=7)
    assert not manager.wait_layers(1, counter_id=7, timeout=0.02)
    steps[0].set()
    steps[1].set()
    assert not manager.wait_layers(3, counter_id=7, timeout=0.02)
    steps[2].set()
    assert manager.wait_layers(3, counter_id=7, timeout=TIMEOUT_S)
    assert all(torch.equal(tensor, before) for tensor, before in zip(device.tensors, stored, strict=True))
    assert manager.wait_layers(3, counter_id=8, timeout=0)  # nothing was launched under it
    assert {response.status for response in manager.wait(tasks).values()} == {KVResponseStatus.SUCCESS}
    assert manager.counters().layerwise_loads == 2
    manager.shutdown()


def test_a_put_that_is_launched_layerwise_is_a_put() -> None:
    device = Device()
    manager = device.manager()
    device.fill(0, 3)
    task, _ = manager.put_match(np.arange(BLOCK_TOKENS))
    manager.launch([task], [places([0])], layerwise_transfer=True)
    assert manager.wait(task)[task].status is KVResponseStatus.SUCCESS
    assert manager.wait_layers(1)
    assert manager.counters().layerwise_loads == 0
    manager.shutdown()
