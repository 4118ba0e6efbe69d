"""A file, memory, and the engines that the contract suite runs on."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_core.io import IoEngine, IoKind, Region, make_ops
from flexkv_core.io.faults import Fault, FaultPlan, FaultyEngine, FaultySyscalls, injections
from flexkv_core.io.threads import ThreadEngine
from flexkv_core.io.uring import UringEngine

BLOCK_BYTES = 16 << 10
BLOCKS = 64

# What an engine must hide: it continues, starts again, waits.
HARMLESS = {Fault.SHORT: 0.3, Fault.INTERRUPTED: 0.2}
SLOW = FaultPlan({**HARMLESS, Fault.SLOW: 0.2}, slow_s=0.002, reorder=True, seed=3)
# What it must tell.
HARMFUL = {**HARMLESS, Fault.IO_ERROR: 0.1, Fault.NO_SPACE: 0.1}

Make = Callable[[Sequence[int], int, Sequence[Region]], IoEngine]


@dataclass
class Disk:
    """An open file of BLOCKS blocks, past the page cache where the file system allows, and as much memory."""

    fd: int
    memory: npt.NDArray[np.uint8]  # [BLOCKS, BLOCK_BYTES]

    @property
    def region(self) -> Region:
        return Region(int(self.memory.ctypes.data), self.memory.nbytes)

    def move(
        self, engine: IoEngine, kind: IoKind, blocks: npt.ArrayLike, deadline_s: float | None = None
    ) -> int:
        """Block i of the file from or to block i of memory, tag i."""
        ids = np.asarray(blocks, np.int64)
        ops = make_ops(0, ids * BLOCK_BYTES, self.memory.ctypes.data + ids * BLOCK_BYTES, ids)
        return engine.submit(kind, ops, BLOCK_BYTES, deadline_s)

    def content(self) -> npt.NDArray[np.uint8]:
        """What the file holds, by other means."""
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY)
        try:
            raw = os.pread(fd, self.memory.nbytes, 0)
        finally:
            os.close(fd)
        return np.frombuffer(raw, np.uint8).reshape(self.memory.shape)


@contextlib.contextmanager
def open_disk(folder: Path) -> Iterator[Disk]:
    flags = os.O_RDWR | os.O_CREAT
    try:
        fd = os.open(folder / "data", flags | os.O_DIRECT, 0o600)
    except OSError:
        fd = os.open(folder / "data", flags, 0o600)
    os.posix_fallocate(fd, 0, BLOCKS * BLOCK_BYTES)
    memory = np.frombuffer(mmap.mmap(-1, BLOCKS * BLOCK_BYTES), np.uint8).reshape(BLOCKS, BLOCK_BYTES)
    memory[:] = np.random.default_rng(0).integers(0, 256, memory.shape, np.uint8)
    try:
        yield Disk(fd, memory)
    finally:
        os.close(fd)


class PipeReads(FaultySyscalls):
    """System calls without faults that read from pipes too, as io_uring does: a pipe is a disk that hangs."""

    def __init__(self) -> None:
        super().__init__(FaultPlan())

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        try:
            return super().preadv(fd, buffers, offset)
        except OSError:
            return os.readv(fd, buffers)


def make_uring(files: Sequence[int], depth: int, regions: Sequence[Region]) -> UringEngine:
    return UringEngine(files, depth, regions)


def make_uring_unregistered(files: Sequence[int], depth: int, regions: Sequence[Region]) -> UringEngine:
    return UringEngine(files, depth)


def make_threads(files: Sequence[int], depth: int, regions: Sequence[Region]) -> ThreadEngine:
    return ThreadEngine(files, depth, PipeReads())


def make_uring_striking(rates: dict[Fault, float]) -> Make:
    """io_uring whose kernel cuts short, interrupts and fails."""

    def make(files: Sequence[int], depth: int, regions: Sequence[Region]) -> IoEngine:
        engine = UringEngine(files, depth, regions)
        engine.inject(injections(FaultPlan(rates, seed=5), IoKind.WRITE, 1000, BLOCK_BYTES))
        return engine

    return make


def make_threads_striking(rates: dict[Fault, float]) -> Make:
    """Threads whose system calls cut short, interrupt and fail."""
    return lambda files, depth, regions: ThreadEngine(files, depth, FaultySyscalls(FaultPlan(rates, seed=5)))


def wrapped(make: Make, plan: FaultPlan) -> Make:
    """The wrapper that strikes from above."""
    return lambda files, depth, regions: FaultyEngine(make(files, depth, regions), plan)


ENGINES: dict[str, Make] = {
    "uring": make_uring,
    "uring-unregistered": make_uring_unregistered,
    "threads": make_threads,
    "uring-striking": make_uring_striking(HARMLESS),
    "threads-striking": make_threads_striking(HARMLESS),
    "faulty-over-uring": wrapped(make_uring, SLOW),
    "faulty-over-threads": wrapped(make_threads, SLOW),
}

FAILING: dict[str, Make] = {
    "uring": make_uring_striking(HARMFUL),
    "threads": make_threads_striking(HARMFUL),
    "faulty-over-uring": wrapped(make_uring, FaultPlan(HARMFUL, seed=7, reorder=True)),
    "faulty-over-threads": wrapped(make_threads, FaultPlan(HARMFUL, seed=7)),
}

HANGING: dict[str, Make] = {
    "uring": make_uring,
    "threads": make_threads,
    "faulty-over-uring": wrapped(make_uring, FaultPlan()),
    "faulty-over-threads": wrapped(make_threads, FaultPlan()),
}
