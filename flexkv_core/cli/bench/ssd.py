"""Reads and writes of blocks on a disk, in turns with fio at the same size and depth on the same file; and with a busy Python thread.

Disks of shared machines are throttled in time, so only ratios inside a round mean anything: each figure is a ratio of medians over
rounds in which fio and the engine took turns, the first turn alternating.

The kind of memory decides too: 4 KiB pages lie scattered, and a disk that is handed 64 pieces for one block may reach half of what it does
with one (seen on a virtio disk). Both sides so use huge pages here; ``small_pages_ratio`` tells what a host tier without them costs.
"""

from __future__ import annotations

import gc
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_core.cli.bench.fio import Rate, find_fio, run_fio
from flexkv_core.io import IoEngine, IoKind, Region, make_ops, open_engine
from flexkv_core.transfer.child import SWITCH_S

KIB, MIB = 1 << 10, 1 << 20
SIZES = {"256k": 256 * KIB, "1m": MIB, "4m": 4 * MIB}
DEPTH = 64  # of fio too; the default of io_queue_depth
BATCH = 4 * DEPTH  # blocks of a submission: what a prompt of some thousand tokens has
KINDS = {"read": IoKind.READ, "write": IoKind.WRITE}


@dataclass(frozen=True)
class Scale:
    """How much work: a file of ``file_bytes``, and ``total_bytes`` moved in each turn of ``rounds``."""

    file_bytes: int
    total_bytes: int
    rounds: int


FULL = Scale(file_bytes=2 << 30, total_bytes=1 << 30, rounds=7)
QUICK = Scale(file_bytes=256 * MIB, total_bytes=128 * MIB, rounds=1)


def run(quick: bool = False) -> dict[str, float | bool]:
    """All figures; needs fio, and a disk whose file system takes O_DIRECT."""
    scale = QUICK if quick else FULL
    find_fio()
    results: dict[str, float | bool] = {}
    with _workplace(scale) as place:
        for size_name, block_bytes in SIZES.items():
            for kind_name, kind in KINDS.items():
                results |= _against_fio(place, scale, f"{kind_name}_{size_name}", kind, block_bytes)
        for size_name in ("256k", "1m"):
            results |= _with_busy_thread(place, scale, size_name)
        results["small_pages_ratio"] = _with_small_pages(place, scale)
    results["engine_is_uring"] = place.engine.name == "uring"
    results["cpu_us_per_op"] = results["read_256k_cpu_us_per_op"]
    return results


@dataclass(frozen=True)
class _Place:
    path: Path
    engine: IoEngine
    address: int
    small_address: int  # of as much memory in 4 KiB pages, for blocks of 256 KiB


@contextmanager
def _workplace(scale: Scale) -> Iterator[_Place]:
    """A file that was written once, and memory of one block for each operation under way, as fio has."""
    huge = _memory(DEPTH * max(SIZES.values()), mmap.MAP_PRIVATE)
    huge_region = Region(int(huge.ctypes.data), huge.size)
    small = _memory(DEPTH * SIZES["256k"], mmap.MAP_SHARED)  # as the host tier's segment without huge_pages
    small_region = Region(int(small.ctypes.data), small.size)
    with tempfile.TemporaryDirectory(dir=_directory(), prefix="flexkv-bench-") as folder:
        path = Path(folder, "data")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(fd, 0, scale.file_bytes)
            with open_engine("auto", [fd], DEPTH, [huge_region, small_region]) as engine:
                place = _Place(path, engine, huge_region.address, small_region.address)
                _move(
                    place,
                    IoKind.WRITE,
                    max(SIZES.values()),
                    np.arange(0, scale.file_bytes, max(SIZES.values())),
                )
                os.fsync(fd)
                yield place
        finally:
            os.close(fd)


def _memory(size_bytes: int, kind: int) -> npt.NDArray[np.uint8]:
    """Filled; in huge pages where it is private and the system gives them."""
    memory = mmap.mmap(-1, size_bytes, kind | mmap.MAP_ANONYMOUS)
    if kind == mmap.MAP_PRIVATE:
        memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    pages = np.frombuffer(memory, np.uint8)
    pages[:] = np.resize(np.random.default_rng(1).integers(0, 256, MIB, np.uint8), size_bytes)
    return pages


def _directory() -> Path:
    """Where a file may be opened past the page cache: the folder for temporary files, or else the current one."""
    for folder in (Path(tempfile.gettempdir()), Path.cwd()):
        try:
            with tempfile.NamedTemporaryFile(dir=folder) as probe:
                os.close(os.open(probe.name, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            continue
        return folder
    return Path.cwd()


def _against_fio(
    place: _Place, scale: Scale, name: str, kind: IoKind, block_bytes: int
) -> dict[str, float | bool]:
    def ours() -> Rate:
        return _measure(place, kind, block_bytes, scale)

    def fio() -> Rate:
        write = kind is IoKind.WRITE
        return run_fio(place.path, scale.file_bytes, write, block_bytes, DEPTH, scale.total_bytes)

    mine, theirs = _in_turns(scale.rounds, ours, fio)
    speed, fio_speed = (statistics.median(rate.bytes_per_s for rate in rates) for rates in (mine, theirs))
    return {
        f"{name}_ratio": speed / fio_speed,
        f"{name}_gb_per_s": speed / 1e9,
        f"{name}_cpu_us_per_op": statistics.median(rate.cpu_us_per_op for rate in mine),
        f"{name}_fio_cpu_us_per_op": statistics.median(rate.cpu_us_per_op for rate in theirs),
    }


def _with_busy_thread(place: _Place, scale: Scale, size_name: str) -> dict[str, float | bool]:
    def idle() -> Rate:
        return _measure(place, IoKind.READ, SIZES[size_name], scale)

    def busy() -> Rate:
        with _busy_thread():
            return idle()

    alone, shared = _in_turns(scale.rounds, idle, busy)
    speeds = [statistics.median(rate.bytes_per_s for rate in rates) for rates in (alone, shared)]
    return {f"read_{size_name}_busy_gil_ratio": speeds[1] / speeds[0]}


def _with_small_pages(place: _Place, scale: Scale) -> float:
    def read(address: int) -> Callable[[], Rate]:
        return lambda: _measure(replace(place, address=address), IoKind.READ, SIZES["256k"], scale)

    huge, small = _in_turns(scale.rounds, read(place.address), read(place.small_address))
    return statistics.median(r.bytes_per_s for r in small) / statistics.median(r.bytes_per_s for r in huge)


def _in_turns(
    rounds: int, first: Callable[[], Rate], second: Callable[[], Rate]
) -> tuple[list[Rate], list[Rate]]:
    rates: tuple[list[Rate], list[Rate]] = ([], [])
    for number in range(rounds):
        turns = ((0, first), (1, second)) if number % 2 == 0 else ((1, second), (0, first))
        for index, turn in turns:
            rates[index].append(turn())
    return rates


def _measure(place: _Place, kind: IoKind, block_bytes: int, scale: Scale) -> Rate:
    rng = np.random.default_rng()
    count = scale.total_bytes // block_bytes
    offsets = rng.integers(0, scale.file_bytes // block_bytes, count) * block_bytes
    gc.collect()
    start, cpu = time.perf_counter(), time.process_time()
    _move(place, kind, block_bytes, offsets)
    seconds = time.perf_counter() - start
    return Rate(scale.total_bytes / seconds, (time.process_time() - cpu) * 1e6 / count)


def _move(
    place: _Place, kind: IoKind, block_bytes: int, offsets: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> None:
    """In batches, two of them submitted at a time."""
    buffers = np.arange(offsets.size) % DEPTH * block_bytes
    ops = make_ops(0, offsets, place.address + buffers, np.arange(offsets.size))
    for start in range(0, offsets.size, BATCH):
        place.engine.submit(kind, ops[start : start + BATCH], block_bytes)
        _check(place, place.engine.pending - BATCH, block_bytes)
    _check(place, place.engine.pending, block_bytes)


def _check(place: _Place, count: int, block_bytes: int) -> None:
    if count > 0:
        results = place.engine.wait(count).results
        if (results != block_bytes).any():
            raise OSError(-int(results.min()), "the disk failed in the benchmark")


@contextmanager
def _busy_thread() -> Iterator[None]:
    """A thread that never gives the interpreter up by itself; it is taken away as often as in the storage process."""
    stop = False
    interval_s = sys.getswitchinterval()

    def spin() -> None:
        while not stop:
            sum(range(100))

    thread = threading.Thread(target=spin, daemon=True)
    sys.setswitchinterval(SWITCH_S)
    thread.start()
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)
        stop = True
        thread.join()
