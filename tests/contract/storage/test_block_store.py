"""What every store of blocks in slots owes, on each I/O engine and number of directories."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_core.errors import ConfigError, StorageError
from flexkv_core.io.faults import Fault, FaultPlan, FaultyEngine
from flexkv_core.io.power_loss import PowerLossLog
from flexkv_core.io.probe import open_engine
from flexkv_core.storage.base import SsdSpec
from flexkv_core.storage.ssd import SsdStore, find_runs
from tests.contract.storage.rig import (
    CORRUPT,
    DROPPED,
    HOST_SLOTS,
    IO_ERROR,
    LAYOUT,
    OK,
    Host,
    batch_of,
    read_all,
    spec_of,
)

VARIANTS = [("threads", 1), ("uring", 1), ("auto", 3)]


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.segment.close()


@pytest.fixture(params=VARIANTS, ids=lambda variant: f"{variant[0]}-{variant[1]}")
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> SsdSpec:
    engine, directories = request.param
    return spec_of(tmp_path, directories, engine)


@pytest.fixture
def store(spec: SsdSpec, host: Host) -> Iterator[SsdStore]:
    try:
        store = SsdStore(spec, host.segment)
    except ConfigError as error:
        pytest.skip(str(error))
    yield store
    store.close()


def write(store: SsdStore, host: Host, blocks: np.ndarray, slots: np.ndarray) -> np.ndarray:
    host_slots = np.arange(len(blocks))
    host.fill(host_slots, blocks)
    return store.writer.write(batch_of(blocks, slots, host_slots))


def flip(store: SsdStore, slot: int, byte: int = 1234) -> None:
    places = store.files.places
    where = np.array([slot], np.int32)
    path = store.files.folders[int(places.files(where)[0])] / "data"
    with path.open("r+b") as file:
        file.seek(int(places.offsets(where)[0]) + byte)
        old = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([old[0] ^ 4]))


@pytest.mark.parametrize("order", ["neighbours", "scattered"])
def test_what_was_written_is_read(store: SsdStore, host: Host, order: str) -> None:
    count = HOST_SLOTS
    rng = np.random.default_rng(0)
    slots = np.arange(count) + 7 if order == "neighbours" else rng.permutation(store.files.slot_count)[:count]
    blocks = np.arange(1000, 1000 + count)
    assert (write(store, host, blocks, slots) == OK).all()
    host.wipe()
    to = np.arange(count) if order == "neighbours" else rng.permutation(count)
    assert (read_all(store, batch_of(blocks, slots, to)) == OK).all()
    assert all(host.holds(slot, block) for slot, block in zip(to, blocks, strict=True))


def test_a_file_system_that_takes_no_direct_access(
    spec: SsdSpec, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The page cache is used: what was written is there, and is found again."""
    really_open = os.open

    def refusing(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really_open(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", refusing)
    caplog.set_level("INFO")
    blocks, slots = np.arange(1, 31), np.random.default_rng(1).permutation(60)[:30]
    for is_again in (False, True):
        try:
            store = SsdStore(spec, host.segment)
        except ConfigError as error:
            pytest.skip(str(error))
        assert not store.files.direct
        assert "takes no O_DIRECT; the page cache is used" in caplog.text
        if not is_again:
            assert (write(store, host, blocks, slots) == OK).all()
        host.wipe()
        assert (read_all(store, batch_of(blocks, slots, np.arange(30))) == OK).all()
        assert all(host.holds(place, block) for place, block in enumerate(blocks))
        store.close()


def test_neighbours_move_together(store: SsdStore) -> None:
    step = store.files.places.directory_count
    slots = np.array([0, step, 2 * step, 100, 100 + step, 50])
    runs = find_runs(
        store.files.places, LAYOUT.slot_bytes, batch_of(slots, slots, np.array([4, 5, 6, 7, 9, 10]))
    )
    assert runs.starts.tolist() == [0, 3, 4, 5]
    assert runs.counts.tolist() == [3, 1, 1, 1]
    many = np.arange(120)
    runs = find_runs(store.files.places, LAYOUT.slot_bytes, batch_of(many, many * step, many))
    assert runs.counts.tolist() == [51, 51, 18]  # at most 1 MiB


def test_a_slot_that_holds_another_block(store: SsdStore, host: Host) -> None:
    assert (write(store, host, np.array([1, 2]), np.array([10, 11])) == OK).all()
    wanted = batch_of(np.array([1, 3, 4]), np.array([10, 11, 12]), np.array([20, 21, 22]))
    assert read_all(store, wanted).tolist() == [OK, DROPPED, DROPPED]
    assert host.holds(20, 1)


def test_reuse_and_forget(store: SsdStore, host: Host) -> None:
    assert write(store, host, np.array([1]), np.array([5])).tolist() == [OK]
    assert write(store, host, np.array([2]), np.array([5])).tolist() == [OK]
    both = batch_of(np.array([1, 2]), np.array([5, 5]), np.array([20, 21]))
    assert read_all(store, both).tolist() == [DROPPED, OK]
    store.writer.forget(np.array([5, 6], np.int32))
    assert read_all(store, both).tolist() == [DROPPED, DROPPED]


def test_clear(store: SsdStore, host: Host) -> None:
    write(store, host, np.arange(1, 21), np.arange(20))
    store.writer.clear()
    assert len(store.catalog.records()) == 0
    assert write(store, host, np.array([50]), np.array([3])).tolist() == [OK]
    assert store.catalog.records().slots.tolist() == [3]


def test_everything_recorded_survives(spec: SsdSpec, host: Host) -> None:
    try:
        store = SsdStore(spec, host.segment)
    except ConfigError as error:
        pytest.skip(str(error))
    write(store, host, np.arange(1, 31), np.arange(30))
    store.close()
    store = SsdStore(spec, host.segment)
    records = store.catalog.records()
    assert records.slots.tolist() == list(range(30))
    host.wipe()
    batch = batch_of(np.arange(1, 31), np.arange(30), np.arange(30))
    assert records.keys == batch.keys.tobytes()
    assert records.parents == batch.parents.tobytes()
    assert (read_all(store, batch) == OK).all()
    assert all(host.holds(i, i + 1) for i in range(30))
    store.close()


@pytest.mark.parametrize("byte", [0, 9_999, 10_000, 19_999])
def test_a_flipped_bit_is_found_and_its_slot_not_used_again(store: SsdStore, host: Host, byte: int) -> None:
    write(store, host, np.arange(1, 31), np.arange(30))
    flip(store, 17, byte)
    batch = batch_of(np.arange(1, 31), np.arange(30), np.arange(30) + 40)
    host.segment.checksums[57] = 0
    statuses = read_all(store, batch)
    assert np.flatnonzero(statuses).tolist() == [17]
    assert statuses[17] == CORRUPT
    assert (host.segment.checksums[57] == 0).all()  # what arrived is not vouched for
    assert store.take_quarantined().tolist() == [17]
    assert read_all(store, batch)[17] == CORRUPT
    assert write(store, host, np.array([99, 100]), np.array([16, 17])).tolist() == [OK, CORRUPT]


def test_more_reads_than_may_be_under_way(
    store: SsdStore, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_core.storage.ssd.IN_FLIGHT_MAX", 16)
    count = 100
    write(store, host, np.arange(1, count + 1), np.arange(count))
    host.wipe()
    for _ in range(3):
        assert (
            read_all(store, batch_of(np.arange(1, count + 1), np.arange(count), np.arange(count))) == OK
        ).all()
    assert all(host.holds(i, i + 1) for i in range(count))


def faulty(spec: SsdSpec, host: Host, plan: FaultPlan, logs: list[PowerLossLog] | None = None) -> SsdStore:
    """A store over an engine that fails; the second engine that it opens is the writer's."""

    def make(files, region):  # type: ignore[no-untyped-def]
        log = None
        if logs is not None:
            log = PowerLossLog(files.fds)
            logs.append(log)
        return FaultyEngine(open_engine("threads", files.fds, spec.depth, [region]), plan, log)

    return SsdStore(spec, host.segment, open_io=make)


@pytest.mark.parametrize("directories", [1, 2])
def test_failing_writes_are_not_recorded(tmp_path: Path, host: Host, directories: int) -> None:
    rates = {Fault.IO_ERROR: 0.05, Fault.NO_SPACE: 0.05, Fault.SHORT: 0.2, Fault.INTERRUPTED: 0.2}
    spec = spec_of(tmp_path, directories)
    store = faulty(spec, host, FaultPlan(rates, reorder=True, seed=3))
    rng, seen = np.random.default_rng(0), set[int]()
    expected: dict[int, int] = {}
    for turn in range(12):
        slots = rng.permutation(200)[:64]
        blocks = np.arange(64) + 1 + turn * 64
        statuses = write(store, host, blocks, slots)
        seen |= set(statuses.tolist())
        for slot, block, status in zip(slots.tolist(), blocks.tolist(), statuses, strict=True):
            expected.pop(slot, None)
            if status == OK:
                expected[slot] = block
        assert store.catalog.records().slots.tolist() == sorted(expected)
    assert seen == {OK, IO_ERROR}
    slots, blocks = np.array(list(expected)), np.array(list(expected.values()))
    held = slots[:100], blocks[:100]
    statuses = read_all(store, batch_of(held[1], held[0], np.arange(len(held[0]))))
    assert set(statuses.tolist()) == {OK, IO_ERROR}  # reads fail as well, but never give wrong bytes
    assert all(host.holds(i, held[1][i]) for i in np.flatnonzero(statuses == OK))
    store.close()


@pytest.mark.parametrize("unit", [512, 4096])
def test_power_loss(tmp_path: Path, host: Host, unit: int) -> None:
    """Data that was not synced is lost or torn; what the catalogue holds is whole."""
    spec, rng = spec_of(tmp_path), random.Random(unit)
    durable: dict[int, int] = {}
    for turn in range(4):
        logs: list[PowerLossLog] = []
        rates = {Fault.SHORT: 0.2, Fault.IO_ERROR: 0.05}
        store = faulty(spec, host, FaultPlan(rates, reorder=True, seed=turn), logs)
        for part in range(4):
            slots = np.random.default_rng(rng.randrange(1 << 30)).permutation(100)[:40]
            blocks = np.arange(40) + 1 + 40 * (part + 4 * turn)
            if part == 3:  # the catalogue cannot be written: the data stay unrecorded
                store.catalog.close()
                assert (write(store, host, blocks, slots) == IO_ERROR).all()
                continue
            statuses = write(store, host, blocks, slots)
            for slot, block, status in zip(slots.tolist(), blocks.tolist(), statuses, strict=True):
                durable.pop(slot, None)
                if status == OK:
                    durable[slot] = block
        store.reader.close()
        store.writer.close()
        logs[1].cut(unit, rng)
        store.files.close()
        store = SsdStore(spec, host.segment)
        records = store.catalog.records()
        assert records.slots.tolist() == sorted(durable)
        blocks = np.array([durable[slot] for slot in records.slots.tolist()])
        assert (read_all(store, batch_of(blocks, records.slots, np.arange(len(blocks)))) == OK).all()
        store.close()
        for log in logs:
            log.close()


def test_a_catalogue_that_fails_keeps_the_data_untouched(
    store: SsdStore, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, host, np.array([1]), np.array([5]))

    def refuse(slots: object) -> None:
        raise StorageError("disk full")

    monkeypatch.setattr(store.catalog, "remove", refuse)
    assert write(store, host, np.array([2]), np.array([5])).tolist() == [IO_ERROR]
    assert read_all(store, batch_of(np.array([1]), np.array([5]), np.array([9]))).tolist() == [OK]
    assert host.holds(9, 1)


def test_a_host_of_another_layout(tmp_path: Path, host: Host) -> None:
    spec = dataclasses.replace(spec_of(tmp_path), layout=dataclasses.replace(LAYOUT, shard_count=1))
    with pytest.raises(AssertionError):
        SsdStore(spec, host.segment)
