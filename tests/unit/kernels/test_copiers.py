"""What every device copier owes, on the CPU's and on the streams' in each mode; and that they agree on what a slot holds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

from flexkv_core import native
from flexkv_core.errors import LayoutError, TransferError
from flexkv_core.layout import KVLayout
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import Delivery, DeviceCopier, TransferOp
from flexkv_core.types import Direction
from flexkv_kernels import CpuCopier, copier_over
from flexkv_kernels.paths import Mode
from flexkv_kernels.stream_copier import StreamCopier
from flexkv_kernels.streams import Order
from tests.unit.kernels.stream_rig import BLOCKS, Shape, StreamRig

SHAPE = Shape(blocks_per_slot=2, shards=3, shard=1)
SLOTS = np.array([5, 0, 9, 3, 4, 12, 1, 2], np.int32)


class Bench:
    """A rig whose copier is either the streams' or the CPU's, over the same memory and slots."""

    def __init__(self, kind: Mode | None) -> None:
        self.rig = StreamRig(7, kind or Mode.DMA, shape=SHAPE)
        self.host = self.rig.host
        self.copier: DeviceCopier = self.rig.copier if kind else cpu_copier(self.rig)
        self.blocks = np.random.default_rng(1).permutation(BLOCKS)[: 2 * len(SLOTS)]
        self.keys = bytes(range(16)) * len(SLOTS)

    def store(self) -> torch.Tensor:
        """What was stored."""
        op = TransferOp(1, Direction.STORE, self.keys, SLOTS, self.blocks)
        self.copier.gather(op, self.copier.mark())
        return self.rig.held(self.blocks)

    def load(self, blocks: np.ndarray, verify: bool = True) -> list[bool]:
        op = TransferOp(2, Direction.LOAD, self.keys, SLOTS, blocks)
        return self.copier.scatter(op, self.copier.mark(), verify).tolist()


def cpu_copier(rig: StreamRig) -> CpuCopier:
    copier = CpuCopier(rig.copier.segments)
    copier.bind(rig.host, SHAPE.shard)
    return copier


@pytest.fixture(params=[None, *Mode], ids=lambda kind: kind.value if kind else "cpu")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.rig.close()


def test_what_was_stored_is_loaded(bench: Bench) -> None:
    stored = bench.store()
    bench.rig.write(bench.blocks, torch.zeros_like(stored))
    assert bench.load(bench.blocks[::-1].copy()) == [True] * len(SLOTS)
    assert torch.equal(bench.rig.held(bench.blocks[::-1].copy()), stored)


def test_slots_have_their_checksums(bench: Bench) -> None:
    bench.store()
    layout, found = bench.host.layout, np.zeros(len(SLOTS), np.uint32)
    shard_at = SHAPE.shard * layout.shard_bytes
    native.crc32c_slots(
        bench.host.address, layout.slot_bytes, shard_at, layout.shard_bytes, SLOTS, bench.keys, found
    )
    assert (bench.host.checksums[SLOTS, SHAPE.shard] == found).all()
    assert len(set(found.tolist())) == len(SLOTS)
    assert not bench.host.checksums[:, 0].any()  # other ranks' are untouched


@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_refused_where_it_is_looked_for(bench: Bench, verify: bool) -> None:
    stored = bench.store()
    layout = bench.host.layout
    view = (np.ctypeslib.ctypes.c_uint8 * layout.slot_bytes).from_address(
        bench.host.address + int(SLOTS[2]) * layout.slot_bytes
    )
    view[layout.shard_bytes + 3] ^= 4
    bench.rig.write(bench.blocks, torch.zeros_like(stored))
    assert bench.load(bench.blocks, verify) == [place != 2 or not verify for place in range(len(SLOTS))]
    loaded = bench.rig.held(bench.blocks)
    assert torch.equal(loaded[:, [0, 1, 2, 3, *range(6, 16)]], stored[:, [0, 1, 2, 3, *range(6, 16)]])
    assert loaded[:, 4:6].any() == (not verify)


@pytest.mark.parametrize("left_out", [[0], [1, 4, 5, 15], list(range(15))])
def test_negative_blocks_are_left_out(bench: Bench, left_out: list[int]) -> None:
    """Of the head of a load what the device has already, of any slot what has left a window; even a whole slot."""
    stored = bench.store()
    bench.rig.write(bench.blocks, torch.zeros_like(stored))
    wanted = bench.blocks.copy()
    wanted[left_out] = -1
    assert all(bench.load(wanted))
    loaded = bench.rig.held(bench.blocks)
    assert not loaded[:, left_out].any()
    kept = np.delete(np.arange(len(wanted)), left_out)
    assert torch.equal(loaded[:, kept], stored[:, kept])


def test_slot_that_is_wanted_in_part_is_checked_as_a_whole(bench: Bench) -> None:
    stored = bench.store()
    layout = bench.host.layout
    view = (np.ctypeslib.ctypes.c_uint8 * layout.slot_bytes).from_address(
        bench.host.address + int(SLOTS[2]) * layout.slot_bytes
    )
    view[layout.shard_bytes + 3] ^= 4  # in the part that is left out
    bench.rig.write(bench.blocks, torch.zeros_like(stored))
    wanted = bench.blocks.copy()
    wanted[4] = -1
    assert bench.load(wanted) == [place != 2 for place in range(len(SLOTS))]
    assert not bench.rig.held(bench.blocks)[:, [4, 5]].any()


def test_layers_are_loaded_one_by_one(bench: Bench) -> None:
    """Also where single blocks are left out; every layer is announced in order."""
    stored = bench.store()
    bench.rig.write(bench.blocks, torch.zeros_like(stored))
    wanted = bench.blocks.copy()
    wanted[[0, 5]] = -1
    op = TransferOp(2, Direction.LOAD, bench.keys, SLOTS, wanted, delivery=Delivery.LAYERWISE)
    layers: list[object] = []
    bench.copier.scatter_layers(op, bench.copier.mark(), layers.append)
    assert len(layers) == bench.copier.segments.layer_count == 2
    loaded, there = bench.rig.held(bench.blocks), wanted >= 0
    assert not loaded[:, ~there].any()
    assert torch.equal(loaded[:, there], stored[:, there])


def test_layers_are_stored_one_by_one(bench: Bench) -> None:
    """The slots hold what a whole store puts there, checksums included; a layer that changes behind its copy is not copied again."""
    whole = bench.store()
    wanted = bench.host.checksums[SLOTS, SHAPE.shard].copy()
    for slot in SLOTS.tolist():
        np.ctypeslib.ctypes.memset(
            bench.host.address + slot * bench.host.layout.slot_bytes, 0, bench.host.layout.slot_bytes
        )
    bench.host.checksums[:] = 0
    op = TransferOp(3, Direction.STORE, bench.keys, SLOTS, bench.blocks, delivery=Delivery.LAYERWISE)
    bench.copier.gather(op, bench.copier.mark(), range(1))
    assert not bench.host.checksums.any(), "nothing is complete"
    bench.rig.write_layer(0, bench.blocks, torch.zeros_like(whole[:2]))
    kept = bench.copier.gather(op, bench.copier.mark(), range(1, 2))
    assert kept is None or kept.all()
    assert (bench.host.checksums[SLOTS, SHAPE.shard] == wanted).all()
    assert not bench.host.checksums[:, 0].any()
    bench.rig.write(bench.blocks, torch.zeros_like(whole))
    assert all(bench.load(bench.blocks))
    assert torch.equal(bench.rig.held(bench.blocks), whole)


def test_a_layer_that_cannot_be_stored_leaves_nothing_queued(bench: Bench) -> None:
    if not isinstance(bench.copier, StreamCopier):
        return
    op = TransferOp(3, Direction.STORE, bench.keys, SLOTS, bench.blocks, delivery=Delivery.LAYERWISE)
    bench.copier.gather(op, bench.copier.mark(), range(1))
    bench.rig.streams.calls_left = 0
    with pytest.raises(TransferError, match="injected"):
        bench.copier.gather(op, bench.copier.mark(), range(1, 2))
    assert bench.rig.streams.idle


def test_layers_of_no_block_are_announced_too(bench: Bench) -> None:
    op = TransferOp(2, Direction.LOAD, bytes(16), SLOTS[:1], np.array([-1, -1]), delivery=Delivery.LAYERWISE)
    layers: list[object] = []
    bench.copier.scatter_layers(op, bench.copier.mark(), layers.append)
    assert len(layers) == 2
    bench.copier.follow(layers[1])


def test_what_a_reader_of_layers_raises_ends_the_copy(bench: Bench) -> None:
    bench.store()

    def refuse(layer: object) -> None:
        raise TransferError("injected")

    op = TransferOp(2, Direction.LOAD, bench.keys, SLOTS, bench.blocks, delivery=Delivery.LAYERWISE)
    with pytest.raises(TransferError, match="injected"):
        bench.copier.scatter_layers(op, bench.copier.mark(), refuse)
    assert bench.rig.streams.idle


def test_a_load_that_is_refused_whole_touches_nothing(bench: Bench) -> None:
    stored = bench.store()
    bench.host.checksums[:, SHAPE.shard] ^= 1
    bench.rig.write(bench.blocks, torch.zeros_like(stored))
    assert not any(bench.load(bench.blocks))
    assert not bench.rig.held(bench.blocks).any()


@pytest.mark.parametrize("mode", Mode)
def test_copiers_agree_on_what_a_slot_holds(mode: Mode) -> None:
    bench = Bench(mode)
    stored = bench.store()
    bench.rig.write(bench.blocks, torch.zeros_like(stored))
    bench.copier = cpu_copier(bench.rig)
    assert all(bench.load(bench.blocks))
    assert torch.equal(bench.rig.held(bench.blocks), stored)
    bench.rig.close()


@pytest.mark.parametrize(("slots", "blocks"), [([BLOCKS], [0, 1]), ([-1], [0, 1]), ([0], [0, BLOCKS])])
def test_places_that_do_not_exist_are_refused(slots: list[int], blocks: list[int]) -> None:
    rig = StreamRig(0, Mode.DMA, shape=SHAPE)
    op = TransferOp(3, Direction.STORE, bytes(16), np.array(slots, np.int32), np.array(blocks))
    for copy in (rig.copier.gather, partial(rig.copier.scatter, verify=True)):
        with pytest.raises(TransferError, match="does not exist"):
            copy(op, rig.copier.mark())
    rig.close()


def test_a_device_that_hangs_is_left_alone() -> None:
    """Its copies may still come: nothing more is started, whatever the slots and blocks."""
    rig = StreamRig(0, Mode.STAGED)
    op = TransferOp(3, Direction.STORE, bytes(16), np.array([0], np.int32), np.array([0]))
    rig.streams.hung = True
    with pytest.raises(TransferError, match=f"within 20 s: {Order.STORED.value}"):
        rig.copier.gather(op, rig.copier.mark())
    rig.streams.hung = False
    asked = rig.streams.asked.total()
    for call in (
        lambda: rig.copier.gather(op, rig.copier.mark()),
        lambda: rig.copier.gather(op, rig.copier.mark(), range(1)),
        lambda: rig.copier.scatter(op, rig.copier.mark(), True),
        lambda: rig.copier.scatter_layers(op, rig.copier.mark(), lambda layer: None),
    ):
        with pytest.raises(TransferError, match="copies stopped"):
            call()
    assert rig.streams.asked.total() == asked
    rig.close()


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_a_failed_transfer_leaves_nothing_queued(mode: Mode, direction: Direction, calls: int) -> None:
    """Its slots are taken for other blocks as soon as it is reported."""
    rig = StreamRig(3, mode)
    ids = np.arange(BLOCKS)
    op = TransferOp(3, direction, bytes(16 * BLOCKS), ids.astype(np.int32), ids)
    rig.streams.calls_left = calls
    copy = partial(rig.copier.scatter, verify=False) if direction is Direction.LOAD else rig.copier.gather
    with pytest.raises(TransferError, match="injected"):
        copy(op, rig.copier.mark())
    assert rig.streams.idle
    rig.streams.calls_left = 1 << 30
    copy(op, rig.copier.mark())  # and it goes on
    rig.close()


def test_slots_of_another_size_are_refused() -> None:
    rig = StreamRig(0, Mode.DMA)
    host = HostSegment.create(2, KVLayout(4, 4, 100))
    with pytest.raises(LayoutError, match="expected 100 bytes"):
        rig.copier.use(host, 0, rig.copier._paths, rig.copier._modes)
    host.close()
    rig.close()


@pytest.mark.parametrize(
    ("layers", "size_bytes", "sizes"),
    [
        (2, 1, [1, 1]),
        (8, 1, [2, 2, 2, 2]),
        (30, 1, [7, 7, 7, 7, 2]),
        (32, 500 << 20, [8] * 4),
        (32, 4 << 30, [1] * 32),
        (32, 1 << 40, [1] * 32),
    ],
)
def test_layers_are_queued_together_while_they_are_small(
    layers: int, size_bytes: int, sizes: list[int]
) -> None:
    rig = StreamRig(0, Mode.DMA, shape=Shape(layers=layers))
    groups = rig.copier._layer_groups(size_bytes)
    assert [len(group) for group in groups] == sizes
    assert [layer for group in groups for layer in group] == list(range(layers))
    rig.close()


def test_devices_without_a_copier_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's GPUs, which torch calls cuda too."""
    rig = StreamRig(0, Mode.DMA)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for device in ("cuda", "xpu"):
        with pytest.raises(LayoutError, match=f"found device {device}; expected cpu, or cuda of NVIDIA"):
            copier_over(rig.segments, torch.device(device), None)
    rig.close()
