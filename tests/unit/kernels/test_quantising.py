"""What a copier that rounds to fp8 owes, on the CPU's and on the streams': what torch would bring back, or nothing; in any order."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from flexkv_core.errors import ConfigError, LayoutError, TransferError
from flexkv_core.layout import KVLayout
from flexkv_core.quantised import QuantisedImage, quantised_layout
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import Delivery, TransferOp
from flexkv_core.types import Direction
from flexkv_kernels import copier_for
from flexkv_kernels.cuda_quantising import QuantisingCudaCopier
from flexkv_kernels.quantising import QuantisingCpuCopier
from flexkv_kernels.segments import pieces_of
from flexkv_kernels.streams import Order
from tests.unit.kernels.quantising_rig import QuantisingRig, rounded
from tests.unit.kernels.stream_rig import BLOCKS, Shape

SHAPE = Shape(blocks_per_slot=2, shards=3, shard=1)
SLOTS = np.array([5, 0, 9, 3, 4, 12, 1, 2], np.int32)
KEYS = bytes(range(16)) * len(SLOTS)
PLACES = np.random.default_rng(1).permutation(BLOCKS)[: 2 * len(SLOTS)]
SEEDS = 60


@pytest.fixture(params=[False, True], ids=["cpu", "streams"])
def rig(request: pytest.FixtureRequest) -> Iterator[QuantisingRig]:
    rig = QuantisingRig(7, request.param, shape=SHAPE)
    yield rig
    rig.close()


def store(rig: QuantisingRig, blocks: np.ndarray = PLACES) -> np.ndarray:
    op = TransferOp(1, Direction.STORE, KEYS, SLOTS, blocks)
    kept = rig.copier.gather(op, rig.copier.mark())
    assert kept is not None
    return kept


def load(rig: QuantisingRig, blocks: np.ndarray = PLACES, verify: bool = True) -> list[bool]:
    op = TransferOp(2, Direction.LOAD, KEYS, SLOTS, blocks)
    return rig.copier.scatter(op, rig.copier.mark(), verify).tolist()


def image_of(rig: QuantisingRig, slot: int) -> np.ndarray:
    """This rank's shard of a slot, a view."""
    layout = rig.host.layout
    address = rig.host.address + slot * layout.slot_bytes + SHAPE.shard * layout.shard_bytes
    return np.ctypeslib.as_array((ctypes.c_uint8 * layout.shard_bytes).from_address(address))


def test_what_comes_back_is_what_torch_makes_of_it(rig: QuantisingRig) -> None:
    wanted = rounded(rig.held(PLACES))
    assert store(rig).all()
    rig.write(PLACES, torch.zeros_like(wanted))
    turned = PLACES[::-1].copy()
    assert all(load(rig, turned))
    assert torch.equal(rig.held(turned), wanted)


def test_a_slot_takes_half_and_the_scales() -> None:
    rig = QuantisingRig(7, False, shape=SHAPE)
    whole = rig.copier.segments.block_bytes
    assert rig.host.layout.device_block_bytes <= whole // 2 + 4 * rig.image.scales + 16
    rig.close()


def test_copiers_agree_on_what_a_slot_holds() -> None:
    rigs = [QuantisingRig(7, streams, shape=SHAPE) for streams in (False, True)]
    for rig in rigs:
        assert store(rig).all()
    for slot in SLOTS.tolist():
        assert (image_of(rigs[0], slot) == image_of(rigs[1], slot)).all()
    checksums = [rig.host.checksums[SLOTS, SHAPE.shard].tolist() for rig in rigs]
    assert checksums[0] == checksums[1]
    assert len(set(checksums[0])) == len(SLOTS)
    for rig in rigs:
        assert not rig.host.checksums[:, 0].any()
        assert rig.host.matches(SLOTS, KEYS, SHAPE.shard).all()
        rig.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_stored(rig: QuantisingRig, value: float) -> None:
    rig.tensors[1][1, int(PLACES[5]), 2, 3] = value
    assert store(rig).tolist() == [place != 2 for place in range(len(SLOTS))]


def test_zeros_come_back_as_zeros(rig: QuantisingRig) -> None:
    rig.write(PLACES, torch.zeros_like(rig.held(PLACES)))
    assert store(rig).all()
    rig.write(PLACES, torch.ones_like(rig.held(PLACES)))
    assert all(load(rig))
    assert not rig.held(PLACES).any()


@pytest.mark.parametrize("at", [3, -20], ids=["values", "scales"])
@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_found_before_anything_is_turned_back(rig: QuantisingRig, verify: bool, at: int) -> None:
    """Damage of values and of scales; nothing of such a slot comes to the device."""
    stored = rounded(rig.held(PLACES))
    store(rig)
    image_of(rig, int(SLOTS[2]))[at] ^= 4
    before = torch.full_like(stored, 7)
    rig.write(PLACES, before)
    assert load(rig, verify=verify) == [place != 2 or not verify for place in range(len(SLOTS))]
    found, others = rig.held(PLACES), [0, 1, 2, 3, *range(6, 16)]
    assert torch.equal(found[:, others], stored[:, others])
    if verify:
        assert torch.equal(found[:, 4:6], before[:, 4:6])


@pytest.mark.parametrize("left_out", [[0], [1, 4, 5, 15], list(range(15)), list(range(16))])
def test_negative_blocks_are_left_out(rig: QuantisingRig, left_out: list[int]) -> None:
    stored = rounded(rig.held(PLACES))
    store(rig)
    rig.write(PLACES, torch.zeros_like(stored))
    wanted = PLACES.copy()
    wanted[left_out] = -1
    assert all(load(rig, wanted))
    found, kept = rig.held(PLACES), np.delete(np.arange(len(wanted)), left_out)
    assert not found[:, left_out].any()
    assert torch.equal(found[:, kept], stored[:, kept])


def test_layers_come_one_by_one(rig: QuantisingRig) -> None:
    stored = rounded(rig.held(PLACES))
    store(rig)
    rig.write(PLACES, torch.zeros_like(stored))
    wanted = PLACES.copy()
    wanted[[0, 5]] = -1
    op = TransferOp(2, Direction.LOAD, KEYS, SLOTS, wanted, delivery=Delivery.LAYERWISE)
    announced: list[bool] = []

    def read(layer: object) -> None:
        rig.copier.follow(layer)
        index = 2 * len(announced)
        there = wanted >= 0
        announced.append(
            torch.equal(rig.held(PLACES)[index : index + 2, there], stored[index : index + 2, there])
        )

    rig.copier.scatter_layers(op, rig.copier.mark(), read)
    assert announced == [True] * rig.copier.segments.layer_count
    assert not rig.held(PLACES)[:, [0, 5]].any()


def test_layers_are_stored_with_the_last(rig: QuantisingRig) -> None:
    """A block is rounded as a whole: nothing comes before its last layer, then all does."""
    rig.tensors[1][1, int(PLACES[5]), 2, 3] = float("nan")
    op = TransferOp(1, Direction.STORE, KEYS, SLOTS, PLACES, delivery=Delivery.LAYERWISE)
    assert rig.copier.gather(op, rig.copier.mark(), range(1)) is None
    assert not rig.host.checksums.any()
    kept = rig.copier.gather(op, rig.copier.mark(), range(1, 2))
    assert kept is not None
    assert kept.tolist() == [place != 2 for place in range(len(SLOTS))]
    assert all(load(rig))


@pytest.mark.parametrize(("slots", "blocks"), [([BLOCKS], [0, 1]), ([-1], [0, 1]), ([0], [0, BLOCKS])])
def test_places_that_do_not_exist_are_refused(
    rig: QuantisingRig, slots: list[int], blocks: list[int]
) -> None:
    op = TransferOp(3, Direction.STORE, bytes(16), np.array(slots, np.int32), np.array(blocks))
    for copy in (rig.copier.gather, lambda op, after: rig.copier.scatter(op, after, False)):
        with pytest.raises((TransferError, IndexError)):
            copy(op, rig.copier.mark())


def test_slots_of_another_kind_are_refused() -> None:
    rig = QuantisingRig(0, False)
    segments = rig.copier.segments
    exact = KVLayout(4, 4, segments.block_bytes)
    for layout in (exact, quantised_layout(exact, rig.image.scales + 4)):
        host = HostSegment.create(2, layout)
        with pytest.raises(LayoutError, match="expected"):
            rig.copier.bind(host, 0)
        host.close()
    rig.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="only bfloat16"):
        copier_for([torch.zeros(4, 16, dtype=torch.uint8).view(dtype)], scales=1)


def test_more_pieces_than_scales_are_refused() -> None:
    with pytest.raises(LayoutError, match="expected at most 1"):
        copier_for([torch.zeros(4, 16, dtype=torch.bfloat16)] * 2, scales=1)


def test_copier_for_a_cpu_rounds() -> None:
    tensors = [torch.zeros(4, 16, dtype=torch.bfloat16)]
    assert isinstance(copier_for(tensors, scales=1), QuantisingCpuCopier)


class OnGpu(torch.Tensor):
    """A tensor that says so."""

    device = torch.device("cuda")  # type: ignore[assignment]


def test_copier_over_a_gpus_tensors_has_a_scale_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or as many as it is told; on a machine without a GPU its streams are not opened."""
    monkeypatch.setattr(QuantisingCudaCopier, "_open_streams", lambda *arguments: None)
    tensors = [torch.zeros(4, 16, dtype=torch.bfloat16) for _ in range(3)]
    there = [tensor.as_subclass(OnGpu) for tensor in tensors]
    for scales in (0, 5):
        copier = QuantisingCudaCopier.from_tensors(there, layers=[0, 1, 2], scales=scales)
        assert copier._image_bytes() == QuantisedImage(32, 3, scales or 3).image_bytes
        assert copier.segments.layer_count == 3
        copier.close()
    with pytest.raises(LayoutError, match="expected at most 2"):
        QuantisingCudaCopier.from_tensors(there, scales=2)
    with pytest.raises(LayoutError, match="found device cpu; expected cuda"):
        QuantisingCudaCopier.from_tensors(tensors)
    with pytest.raises(ConfigError, match="only bfloat16"):
        QuantisingCudaCopier.from_tensors([there[0].to(torch.float16)])


@pytest.mark.parametrize(("pieces", "values", "scales"), [(1, 1, 1), (3, 5, 4), (64, 8192, 64), (2, 2, 9)])
def test_images_are_aligned_and_hold_what_they_must(pieces: int, values: int, scales: int) -> None:
    image = QuantisedImage(2 * values, pieces, scales)
    assert image.scales_offset >= pieces * values
    assert image.scales_offset % 4 == 0
    assert image.image_bytes % 16 == 0
    assert 0 <= image.image_bytes - image.scales_offset - 4 * scales < 16
    assert (
        quantised_layout(KVLayout(1, 1, 2 * pieces * values), scales).device_block_bytes == image.image_bytes
    )


def story(seed: int, removed: frozenset[Order] = frozenset()) -> list[str]:
    """As in ``test_races.py``: an engine writes blocks, has them stored, reuses them at once, and has others overwritten by a load."""
    rig = QuantisingRig(seed, True, removed)
    try:
        return _tell(rig, np.random.default_rng(seed))
    finally:
        rig.close()


def _tell(rig: QuantisingRig, rng: np.random.Generator) -> list[str]:
    order, half = rng.permutation(BLOCKS), BLOCKS // 2
    mine, others = order[:half], order[half:]
    slots = rng.permutation(BLOCKS)[:half].astype(np.int32)
    keys = rng.bytes(16 * half)
    fresh = torch.randn(rig.held(mine).shape, generator=torch.Generator().manual_seed(seed_of(rng)))
    fresh = fresh.to(torch.bfloat16)
    for place in range(half):
        block, values = mine[place : place + 1], fresh[:, place : place + 1]
        rig.streams.engine(lambda block=block, values=values: rig.write(block, values))
    kept = rig.copier.gather(TransferOp(1, Direction.STORE, keys, slots, mine), rig.copier.mark())
    rig.write(mine, torch.zeros_like(fresh))
    stored = rig.host.checksums[slots, 0].copy()
    old, read = rig.held(others), []
    rig.streams.engine(lambda: read.append(rig.held(others)))
    op = TransferOp(2, Direction.LOAD, keys, slots, others)
    ok = rig.copier.scatter(op, rig.copier.mark(), verify=False)
    loaded = rig.held(others)
    rig.streams.drain()
    found: dict[str, Any] = {
        "refused": not (ok.all() and kept is not None and kept.all()),
        "loaded bytes": not torch.equal(loaded, rounded(fresh)),
        "overwritten too early": not torch.equal(read[0], old),
        "checksums": not (rig.host.checksums_now(slots, keys, 0) == stored).all(),
    }
    return [name for name, wrong in found.items() if wrong]


def seed_of(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 30))


def test_nothing_goes_wrong_in_any_order() -> None:
    for seed in range(SEEDS):
        assert not story(seed), seed


@pytest.mark.parametrize(
    "order", sorted(set(Order) - {Order.LAYER_LOADED, Order.LAYER_WRITTEN}, key=lambda order: order.name)
)
def test_every_event_is_needed(order: Order) -> None:
    assert any(story(seed, frozenset({order})) for seed in range(2 * SEEDS))


def test_segments_of_many_layouts_come_back() -> None:
    """Strided, packed and head-wise tensors of any block size, against torch."""
    for seed in range(40):
        _round_trip_of_random_layout(seed)


def _round_trip_of_random_layout(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks, tokens, heads, dim, layers = (int(rng.integers(1, high)) for high in (7, 20, 4, 20, 4))
    whole = torch.from_numpy(rng.standard_normal((blocks, layers, heads, tokens, dim))).to(torch.bfloat16)
    kinds = {
        "packed": [whole[:, layer] for layer in range(layers)],
        "heads outside": [
            whole[:, layer].movedim(1, 0).contiguous().movedim(0, 1) for layer in range(layers)
        ],
    }
    tensors = kinds[("packed", "heads outside")[seed % 2]]
    segments = pieces_of(tensors)
    scales = len(segments.addresses) + int(rng.integers(0, 3))
    copier = copier_for(tensors, scales=scales)
    host = HostSegment.create(
        blocks, quantised_layout(KVLayout(tokens, tokens, segments.block_bytes), scales)
    )
    copier.bind(host, 0)
    before = [tensor.clone() for tensor in tensors]
    ids = rng.permutation(blocks)
    slots, keys = np.arange(blocks, dtype=np.int32), rng.bytes(16 * blocks)
    copier.gather(TransferOp(1, Direction.STORE, keys, slots, ids), None)
    for tensor in tensors:
        tensor.zero_()
    assert copier.scatter(TransferOp(2, Direction.LOAD, keys, slots, ids), None, True).all()
    per_head = seed % 2 == 1 and len(segments.addresses) > layers
    for mine, theirs in zip(tensors, before, strict=True):
        pieces = theirs.reshape(blocks * heads if per_head else blocks, 1, 1, -1).transpose(0, 1)
        assert torch.equal(mine, rounded(pieces).transpose(0, 1).reshape(theirs.shape)), seed
    host.close()
