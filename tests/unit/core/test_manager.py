"""KVManager on CPU tensors: the API, and that what comes back is what went in or a miss."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from flexkv_core import KVManager, KVResponseStatus
from flexkv_core.errors import CapacityError, ClosedError
from flexkv_core.keys import hash_tokens
from tests.unit.core.device import BLOCK_TOKENS, Device, places

STATUS = KVResponseStatus


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def manager(device: Device) -> KVManager:
    manager = device.manager()
    yield manager
    device.copier.hold.set()
    manager.blocks.check_integrity()
    manager.shutdown()


def tokens(blocks: int, seed: int = 0, tail: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50000, blocks * BLOCK_TOKENS + tail)


def put(manager: KVManager, device: Device, ids: np.ndarray, blocks: list[int]) -> None:
    for index, block in enumerate(blocks):
        device.fill(block, int(ids[: (index + 1) * BLOCK_TOKENS].sum()))
    task = manager.put_async(ids, np.resize(places(blocks), len(ids)))
    assert manager.wait(task)[task].status is STATUS.SUCCESS


def load(manager: KVManager, device: Device, ids: np.ndarray, blocks: list[int]) -> int:
    """Load what is found into ``blocks``, check the bytes; how many blocks came."""
    task, mask = manager.get_match(ids)
    manager.launch([task], [places(blocks)[: mask.sum()]])
    response = manager.wait(task)[task]
    count = int(response.return_mask.sum()) // BLOCK_TOKENS
    for index in range(count):
        assert device.holds(blocks[index], int(ids[: (index + 1) * BLOCK_TOKENS].sum()))
    return count


def test_what_went_in_comes_back_elsewhere(manager: KVManager, device: Device) -> None:
    ids = tokens(5, tail=3)
    put(manager, device, ids, [1, 2, 3, 4, 5])
    assert load(manager, device, ids, [20, 11, 12, 30, 14]) == 5
    assert load(manager, device, np.concatenate([ids[:48], tokens(2, seed=9)]), [40, 41, 42, 43, 44]) == 3
    counters = manager.counters()
    assert (counters.stored_blocks, counters.loaded_blocks, counters.hit_tokens) == (5, 8, 8 * BLOCK_TOKENS)


def test_int32_and_int64_tokens_are_the_same(manager: KVManager, device: Device) -> None:
    ids = tokens(3)
    put(manager, device, ids, [1, 2, 3])
    assert load(manager, device, ids.astype(np.int32), [4, 5, 6]) == 3


def test_masks_say_what_moves(manager: KVManager, device: Device) -> None:
    ids = tokens(4, tail=5)
    task, mask = manager.put_match(ids)
    assert mask.tolist() == [True] * 64 + [False] * 5
    manager.launch([task], [places([1, 2, 3, 4])])
    assert manager.wait(task)[task].return_mask.tolist() == mask.tolist()
    again, mask = manager.put_match(ids)
    assert not mask.any()
    assert manager.try_wait(again)[again].status is STATUS.SUCCESS
    wanted = np.arange(len(ids)) >= 32
    task, mask = manager.get_match(ids, wanted)
    assert mask.tolist() == [False] * 32 + [True] * 32 + [False] * 5
    manager.cancel(task)


def test_put_mask_limits_what_is_stored(manager: KVManager, device: Device) -> None:
    ids = tokens(4)
    task, mask = manager.put_match(ids, np.arange(64) < 40)
    assert mask.sum() == 32
    manager.launch([task], [places([1, 2])])
    manager.wait(task)
    # The caller holds the last block only, and the third is not cached: nothing can be stored.
    task, mask = manager.put_match(ids, np.arange(64) >= 48)
    assert not mask.any()


def test_namespaces_do_not_share(manager: KVManager, device: Device) -> None:
    ids = tokens(2)
    task = manager.put_async(ids, places([1, 2]), namespace=["tenant a"])
    manager.wait(task)
    for namespace, expected in ((["tenant a"], 32), (["tenant b"], 0), (None, 0)):
        task, mask = manager.get_match(ids, namespace=namespace)
        assert mask.sum() == expected
        manager.cancel(task)


def test_block_in_flight_is_not_found(manager: KVManager, device: Device) -> None:
    ids = tokens(2)
    device.copier.hold.clear()
    task = manager.put_async(ids, places([1, 2]))
    assert not manager.get_match(ids)[1].any()
    assert manager.try_wait(task)[task].status is STATUS.UNREADY
    assert manager.wait(task, timeout=0.05)[task].status is STATUS.TIMEOUT
    device.copier.hold.set()
    assert manager.wait(task)[task].status is STATUS.SUCCESS
    assert manager.wait(task)[task].status is STATUS.NOTFOUND
    found, mask = manager.get_match(ids)
    assert mask.all()
    manager.cancel(found)


def test_failed_store_leaves_nothing_behind(manager: KVManager, device: Device) -> None:
    ids = tokens(3)
    device.copier.fail = True
    task = manager.put_async(ids, places([1, 2, 3]))
    response = manager.wait(task)[task]
    assert response.status is STATUS.FAILED
    assert not response.return_mask.any()
    assert manager.usage()[0] == 0
    device.copier.fail = False
    put(manager, device, ids, [1, 2, 3])


def test_failed_load_is_a_miss_and_can_be_tried_again(manager: KVManager, device: Device) -> None:
    ids = tokens(3)
    put(manager, device, ids, [1, 2, 3])
    device.copier.fail = True
    assert load(manager, device, ids, [4, 5, 6]) == 0
    device.copier.fail = False
    assert load(manager, device, ids, [4, 5, 6]) == 3


def corrupt(manager: KVManager, slot: int) -> None:
    import ctypes

    address = manager.host.address + slot * manager.layout.slot_bytes + 100
    byte = ctypes.c_uint8.from_address(address)
    byte.value ^= 1


def test_flipped_bit_is_a_miss_and_the_block_leaves(manager: KVManager, device: Device) -> None:
    ids = tokens(4)
    put(manager, device, ids, [1, 2, 3, 4])
    task, _ = manager.get_match(ids)
    slot = int(manager.blocks._tasks[task].slots[2])
    manager.cancel(task)
    corrupt(manager, slot)
    assert load(manager, device, ids, [5, 6, 7, 8]) == 2
    assert manager.counters().corrupt_blocks == 1
    assert load(manager, device, ids, [5, 6, 7, 8]) == 2  # the third is not found any more
    put(manager, device, ids, [1, 2, 3, 4])
    assert load(manager, device, ids, [9, 10, 11, 12]) == 4


def test_swapped_slots_are_noticed(manager: KVManager, device: Device) -> None:
    """The checksum is seeded with the key: whole bytes of another block do not pass."""
    ids = tokens(2)
    put(manager, device, ids, [1, 2])
    task, _ = manager.get_match(ids)
    first, second = manager.blocks._tasks[task].slots
    manager.cancel(task)
    import ctypes

    size, base = manager.layout.slot_bytes, manager.host.address
    bytes_of = lambda slot: ctypes.string_at(base + int(slot) * size, size)  # noqa: E731
    one, two = bytes_of(first), bytes_of(second)
    ctypes.memmove(base + int(first) * size, two, size)
    ctypes.memmove(base + int(second) * size, one, size)
    checksums = manager.host.checksums
    checksums[[first, second]] = checksums[[second, first]]
    assert load(manager, device, ids, [5, 6]) == 0
    assert manager.counters().corrupt_blocks == 2


def test_cancel_before_and_after_launch(manager: KVManager, device: Device) -> None:
    ids = tokens(2)
    task, _ = manager.put_match(ids)
    manager.cancel(task)
    assert manager.wait(task)[task].status is STATUS.CANCELLED
    assert manager.usage()[0] == 0
    device.copier.hold.clear()
    running = manager.put_async(tokens(1, seed=5), places([7]))
    assert device.copier.entered.wait(10)
    waiting = manager.put_async(ids, places([1, 2]))
    manager.cancel([running, waiting])
    device.copier.hold.set()
    statuses = manager.wait([running, waiting])
    assert {response.status for response in statuses.values()} == {STATUS.CANCELLED}
    assert manager.usage()[0] == 1  # the one that ran was written whole, and is kept


def test_reset_forgets_even_what_is_being_written(manager: KVManager, device: Device) -> None:
    put(manager, device, tokens(2), [1, 2])
    device.copier.hold.clear()
    task = manager.put_async(tokens(2, seed=3), places([3, 4]))
    manager.reset()
    device.copier.hold.set()
    manager.wait(task)
    for seed in (0, 3):
        assert load(manager, device, tokens(2, seed=seed), [5, 6]) == 0
    assert manager.usage()[0] == 0


def test_prefix_longer_than_the_pool_stores_what_fits(device: Device) -> None:
    manager = device.manager(slots=4)
    ids = tokens(10)
    put(manager, device, ids, list(range(10)))
    assert load(manager, device, ids, list(range(20, 30))) == 4
    assert manager.counters().dropped_blocks == 6
    manager.blocks.check_integrity()
    manager.shutdown()


def test_larger_blocks_than_the_device_has(device: Device) -> None:
    manager = device.manager(tokens_per_block=4 * BLOCK_TOKENS)
    ids = tokens(9)
    for block in range(9):
        device.fill(block, block + 1)
    task = manager.put_async(ids, places(list(range(9))))
    assert manager.wait(task)[task].return_mask.sum() == 8 * BLOCK_TOKENS
    task, mask = manager.get_match(ids)
    assert mask.sum() == 8 * BLOCK_TOKENS
    manager.launch([task], [places(list(range(20, 28)))])
    manager.wait(task)
    assert all(device.holds(20 + block, block + 1) for block in range(8))
    manager.shutdown()


def test_part_of_a_larger_block_is_left_alone(device: Device) -> None:
    """What the device holds already may be shared by others: a load must not write there."""
    manager = device.manager(tokens_per_block=4 * BLOCK_TOKENS)
    ids = tokens(8)
    for block in range(8):
        device.fill(block, block + 1)
    manager.wait(manager.put_async(ids, places(list(range(8)))))
    keys, done = hash_tokens(manager.root, ids, 4 * BLOCK_TOKENS), threading.Event()
    for start, skipped in ((0, 1), (1, 3)):
        task, count = manager.blocks.get_keys(keys, start, lambda _: done.set())
        wanted = np.arange(20, 20 + 4 * count)
        wanted[:skipped] = -1
        manager.blocks.launch_blocks(task, wanted)
        assert done.wait(10)
        done.clear()
        for place in range(4 * count):
            assert device.holds(20 + place, 4 * start + place + 1) == (place >= skipped)
        for tensor in device.tensors:
            tensor[20:] = 0
    manager.shutdown()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (places([1]), "has 16 entries; expected 32"),
        (places([1, 2]) + 3, "does not follow blocks of 16 tokens"),
    ],
)
def test_bad_slot_mapping_is_refused(manager: KVManager, mapping: np.ndarray, message: str) -> None:
    task, _ = manager.put_match(tokens(2))
    with pytest.raises(ValueError, match=message):
        manager.launch([task], [mapping])
    assert manager.wait(task)[task].status is STATUS.CANCELLED


def test_bad_tokens_and_masks_are_refused(manager: KVManager) -> None:
    with pytest.raises(ValueError, match="found float64"):
        manager.get_match(np.zeros(16))
    with pytest.raises(ValueError, match=r"token_mask: found bool of shape \(8,\)"):
        manager.get_match(tokens(1), np.zeros(8, bool))


def test_host_tier_too_small_for_one_block(device: Device) -> None:
    with pytest.raises(CapacityError, match="too small for one block of 16 tokens"):
        device.manager(slots=0)


def test_life(device: Device) -> None:
    manager = device.manager()
    assert manager.is_ready()
    manager.shutdown()
    manager.shutdown()
    assert not manager.is_ready()
    assert not manager.get_match(tokens(2))[1].any()
    task = manager.put_async(tokens(2), places([1, 2]))
    assert manager.wait(task)[task].status is STATUS.SUCCESS  # nothing to store
    with pytest.raises(ClosedError):
        manager.start()


def test_threads_get_only_what_was_put(device: Device) -> None:
    """Eight threads, a small pool, shared prefixes: whatever comes back has the right bytes."""
    device = Device(blocks=8 * 16)
    manager = device.manager(slots=40)
    errors: list[BaseException] = []

    def run(worker: int) -> None:
        rng = random.Random(worker)
        mine = list(range(worker * 16, worker * 16 + 16))
        try:
            for _ in range(60):
                ids = np.concatenate(
                    [tokens(rng.randrange(1, 5), seed=rng.randrange(4)), tokens(3, seed=rng.randrange(20))]
                )
                count = len(ids) // BLOCK_TOKENS
                if rng.random() < 0.5:
                    put_mine(ids, mine[:count])
                else:
                    load(manager, device, ids, mine[:count])
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    def put_mine(ids: np.ndarray, blocks: list[int]) -> None:
        for index, block in enumerate(blocks):
            device.fill(block, int(ids[: (index + 1) * BLOCK_TOKENS].sum()))
        task = manager.put_async(ids, places(blocks))
        manager.wait(task)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    manager.blocks.check_integrity()
    assert manager.counters().loaded_blocks > 50
    manager.shutdown()
