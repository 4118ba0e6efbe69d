"""Which hits are verified, what counts as wrong, and what a finding does to the index."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from flexkv_core.cache.engine import GlobalCacheEngine
from flexkv_core.layout import KVLayout
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import TransferOp
from flexkv_core.types import KEY_BYTES, Direction, Tier
from flexkv_core.verify import TOLERANCES, HitSampler, ShadowCopier, piece_errors
from flexkv_kernels.copier import CpuCopier

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("share", "low", "high"), [(0.0, 0, 0), (0.01, 50, 150), (0.5, 4800, 5200), (1.0, 10000, 10000)]
)
def test_sampler_takes_its_share(share: float, low: int, high: int) -> None:
    samplers = [HitSampler(share), HitSampler(share)]
    taken = [[sampler.take(bytes(15) + bytes([i % 7])) for i in range(10_000)] for sampler in samplers]
    assert taken[0] == taken[1], "the same hits in the same order"
    assert low <= sum(taken[0]) <= high
    if 0 < share < 1:
        assert all(any(taken[0][key::7]) for key in range(7)), "no key is left out for ever"


def pieces(dtype: str, values: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(values.astype(np.float32)).to(getattr(torch, dtype)).contiguous()
    return tensor.view(torch.uint8).numpy().reshape(len(values), -1)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_distance_of_pieces(dtype: str) -> None:
    random = np.random.default_rng(0)
    right = random.normal(size=(1, 64 * 32))
    noise = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    one_token = right.copy()
    one_token[0, :32] = random.normal(size=32)
    huge, tiny, nan = right.copy(), right.copy(), right.copy()
    huge[0, 5], nan[0, 5] = 60000, np.nan
    tiny[0, 5] *= 1.001
    computed = np.concatenate([right] * 8)
    stored = np.concatenate(
        [
            right,
            right * (1 + noise * random.normal(size=right.shape)),
            tiny,
            0 * right,
            random.normal(size=right.shape),
            one_token,
            huge,
            nan,
        ]
    )
    errors = piece_errors(pieces(dtype, stored), pieces(dtype, computed), dtype)
    assert errors[0] == 0
    assert (errors < TOLERANCES[dtype]).tolist() == [True] * 3 + [False] * 5
    assert errors[3] == 1


def test_equal_bytes_that_are_no_numbers_agree() -> None:
    raw = np.full((1, 64), 0xFF, np.uint8)
    assert piece_errors(raw, raw.copy(), "float32").tolist() == [0]


LAYOUT = KVLayout(tokens_per_block=4, device_block_tokens=2, device_block_bytes=2 * 64 * 4, shard_count=2)


@pytest.fixture
def host() -> Iterator[HostSegment]:
    segment = HostSegment.create(8, LAYOUT)
    yield segment
    segment.close()


@pytest.mark.parametrize("shard", [0, 1])
def test_shadow_copier_finds_the_slot_and_changes_nothing(
    host: HostSegment, shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_core.verify.SCRATCH_BYTES", 2 * LAYOUT.slot_bytes)  # smaller than the op
    layers = [torch.randn(16, 64) for _ in range(2)]
    slots, blocks = np.array([5, 2, 7], np.int32), np.arange(1, 7)
    op = TransferOp(1, Direction.LOAD, bytes(range(48)), slots, blocks)
    copier = CpuCopier.from_tensors(layers)
    copier.bind(host, shard)
    copier.gather(op, None)
    shadow = ShadowCopier(CpuCopier.from_tensors(layers), "float32")
    shadow.bind(host, shard)
    assert shadow.scatter(op, None, True).tolist() == [True, True, True]
    assert shadow.take_wrong(op).tolist() == [False, False, False]
    before = [layer.clone() for layer in layers]
    address = host.address + 7 * LAYOUT.slot_bytes + (shard + 1) * LAYOUT.shard_bytes - 4
    ctypes.c_float.from_address(address).value += 3  # the last value of the last layer
    assert shadow.scatter(op, None, True).tolist() == [True, True, False]
    assert shadow.take_wrong(op).tolist() == [False, False, True]
    assert all(torch.equal(layer, then) for layer, then in zip(layers, before, strict=True))
    shadow.close()


def test_expelled_block_leaves_all_tiers_and_its_slot_is_not_used_again() -> None:
    cache = GlobalCacheEngine({Tier.HOST: 6, Tier.SSD: 6})
    keys = np.random.default_rng(0).bytes(KEY_BYTES * 4)
    cache.commit_put(cache.plan_put(keys))
    write = cache.plan_write(4)
    assert write is not None
    cache.finish_write(write, np.ones(4, np.bool_))
    plan = cache.plan_get(keys)
    forgotten = cache.expel(plan, 2, Tier.HOST)
    assert forgotten.tolist() == [write.ssd_slots[2]], "its record must go as well"
    cache.finish_get(plan)
    cache.check_integrity()
    assert cache.match(keys) == 2
    assert cache.pools[Tier.HOST].quarantined_count == 1
    again = cache.plan_put(keys)
    assert again.count == 2
    assert plan.host_slots[2] not in again.slots
    cache.commit_put(again)
    cache.check_integrity()
