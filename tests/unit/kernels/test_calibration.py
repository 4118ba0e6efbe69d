"""The table of modes, and pinning: bounded, right when cut short, and what is measured is what is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from flexkv_core.errors import TransferError
from flexkv_core.types import Direction
from flexkv_kernels.calibration import DEFAULT_MODE, TOLERANCE, ModeTable, calibrate
from flexkv_kernels.cuda_driver import PIN_PIECE_BYTES_MAX, pin
from flexkv_kernels.paths import Mode, chunk_slices, merge_runs

SIZES = (100, 1000)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_fastest_is_chosen_by_direction_and_size() -> None:
    speeds = {
        (Direction.STORE, 100): Mode.DIRECT,
        (Direction.STORE, 1000): Mode.STAGED,
        (Direction.LOAD, 100): Mode.DMA,
        (Direction.LOAD, 1000): Mode.DIRECT,
    }
    first: set[object] = set()

    def measure(direction: Direction, mode: Mode, size: int) -> float:
        if (direction, mode, size) not in first:  # the first call compiles: it must not count
            first.add((direction, mode, size))
            return 0.0 if speeds[direction, size] is not mode else 9.0
        return 1.0 if speeds[direction, size] is mode else 2.0

    table = calibrate(measure, sizes_bytes=SIZES, clock=Clock())
    assert [table.choose(Direction.STORE, size) for size in (1, 100, 999, 1000, 10**9)] == [
        Mode.DIRECT,
        Mode.DIRECT,
        Mode.DIRECT,
        Mode.STAGED,
        Mode.STAGED,
    ]
    assert [table.choose(Direction.LOAD, size) for size in (1, 999, 1000)] == [
        Mode.DMA,
        Mode.DMA,
        Mode.DIRECT,
    ]


def test_calibration_stops_at_its_budget() -> None:
    clock, calls = Clock(), []

    def measure(direction: Direction, mode: Mode, size: int) -> float:
        calls.append(mode)
        clock.now += 1.0
        return {Mode.DMA: 1.0, Mode.STAGED: 2.0, Mode.DIRECT: 3.0}[mode]

    table = calibrate(measure, sizes_bytes=SIZES, budget_s=14.0, clock=clock)
    assert len(calls) == 16  # the measurement that was under way is finished
    assert table.choose(Direction.STORE, 5000) is Mode.DMA or table.choose(Direction.LOAD, 5000) is Mode.DMA
    assert DEFAULT_MODE in {table.choose(direction, 5000) for direction in Direction}


def test_an_empty_table_has_a_default() -> None:
    assert ModeTable({}).choose(Direction.LOAD, 1) is DEFAULT_MODE


def test_pinning_goes_by_whole_slots_of_at_most_a_gibibyte() -> None:
    slot, pieces = 3 << 20, []
    size = slot * 1000
    found = pin(4096, size, slot, lambda address, count: pieces.append((address, count)), 60, Clock())
    assert found.whole
    assert found.pinned_bytes == size == sum(count for _, count in pieces)
    assert all(count % slot == 0 and count <= PIN_PIECE_BYTES_MAX for _, count in pieces)
    assert [address for address, _ in pieces] == [4096 + i * found.piece_bytes for i in range(len(pieces))]


@pytest.mark.parametrize("fails", ["refused", "slow"])
def test_pinning_that_is_cut_short_says_how_far_it_came(fails: str) -> None:
    clock, pieces = Clock(), []

    def register(address: int, count: int) -> None:
        if fails == "refused" and len(pieces) == 2:
            raise TransferError("out of memory")
        pieces.append(count)
        clock.now += 40.0 if fails == "slow" else 0.0

    found = pin(0, 5 << 30, 4096, register, 60, clock)
    assert found.pinned_bytes == 2 << 30
    assert not found.whole


@pytest.mark.parametrize(
    ("images", "run_bytes", "starts", "sizes"),
    [
        ([0, 8, 16, 32, 40], 1 << 40, [0, 32], [24, 16]),
        ([8, 0], 1 << 40, [8, 0], [8, 8]),
        ([0, 8, 16, 24], 16, [0, 16], [16, 16]),  # two pinned pieces
        ([40], 16, [40], [8]),
    ],
)
def test_images_side_by_side_become_one_copy(
    images: list[int], run_bytes: int, starts: list[int], sizes: list[int]
) -> None:
    base = 1000
    found = merge_runs(np.array(images) + base, 8, base, run_bytes)
    assert [array.tolist() for array in found] == [[start + base for start in starts], sizes]


def test_a_measurement_that_fails_is_no_silent_default() -> None:
    def measure(direction: Direction, mode: Mode, size: int) -> float:
        raise TransferError("the GPU fell off the bus")

    with pytest.raises(TransferError, match="fell off"):
        calibrate(measure, sizes_bytes=SIZES, clock=Clock())


@pytest.mark.parametrize(
    ("dma", "direct", "chosen"),
    [
        (0.99, 0.99, Mode.DMA),
        (1.01, 0.99, Mode.DIRECT),
        (1.01, 1.01, Mode.STAGED),
    ],
)
def test_what_disturbs_less_is_taken_when_it_is_nearly_as_fast(
    dma: float, direct: float, chosen: Mode
) -> None:
    seconds = {
        Mode.DMA: dma * TOLERANCE[Mode.DMA],
        Mode.STAGED: 1.0,
        Mode.DIRECT: direct * TOLERANCE[Mode.DIRECT],
    }
    table = calibrate(lambda _, mode, __: seconds[mode], sizes_bytes=SIZES, clock=Clock())
    assert {table.choose(direction, 5000) for direction in Direction} == {chosen}


def test_layers_are_never_staged() -> None:
    modes = [(0, Mode.DMA), (1000, Mode.STAGED)]
    for direction in Direction:
        table = ModeTable({direction: modes})
        assert [table.choose_for_layers(direction, size) for size in (10, 1000)] == [Mode.DMA, Mode.DIRECT]
        unreached = ModeTable({direction: modes}, direct=False)
        assert [unreached.choose_for_layers(direction, size) for size in (10, 1000)] == [Mode.DMA, Mode.DMA]


def test_what_kernels_do_not_reach_is_remembered() -> None:
    def measure(direction: Direction, mode: Mode, size: int) -> float:
        return {Mode.DMA: 9.0, Mode.STAGED: 1.0}[mode]

    table = calibrate(measure, modes=(Mode.DMA, Mode.STAGED), sizes_bytes=SIZES, clock=Clock())
    assert table.choose_for_layers(Direction.STORE, 5000) is Mode.DMA


@pytest.mark.parametrize(
    ("count", "first", "most", "sizes"),
    [(20, 2, 8, [2, 4, 8, 6]), (3, 8, 8, [3]), (3, 0, 0, [1, 1, 1]), (0, 1, 1, []), (5, 8, 2, [2, 2, 1])],
)
def test_chunks_grow(count: int, first: int, most: int, sizes: list[int]) -> None:
    slices = list(chunk_slices(count, first, most))
    assert [part.stop - part.start for part in slices] == sizes
    assert [part.start for part in slices] == [sum(sizes[:i]) for i in range(len(sizes))]
