"""What every I/O engine owes: see flexkv_core/io/base.py."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from flexkv_core.errors import ClosedError
from flexkv_core.io import Completions, IoEngine, IoKind, make_ops
from tests.contract.io.disk import BLOCK_BYTES, BLOCKS, ENGINES, FAILING, HANGING, Disk, Make, open_disk

DEPTH = 4
ALL = np.arange(BLOCKS)
PATIENCE_S = 20.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with open_disk(tmp_path) as disk:
        yield disk


@pytest.fixture(params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest, disk: Disk) -> Iterator[IoEngine]:
    with ENGINES[request.param]([disk.fd], DEPTH, [disk.region]) as engine:
        yield engine


def _finish(engine: IoEngine) -> dict[int, int]:
    """Results by tag of all that is pending; each tag once."""
    done = engine.wait(engine.pending, PATIENCE_S)
    assert engine.pending == 0
    assert len(set(done.tags.tolist())) == len(done.tags)
    return dict(zip(done.tags.tolist(), done.results.tolist(), strict=True))


def _fill(disk: Disk, engine: IoEngine) -> npt.NDArray[np.uint8]:
    """Writes all blocks; returns what they hold, and clears the memory."""
    disk.move(engine, IoKind.WRITE, ALL)
    assert _finish(engine) == dict.fromkeys(range(BLOCKS), BLOCK_BYTES)
    content: npt.NDArray[np.uint8] = disk.memory.copy()
    disk.memory[:] = 0
    return content


def test_moves_every_byte_of_more_operations_than_the_depth(engine: IoEngine, disk: Disk) -> None:
    content = _fill(disk, engine)
    np.testing.assert_array_equal(disk.content(), content)
    disk.move(engine, IoKind.READ, ALL[::-1])
    assert _finish(engine) == dict.fromkeys(range(BLOCKS), BLOCK_BYTES)
    np.testing.assert_array_equal(disk.memory, content)


def test_takes_many_batches_before_any_is_fetched(engine: IoEngine, disk: Disk) -> None:
    content = _fill(disk, engine)
    numbers = {disk.move(engine, IoKind.READ, [block]) for block in range(BLOCKS)}
    assert len(numbers) == BLOCKS
    assert engine.pending == BLOCKS
    assert len(_finish(engine)) == BLOCKS
    np.testing.assert_array_equal(disk.memory, content)


def test_returns_at_least_what_was_waited_for(engine: IoEngine, disk: Disk) -> None:
    disk.move(engine, IoKind.WRITE, ALL)
    first = engine.wait(10, PATIENCE_S)
    assert len(first.tags) >= 10
    assert engine.pending == BLOCKS - len(first.tags)
    rest = engine.wait(10 * BLOCKS, PATIENCE_S)
    assert sorted([*first.tags.tolist(), *rest.tags.tolist()]) == list(range(BLOCKS))


def test_waits_for_nothing_when_nothing_is_pending(engine: IoEngine) -> None:
    engine.submit(IoKind.READ, make_ops([], [], [], []), BLOCK_BYTES)
    start = time.monotonic()
    done = engine.wait(5)
    assert time.monotonic() - start < 1
    assert (str(done.tags.dtype), str(done.results.dtype), len(done.tags)) == ("int64", "int32", 0)


def test_syncs(engine: IoEngine, disk: Disk) -> None:
    _fill(disk, engine)
    engine.submit(IoKind.SYNC, make_ops(0, 0, 0, 77))
    assert _finish(engine) == {77: 0}


def test_tells_errors_by_operation(engine: IoEngine, disk: Disk) -> None:
    _fill(disk, engine)
    beyond = BLOCKS * BLOCK_BYTES
    offsets = [0, beyond, BLOCK_BYTES, beyond - BLOCK_BYTES // 2]
    ops = make_ops(0, offsets, disk.region.address + np.arange(4) * BLOCK_BYTES, np.arange(4))
    engine.submit(IoKind.READ, ops, BLOCK_BYTES)
    assert _finish(engine) == {0: BLOCK_BYTES, 1: -errno.ENODATA, 2: BLOCK_BYTES, 3: -errno.ENODATA}


@pytest.mark.parametrize("name", sorted(HANGING))
def test_tells_what_the_kernel_refuses(name: str, disk: Disk, tmp_path: Path) -> None:
    read_only = os.open(tmp_path / "data", os.O_RDONLY)
    try:
        with HANGING[name]([disk.fd, read_only], DEPTH, [disk.region]) as engine:
            engine.submit(
                IoKind.WRITE,
                make_ops([0, 1, 0], 0, [disk.region.address] * 2 + [4096], [5, 6, 7]),
                BLOCK_BYTES,
            )
            assert _finish(engine) == {5: BLOCK_BYTES, 6: -errno.EBADF, 7: -errno.EFAULT}
    finally:
        os.close(read_only)


@pytest.mark.parametrize(
    ("kind", "field", "value", "length"),
    [
        (IoKind.READ, "file", 1, BLOCK_BYTES),
        (IoKind.READ, "file", -1, BLOCK_BYTES),
        (IoKind.WRITE, "offset", -4096, BLOCK_BYTES),
        (IoKind.WRITE, "tag", 0, 0),
        (IoKind.READ, "tag", 0, 1 << 31),
    ],
)
@pytest.mark.parametrize("name", ["uring", "threads"])
def test_refuses_a_bad_batch_whole(
    name: str, kind: IoKind, field: str, value: int, length: int, disk: Disk
) -> None:
    with ENGINES[name]([disk.fd], DEPTH, []) as engine:
        ops = make_ops(0, ALL * 4096, disk.region.address, ALL)
        ops[field][3] = value
        with pytest.raises(ValueError, match=f"{field}|length"):
            engine.submit(kind, ops, length)
        assert engine.pending == 0


def test_descriptor_tells_of_completions(engine: IoEngine, disk: Disk) -> None:
    disk.move(engine, IoKind.WRITE, ALL[:2])  # finished, perhaps, before anybody asks
    time.sleep(0.02)
    tags: list[int] = []
    fd = engine.fileno()
    disk.move(engine, IoKind.WRITE, ALL[2:])
    end = time.monotonic() + PATIENCE_S
    while len(tags) < BLOCKS and time.monotonic() < end:
        assert select.select([fd], [], [], PATIENCE_S)[0]
        tags += engine.wait(0, 0).tags.tolist()
    assert sorted(tags) == list(range(BLOCKS))


def test_late_work_is_withdrawn(engine: IoEngine, disk: Disk) -> None:
    disk.move(engine, IoKind.WRITE, ALL, deadline_s=0.0)
    results = _finish(engine)
    assert len(results) == BLOCKS
    assert set(results.values()) <= {-errno.ETIMEDOUT, BLOCK_BYTES}
    assert list(results.values()).count(-errno.ETIMEDOUT) >= BLOCKS - DEPTH


def test_a_deadline_that_is_met_changes_nothing(engine: IoEngine, disk: Disk) -> None:
    disk.move(engine, IoKind.WRITE, ALL, deadline_s=PATIENCE_S)
    assert _finish(engine) == dict.fromkeys(range(BLOCKS), BLOCK_BYTES)


def test_close_ends_what_is_under_way_and_can_be_repeated(engine: IoEngine, disk: Disk) -> None:
    disk.move(engine, IoKind.WRITE, ALL)
    engine.close()
    engine.close()
    with pytest.raises(ClosedError):
        disk.move(engine, IoKind.WRITE, ALL)
    with pytest.raises(ClosedError):
        engine.wait()
    os.fstat(disk.fd)


class Hang:
    """An engine of depth 2 whose two operations under way hang, and eight that wait behind them."""

    def __init__(self, make: Make, disk: Disk, deadline_s: float | None) -> None:
        self.disk = disk
        self._read_end, self._write_end = os.pipe()
        self.engine = make([disk.fd, self._read_end], 2, [disk.region])
        # Later than the others': io_uring can call a read of a pipe back, which makes room for what is not late yet.
        hang_deadline_s = None if deadline_s is None else 2 * deadline_s
        addresses = disk.region.address + np.arange(2) * BLOCK_BYTES
        self.batch = self.engine.submit(
            IoKind.READ, make_ops(1, 0, addresses, [100, 101]), 512, hang_deadline_s
        )
        self.engine.wait(0, 0)
        self.behind = disk.move(self.engine, IoKind.WRITE, ALL[2:10], deadline_s)

    def release(self) -> None:
        os.write(self._write_end, bytes(1024))

    def close(self) -> None:
        self.release()
        self.engine.close()
        os.close(self._read_end)
        os.close(self._write_end)


@pytest.fixture(params=sorted(HANGING))
def make_hanging(request: pytest.FixtureRequest) -> Make:
    return HANGING[request.param]


def _collect(engine: IoEngine, results: dict[int, int], done: Completions) -> None:
    results.update(zip(done.tags.tolist(), done.results.tolist(), strict=True))


def test_a_hanging_disk_keeps_no_wait(make_hanging: Make, disk: Disk) -> None:
    hang = Hang(make_hanging, disk, deadline_s=None)
    start = time.monotonic()
    assert len(hang.engine.wait(1, 0.02).tags) == 0
    assert time.monotonic() - start < PATIENCE_S
    hang.close()


def test_a_hanging_disk_keeps_no_deadline(make_hanging: Make, disk: Disk) -> None:
    start = time.monotonic()
    hang = Hang(make_hanging, disk, deadline_s=0.1)
    results: dict[int, int] = {}
    _collect(hang.engine, results, hang.engine.wait(8, PATIENCE_S))
    # Not before the deadline, and nowhere near the hang's own end (it has none until it is released).
    assert 0.1 <= time.monotonic() - start < PATIENCE_S
    assert [results[tag] for tag in range(2, 10)] == [-errno.ETIMEDOUT] * 8
    time.sleep(0.2)
    hang.release()
    _collect(hang.engine, results, hang.engine.wait(2, PATIENCE_S))
    assert {results[100], results[101]} <= {-errno.ETIMEDOUT, 512}
    hang.close()


def test_a_batch_is_cancelled_and_no_other(make_hanging: Make, disk: Disk) -> None:
    hang = Hang(make_hanging, disk, deadline_s=None)
    other = disk.move(hang.engine, IoKind.WRITE, ALL[10:14])
    hang.engine.cancel(hang.behind)
    hang.engine.cancel(999)
    results: dict[int, int] = {}
    _collect(hang.engine, results, hang.engine.wait(8, PATIENCE_S))
    assert results == dict.fromkeys(range(2, 10), -errno.ECANCELED)
    hang.engine.cancel(hang.batch)
    hang.release()
    _collect(hang.engine, results, hang.engine.wait(6, PATIENCE_S))
    assert {results[100], results[101]} <= {-errno.ECANCELED, 512}
    assert [results[tag] for tag in range(10, 14)] == [BLOCK_BYTES] * 4
    hang.engine.cancel(other)
    assert hang.engine.pending == 0
    hang.close()


@pytest.mark.parametrize("name", ["uring", "threads"])
def test_a_signal_is_handled_while_waiting(name: str, disk: Disk) -> None:
    hang = Hang(HANGING[name], disk, deadline_s=None)
    seen: list[int] = []

    def alarm(number: int, frame: object) -> None:
        seen.append(number)
        hang.release()

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        assert len(hang.engine.wait(10, PATIENCE_S).tags) == 10
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen
    hang.close()


@pytest.mark.parametrize("name", sorted(FAILING))
def test_what_is_told_as_done_is_done(name: str, disk: Disk) -> None:
    with FAILING[name]([disk.fd], DEPTH, [disk.region]) as engine:
        disk.move(engine, IoKind.WRITE, ALL)
        written = _finish(engine)
        assert len(written) == BLOCKS
        assert set(written.values()) >= {BLOCK_BYTES, -errno.EIO, -errno.ENOSPC}
        done = [tag for tag, result in written.items() if result == BLOCK_BYTES]
        content = disk.memory.copy()
        np.testing.assert_array_equal(disk.content()[done], content[done])
        disk.memory[:] = 0
        disk.move(engine, IoKind.READ, done)
        read = _finish(engine)
        good = [tag for tag, result in read.items() if result == BLOCK_BYTES]
        assert 0 < len(good) < len(done)
        np.testing.assert_array_equal(disk.memory[good], content[good])


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done_each_operation_completes_once(engine: IoEngine, disk: Disk, seed: int) -> None:
    rng = np.random.default_rng(seed)
    submitted: Counter[int] = Counter()
    told: Counter[int] = Counter()
    batches = [0]
    for _ in range(60):
        step = rng.integers(4)
        if step <= 1:
            blocks = rng.integers(0, BLOCKS, rng.integers(0, 12))
            kind = IoKind(int(rng.integers(3)))
            deadline_s = float(rng.choice([0.0, 0.001, 10.0])) if rng.integers(2) else None
            batches.append(disk.move(engine, kind, blocks, deadline_s))
            submitted.update(blocks.tolist())
        elif step == 2:
            engine.cancel(int(rng.choice(batches)))
        else:
            told.update(engine.wait(int(rng.integers(0, 8)), float(rng.choice([0.0, 0.002]))).tags.tolist())
        assert engine.pending == submitted.total() - told.total()
    told.update(engine.wait(engine.pending, PATIENCE_S).tags.tolist())
    assert told == submitted
