"""The model of power losses: what was synced stays, the rest is there or not, sector by sector."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from flexkv_core.io import IoEngine, IoKind, make_ops, open_engine
from flexkv_core.io.faults import FaultPlan, FaultyEngine
from flexkv_core.io.power_loss import PowerLossLog
from tests.contract.io.disk import BLOCK_BYTES, BLOCKS, Disk, open_disk


@dataclass
class Stage:
    disk: Disk
    engine: IoEngine
    log: PowerLossLog

    def write(self, blocks: list[int], value: int, fetch: bool = True) -> None:
        self.disk.memory[blocks] = value
        self.disk.move(self.engine, IoKind.WRITE, blocks)
        if fetch:
            self.engine.wait(len(blocks), 10)

    def sync(self) -> None:
        self.engine.submit(IoKind.SYNC, make_ops(0, 0, 0, 0))
        self.engine.wait(self.engine.pending, 10)

    def units(self, block: int, unit_bytes: int) -> npt.NDArray[np.uint8]:
        """The value of each unit of a block; all bytes of a unit are the same."""
        units = self.disk.content()[block].reshape(-1, unit_bytes)
        assert (units == units[:, :1]).all()
        first: npt.NDArray[np.uint8] = units[:, 0]
        return first


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with open_disk(tmp_path) as disk:
        log = PowerLossLog([disk.fd])
        with FaultyEngine(open_engine("auto", [disk.fd], 8), FaultPlan(), log) as engine:
            yield Stage(disk, engine, log)
        log.close()


def test_what_was_synced_stays(stage: Stage) -> None:
    stage.write(list(range(BLOCKS)), 1)
    stage.sync()
    assert stage.log.volatile_bytes == 0
    assert stage.log.cut(512) == 0
    assert (stage.disk.content() == 1).all()


def test_what_was_not_synced_can_be_lost_whole(stage: Stage) -> None:
    stage.write([0, 1], 1)
    stage.sync()
    stage.write([1, 2], 2)
    assert stage.log.volatile_bytes == 2 * BLOCK_BYTES
    assert stage.log.cut(4096) == 2 * BLOCK_BYTES // 4096
    assert [stage.units(block, 4096)[0] for block in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("unit_bytes", [512, 4096])
def test_what_was_not_synced_is_torn(stage: Stage, unit_bytes: int) -> None:
    stage.write(list(range(16)), 1)
    stage.sync()
    stage.write(list(range(16)), 2)
    stage.write(list(range(8)), 3)
    lost = stage.log.cut(unit_bytes, random.Random(1))
    assert 0 < lost < 16 * BLOCK_BYTES // unit_bytes
    assert {int(value) for block in range(8) for value in stage.units(block, unit_bytes)} == {1, 2, 3}
    assert {int(value) for block in range(8, 16) for value in stage.units(block, unit_bytes)} == {1, 2}


def test_a_failed_write_does_not_undo_a_later_one(stage: Stage) -> None:
    """What failed was never told and is in no sync; a later write to its place is."""
    stage.write([0, 1, 2], 1)
    stage.sync()
    stage.disk.memory[0:3] = 2
    stage.log.started(1000, IoKind.WRITE, 0, 0, stage.disk.memory.ctypes.data, 3 * BLOCK_BYTES)  # and fails
    stage.write([1], 3)
    stage.sync()
    assert stage.log.volatile_bytes == 2 * BLOCK_BYTES
    stage.log.cut(4096)
    assert [int(stage.units(block, 4096)[0]) for block in range(3)] == [1, 3, 1]


def test_a_sync_does_not_cover_what_nobody_was_told_of(stage: Stage) -> None:
    stage.write([0], 1, fetch=False)
    stage.sync()
    stage.log.cut(4096)
    assert (stage.disk.content()[0] == 0).all()
