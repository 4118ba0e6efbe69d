"""The storage process: killed, stopped, started again, and never a wrong byte or a batch without an end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flexkv_core.cache import GlobalCacheEngine
from flexkv_core.errors import CapacityError, ConfigError
from flexkv_core.layout import KVLayout
from flexkv_core.storage.base import BlockBatch, SsdSpec
from flexkv_core.storage.catalog import BATCH_BLOCKS_MAX, Catalog, catalog_bytes
from flexkv_core.storage.directory import open_files
from flexkv_core.storage.memory import HostSegment, arrival_mark
from flexkv_core.transfer import supervisor
from flexkv_core.transfer.ring import CommandKind
from flexkv_core.transfer.storage_process import StorageProcess
from flexkv_core.transfer.supervisor import Progress
from flexkv_core.types import Slots, Tier
from tests.contract.storage.rig import CORRUPT, DROPPED, OK, Host, spec_of, words


class Rig:
    """A storage process, and what it reported by op."""

    def __init__(self, spec: SsdSpec, host: Host) -> None:
        self.host = host
        self.statuses: dict[int, np.ndarray] = {}
        self.ended: dict[int, int] = {}
        self.corrupt: list[int] = []
        self.changed = threading.Condition()
        self.process = StorageProcess(spec, host.segment, self._on_progress, self._on_corrupt)
        self.records = self.process.start()
        self.next_op = 1

    def _on_progress(self, progress: Progress) -> None:
        with self.changed:
            statuses = self.statuses[progress.op]
            assert (statuses[progress.indexes] == 99).all(), "reported twice"
            statuses[progress.indexes] = progress.statuses
            assert progress.finished == (statuses != 99).all()
            if progress.finished:
                self.ended[progress.op] = self.ended.get(progress.op, 0) + 1
            self.changed.notify_all()

    def _on_corrupt(self, slots: Slots) -> None:
        with self.changed:
            self.corrupt += slots.tolist()
            self.changed.notify_all()

    def send(self, kind: CommandKind, blocks: np.ndarray, slots: np.ndarray, host_slots: np.ndarray) -> int:
        """The op, or 0 when it was refused."""
        op, self.next_op = self.next_op, self.next_op + 1
        self.statuses[op] = np.full(len(blocks), 99, np.uint32)
        keys, places = (
            words(blocks).tobytes(),
            (np.asarray(slots, np.int32), np.asarray(host_slots, np.int32)),
        )
        if kind is CommandKind.READ:
            accepted = self.process.read(op, keys, *places)
        else:
            accepted = self.process.write(op, keys, words(blocks - 1).tobytes(), *places)
        return op if accepted else 0

    def wait(self, op: int, timeout_s: float = 30) -> np.ndarray:
        with self.changed:
            assert self.changed.wait_for(lambda: op in self.ended, timeout_s), f"op {op} has no end"
        assert self.ended[op] == 1
        return self.statuses[op]

    def write(self, blocks: np.ndarray, slots: np.ndarray) -> np.ndarray:
        host_slots = np.arange(len(blocks))
        self.host.fill(host_slots, blocks)
        return self.wait(self.send(CommandKind.WRITE, blocks, slots, host_slots))

    def read(self, blocks: np.ndarray, slots: np.ndarray, host_slots: np.ndarray) -> np.ndarray:
        return self.wait(self.send(CommandKind.READ, blocks, slots, host_slots))

    def simple(self, command: Callable[[int], bool]) -> np.ndarray:
        op, self.next_op = self.next_op, self.next_op + 1
        self.statuses[op] = np.full(1, 99, np.uint32)
        assert command(op)
        return self.wait(op)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.segment.close()


@pytest.fixture
def start(host: Host) -> Iterator[Callable[[SsdSpec], Rig]]:
    rigs: list[Rig] = []

    def start_one(spec: SsdSpec) -> Rig:
        rigs.append(Rig(spec, host))
        return rigs[-1]

    yield start_one
    for rig in rigs:
        rig.process.close()


BLOCKS = np.arange(1, 65)
SLOTS = np.arange(64)
HIGH = np.arange(64) + 64


def test_blocks_go_there_and_back(tmp_path: Path, start: Callable[[SsdSpec], Rig], host: Host) -> None:
    rig = start(spec_of(tmp_path, 2))
    assert (rig.write(BLOCKS, SLOTS) == OK).all()
    op = rig.send(CommandKind.READ, BLOCKS, SLOTS, HIGH)
    assert (rig.wait(op) == OK).all()
    assert all(host.holds(64 + i, i + 1) for i in range(64))
    assert (host.segment.arrivals[HIGH] == arrival_mark(op, ok=True)).all()
    assert rig.process.forget(SLOTS[:10].astype(np.int32))
    assert rig.simple(rig.process.flush).tolist() == [OK]
    op = rig.send(CommandKind.READ, BLOCKS, SLOTS, HIGH)
    assert rig.wait(op).tolist() == [DROPPED] * 10 + [OK] * 54
    assert (host.segment.arrivals[HIGH[:10]] == arrival_mark(op, ok=False)).all()
    assert rig.simple(rig.process.clear).tolist() == [OK]
    assert (rig.read(BLOCKS, SLOTS, HIGH) == DROPPED).all()


def test_a_stop_writes_what_was_accepted(tmp_path: Path, start: Callable[[SsdSpec], Rig], host: Host) -> None:
    rig = start(spec_of(tmp_path))
    host.fill(np.arange(64), BLOCKS)
    ops = [rig.send(CommandKind.WRITE, BLOCKS, SLOTS + 64 * i, SLOTS) for i in range(8)]
    pid = rig.process.pid
    rig.process.close()
    assert all((rig.wait(op) == OK).all() for op in ops)
    assert not Path(f"/proc/{pid}").exists()
    assert rig.send(CommandKind.READ, BLOCKS, SLOTS, HIGH) == 0
    again = start(spec_of(tmp_path))
    assert len(again.records) == 512
    assert (again.read(BLOCKS, SLOTS + 64 * 7, HIGH) == OK).all()


def test_a_stop_has_a_deadline(tmp_path: Path, start: Callable[[SsdSpec], Rig], host: Host) -> None:
    rig = start(spec_of(tmp_path))
    ops = [rig.send(CommandKind.WRITE, BLOCKS, SLOTS, SLOTS) for _ in range(60)]
    os.kill(rig.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    rig.process.close(timeout_s=0.3)
    assert time.monotonic() - started < 0.3 + supervisor.KILL_AFTER_S + 1
    assert all((rig.wait(op) != 99).all() for op in ops)


@pytest.mark.parametrize("moment", range(3))
def test_killed_under_load(tmp_path: Path, start: Callable[[SsdSpec], Rig], host: Host, moment: int) -> None:
    rig, rng = start(spec_of(tmp_path)), random.Random(moment)
    durable: dict[int, int] = {}
    unsure: set[int] = set()
    host.fill(np.arange(64), BLOCKS)
    ops: list[tuple[int, np.ndarray]] = []
    for _ in range(30):
        slots = np.random.default_rng(rng.randrange(1 << 30)).permutation(200)[:64]
        if op := rig.send(CommandKind.WRITE, BLOCKS, slots, SLOTS):
            ops.append((op, slots))
        rig.send(CommandKind.READ, BLOCKS, slots, HIGH)
    rig.wait(ops[moment][0])
    time.sleep(rng.random() * 0.05)
    os.kill(rig.process.pid, signal.SIGKILL)
    for op, slots in ops:
        for slot, block, status in zip(slots.tolist(), BLOCKS.tolist(), rig.wait(op), strict=True):
            durable.pop(slot, None)
            if status == OK:
                durable[slot] = block
                unsure.discard(slot)
            else:
                unsure.add(slot)  # may have been written after all
    rig.wait_until(lambda: rig.process.restarts == 1 and rig.process.is_up)
    rig.process.close()
    again = start(spec_of(tmp_path))
    keys = {words(np.array([block])).tobytes(): block for block in BLOCKS.tolist()}
    found = {
        slot: keys[again.records.keys[16 * i : 16 * i + 16]]
        for i, slot in enumerate(again.records.slots.tolist())
    }
    assert all(found.get(slot) == block for slot, block in durable.items() if slot not in unsure), (
        "durable blocks are lost"
    )
    for chunk in np.array_split(np.array(list(found)), 4):
        assert len(chunk)
        blocks, to = np.array([found[int(slot)] for slot in chunk]), np.arange(len(chunk))
        assert (again.read(blocks, chunk, to) == OK).all()
        assert all(host.holds(int(slot), int(block)) for slot, block in zip(to, blocks, strict=True))


def test_what_was_under_way_is_dropped_at_once(
    tmp_path: Path, start: Callable[[SsdSpec], Rig], host: Host
) -> None:
    rig = start(spec_of(tmp_path))
    rig.write(BLOCKS, SLOTS)
    os.kill(rig.process.pid, signal.SIGSTOP)
    op = rig.send(CommandKind.READ, BLOCKS, SLOTS, HIGH)
    clear = rig.next_op
    rig.statuses[clear] = np.full(1, 99, np.uint32)
    assert rig.process.clear(clear)
    started = time.monotonic()
    os.kill(rig.process.pid, signal.SIGKILL)
    assert (rig.wait(op) == DROPPED).all()
    assert time.monotonic() - started < 0.5
    assert (host.segment.arrivals[HIGH] == arrival_mark(op, ok=False)).all()
    assert rig.wait(clear).tolist() == [DROPPED]
    rig.next_op += 1
    rig.wait_until(lambda: rig.process.is_up)
    rig.wait_until(
        lambda: bool((rig.read(BLOCKS, SLOTS, HIGH) == DROPPED).all())
    )  # cleared, before any write
    assert (rig.write(BLOCKS, SLOTS) == OK).all()


def test_a_process_that_keeps_dying_stays_down(
    tmp_path: Path, start: Callable[[SsdSpec], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTARTS_MAX", 2)
    rig = start(spec_of(tmp_path))
    for restarts in (0, 1, 2):
        rig.wait_until(lambda: rig.process.is_up)
        assert rig.process.restarts == restarts
        os.kill(rig.process.pid, signal.SIGKILL)
        rig.wait_until(lambda: not rig.process.is_up)
    time.sleep(0.5)
    assert not rig.process.is_up
    assert rig.send(CommandKind.READ, BLOCKS, SLOTS, HIGH) == 0


def test_a_second_manager_is_refused(tmp_path: Path, start: Callable[[SsdSpec], Rig], host: Host) -> None:
    spec = replace(spec_of(tmp_path), lock_timeout_s=0.2)
    rig = start(spec)
    with pytest.raises(ConfigError, match=f"in use by process {rig.process.pid}"):
        Rig(spec, host)


def test_a_disk_that_is_too_small(tmp_path: Path, host: Host) -> None:
    system = os.statvfs(tmp_path)
    spec = spec_of(tmp_path, size=system.f_bavail * system.f_frsize * 2)
    with pytest.raises(CapacityError, match="ssd_bytes"):
        Rig(spec, host)
    assert not list(tmp_path.iterdir())


def test_the_scrubber_finds_rot(tmp_path: Path, start: Callable[[SsdSpec], Rig], host: Host) -> None:
    spec = spec_of(tmp_path)
    rig = start(spec)
    rig.write(BLOCKS, SLOTS)
    rig.process.close()
    data = next(tmp_path.rglob("data"))
    with data.open("r+b") as file:
        file.seek(10 * spec.layout.slot_bytes + 15_000)
        file.write(b"\xff\x00\xff")
    rig = start(replace(spec, scrub_bytes_per_s=100 << 20))
    rig.wait_until(lambda: rig.corrupt == [10])
    assert rig.read(BLOCKS, SLOTS, HIGH).tolist() == [OK] * 10 + [CORRUPT] + [OK] * 53
    assert rig.write(BLOCKS[:1], np.array([10])).tolist() == [CORRUPT]
    rig.process.close()
    assert len(start(spec).records) == 63


def test_more_is_forgotten_than_the_ring_has_room_for(
    tmp_path: Path,
) -> None:
    count = supervisor.RING_RECORDS + 5000
    small = KVLayout(16, 16, 4096, 1)
    size = count * small.slot_bytes + catalog_bytes(count, 1) + (1 << 20)
    spec = replace(spec_of(tmp_path, size=size), layout=small)
    files = open_files(spec)
    catalog = Catalog(files.catalog_path, files.slot_count, 1)
    for first in range(0, count, BATCH_BLOCKS_MAX):
        slots = np.arange(first, min(first + BATCH_BLOCKS_MAX, count), dtype=np.int32)
        keys = words(slots + 1)
        catalog.put(BlockBatch(keys, keys, slots, slots), np.ones((len(slots), 1), np.uint32))
    catalog.close()
    files.close()
    segment = HostSegment.create(1, small)
    process = StorageProcess(spec, segment, lambda progress: None)
    cache = GlobalCacheEngine({Tier.HOST: 1, Tier.SSD: process.slot_count})
    records = process.start()
    assert len(records) == count
    orphans = cache.load(records.slots, records.keys, records.parents)
    assert len(orphans) == count  # each is its own parent
    assert process.forget(orphans, timeout_s=30)
    process.close(30)
    catalog = Catalog(files.catalog_path, files.slot_count, 1)
    assert len(catalog.records()) == 0
    catalog.close()
    segment.close()


MANAGER = """
import sys, time
from pathlib import Path
from tests.contract.storage.rig import Host, spec_of
from flexkv_core.transfer.storage_process import StorageProcess
host = Host()
process = StorageProcess(spec_of(Path(sys.argv[1])), host.segment, lambda progress: None)
process.start()
print(process.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_with_its_manager(tmp_path: Path, start: Callable[[SsdSpec], Rig]) -> None:
    manager = subprocess.Popen(
        [sys.executable, "-c", MANAGER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert manager.stdout is not None
    pid = int(manager.stdout.readline())
    manager.kill()
    manager.wait()
    start(spec_of(tmp_path))  # waits for the lock
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"  # nobody may be there to reap it
