"""The host tier's bytes: one anonymous shared-memory segment of fixed slots.

The segment is a ``memfd``: it has no name in any file system, so the kernel frees it when the last process that maps it ends, however
that ends. Other processes of the same user map it through ``/proc/<pid>/fd/<fd>``, or get the descriptor over a unix socket. Neither
the size of ``/dev/shm`` nor a container's limit on it applies. Its size is sealed: nobody can cut it under those who map it.

::

    segment = [arrivals: uint64 [slot_count]] [checksums: uint32 [slot_count, shard_count]] padding to 2 MiB, [slot 0] [slot 1] …
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_core import native
from flexkv_core.errors import CapacityError
from flexkv_core.layout import KVLayout
from flexkv_core.types import Slots

logger = logging.getLogger(__name__)

HUGE_PAGE_BYTES = 2 << 20
_MFD_HUGETLB_2MIB = 0x0004 | 21 << 26  # memfd_create(2): pages of 2^21 bytes
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_POPULATE_STEP_BYTES = 64 << 20
_HEADROOM_BYTES = 256 << 20  # left to the rest of the machine when a segment's size is checked


@dataclass(frozen=True)
class Descriptor:
    """An open file of another process of the same user. ``inode`` tells it from what its number may stand for later."""

    pid: int
    fd: int
    inode: int

    @classmethod
    def own(cls, fd: int) -> Descriptor:
        """Of this process."""
        return cls(os.getpid(), fd, os.fstat(fd).st_ino)

    def open(self, flags: int) -> int:
        """Open the same file here.

        Raises:
            OSError: its process is gone, has closed it, or may not be looked at.
        """
        fd = os.open(f"/proc/{self.pid}/fd/{self.fd}", flags | os.O_CLOEXEC)
        if os.fstat(fd).st_ino != self.inode:
            os.close(fd)
            raise FileNotFoundError(errno.ENOENT, "its owner has closed it")
        return fd


@dataclass(frozen=True)
class SegmentHandle:
    """What another process of the same user needs to map the segment.

    ``lifeline``: the writing end of a pipe, where the segment belongs to a server. Whoever maps the segment holds it open meanwhile, so that
    the server, at the other end, knows when nobody can reach the slots any more.
    """

    memory: Descriptor
    slot_count: int
    layout: KVLayout
    huge_pages: bool
    lifeline: Descriptor | None = None


class HostSegment:
    """Maps the segment; made by :meth:`create` in its owner and by :meth:`attach` elsewhere.

    Attributes:
        address: of slot 0.
        arrivals: uint64 [slot_count], which op last brought bytes from a lower tier into a slot, see :func:`arrival_mark`.
        checksums: uint32 [slot_count, shard_count], CRC32C of each shard's image, seeded with the block's key.
        checksum_threads: how many threads share a pass over the slots. One reads 11 GB/s (Xeon, AVX-512), which is enough beside a CPU's
            copies; a GPU's are five times as fast, so its copier sets more.
    """

    checksum_threads = 1

    def __init__(self, fd: int, handle: SegmentHandle, lifeline_fd: int = -1) -> None:
        slot_count, layout = handle.slot_count, handle.layout
        self.slot_count = slot_count
        self.layout = layout
        self.handle = handle
        self._fd = fd
        self._lifeline_fd = lifeline_fd
        self._closing = threading.Event()
        self._populator: threading.Thread | None = None
        header = header_bytes(slot_count, layout)
        self._map = mmap.mmap(fd, segment_bytes(slot_count, layout), mmap.MAP_SHARED)
        view = np.frombuffer(self._map, dtype=np.uint8)
        self._base = int(view.ctypes.data)
        self.address = self._base + header
        self.arrivals: npt.NDArray[np.uint64] = view[: slot_count * 8].view(np.uint64)
        view, count = view[slot_count * 8 :], slot_count * layout.shard_count
        self.checksums: npt.NDArray[np.uint32] = (
            view[: count * 4].view(np.uint32).reshape(slot_count, layout.shard_count)
        )

    @classmethod
    def create(cls, slot_count: int, layout: KVLayout, huge_pages: bool = False) -> HostSegment:
        """Allocate a segment of ``slot_count`` slots.

        Raises:
            CapacityError: the machine, the container's limit or the pool of huge pages cannot give that much.
        """
        size = segment_bytes(slot_count, layout)
        check_capacity(size, huge_pages)
        pages = _MFD_HUGETLB_2MIB if huge_pages else 0
        fd = os.memfd_create("flexkv-host-tier", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | pages)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, SegmentHandle(Descriptor.own(fd), slot_count, layout, huge_pages))
        except OSError as error:
            os.close(fd)
            raise CapacityError(f"host_bytes: mapping {size} bytes failed: {error.strerror}") from error

    @classmethod
    def adopt(
        cls, fd: int, lifeline_fd: int, slot_count: int, layout: KVLayout, huge_pages: bool
    ) -> HostSegment:
        """Map a segment whose descriptors a server has sent; both are closed by :meth:`close`, or when this raises.

        Raises:
            CapacityError: it is not of the size that was told, or cannot be mapped.
        """
        handle = SegmentHandle(
            Descriptor.own(fd), slot_count, layout, huge_pages, Descriptor.own(lifeline_fd)
        )
        return cls._mapped(fd, handle, lifeline_fd)

    @classmethod
    def attach(cls, handle: SegmentHandle) -> HostSegment:
        """Map the segment that ``handle`` names.

        Raises:
            CapacityError: its owner is gone, or this process may not open it.
        """
        lifeline_fd = -1
        try:
            if handle.lifeline is not None:  # first of all: there is no moment in which it is mapped without
                lifeline_fd = handle.lifeline.open(os.O_WRONLY | os.O_NONBLOCK)
            fd = handle.memory.open(os.O_RDWR)
        except OSError as error:
            if lifeline_fd >= 0:
                os.close(lifeline_fd)
            raise CapacityError(
                f"host segment of process {handle.memory.pid} cannot be opened: {error.strerror}; the engine's processes must run"
                " on one machine as one user"
            ) from error
        return cls._mapped(fd, handle, lifeline_fd)

    @classmethod
    def _mapped(cls, fd: int, handle: SegmentHandle, lifeline_fd: int) -> HostSegment:
        try:
            if os.fstat(fd).st_size < segment_bytes(handle.slot_count, handle.layout):
                raise ValueError(f"it has {os.fstat(fd).st_size} bytes")
            return cls(fd, handle, lifeline_fd)
        except (OSError, ValueError) as error:
            os.close(fd)
            if lifeline_fd >= 0:
                os.close(lifeline_fd)
            raise CapacityError(
                f"host segment of process {handle.memory.pid} cannot be mapped: {error}"
            ) from error

    def matches(self, slots: Slots, keys: bytes, shard: int) -> npt.NDArray[np.bool_]:
        """bool [n]: whether the bytes of a shard of ``slots``, which hold ``keys`` (16 * n bytes), still have their checksums. Reads
        them once; drops the GIL meanwhile."""
        matches: npt.NDArray[np.bool_] = (
            self.checksums_now(slots, keys, shard) == self.checksums[slots, shard]
        )
        return matches

    def checksums_now(self, slots: Slots, keys: bytes, shard: int) -> npt.NDArray[np.uint32]:
        """uint32 [n]: what the checksums of a shard of ``slots`` would be by their bytes. Drops the GIL; on :attr:`checksum_threads`
        threads."""
        found = np.empty(len(slots), np.uint32)
        offset, length = shard * self.layout.shard_bytes, self.layout.shard_bytes
        native.crc32c_slots(
            self.address, self.layout.slot_bytes, offset, length, slots, keys, found, self.checksum_threads
        )
        return found

    def populate(self) -> None:
        """Fault the pages in on a thread of its own, so that the first transfers do not pay for it (about 0.4 s a GiB)."""
        self._populator = threading.Thread(target=self._populate, name="flexkv-populate", daemon=True)
        self._populator.start()

    def close(self) -> None:
        """Unmap; the memory is freed once no process maps it. Nothing may use :attr:`address` afterwards."""
        self._closing.set()
        if self._populator is not None:
            self._populator.join()
        if self._fd < 0:
            return
        self.arrivals = np.empty(0, np.uint64)
        self.checksums = np.empty((0, 0), np.uint32)
        os.close(self._fd)
        self._fd = -1
        try:
            self._map.close()
        except BufferError:  # a view is still alive: the mapping goes with the last of them
            logger.debug("host segment: still viewed at close")
        if self._lifeline_fd >= 0:  # last of all
            os.close(self._lifeline_fd)
            self._lifeline_fd = -1

    def _populate(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        size = len(self._map)
        if not self.handle.huge_pages:
            libc.madvise(
                self._base, size, _MADV_HUGEPAGE
            )  # refused where the kernel has no transparent huge pages
        for offset in range(0, size, _POPULATE_STEP_BYTES):
            step = min(_POPULATE_STEP_BYTES, size - offset)
            if self._closing.is_set():
                return
            if libc.madvise(self._base + offset, step, _MADV_POPULATE_WRITE):
                logger.info("host segment is not populated ahead: %s", os.strerror(ctypes.get_errno()))
                return


def arrival_mark(op_id: int, ok: bool) -> int:
    """What ``arrivals`` holds for a slot once op ``op_id`` has read it from a lower tier, or has failed to."""
    return op_id << 2 | (1 if ok else 2)


def header_bytes(slot_count: int, layout: KVLayout) -> int:
    """Bytes of the two tables, whole huge pages."""
    return -(-slot_count * _slot_header_bytes(layout) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


def segment_bytes(slot_count: int, layout: KVLayout) -> int:
    """Bytes of a segment of ``slot_count`` slots, whole huge pages."""
    slots = -(-slot_count * layout.slot_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    return header_bytes(slot_count, layout) + slots


def slots_within(capacity_bytes: int, layout: KVLayout) -> int:
    """How many slots a budget of ``capacity_bytes`` holds; the tables count."""
    return max(0, (capacity_bytes - HUGE_PAGE_BYTES) // (layout.slot_bytes + _slot_header_bytes(layout)))


def check_capacity(size: int, huge_pages: bool) -> None:
    """Refuse a segment that the machine cannot give.

    Raises:
        CapacityError: with what was asked for, what there is, and what to change.
    """
    if huge_pages:
        free = _meminfo("HugePages_Free") * _meminfo("Hugepagesize") * 1024
        if size > free:
            raise CapacityError(
                f"host_bytes: {size} bytes asked for with huge_pages, {free} bytes of huge pages are free;"
                f" raise vm.nr_hugepages to at least {-(-size // HUGE_PAGE_BYTES)}, lower host_bytes, or set huge_pages to false"
            )
        return
    available = available_bytes()
    if size + _HEADROOM_BYTES > available:
        raise CapacityError(
            f"host_bytes: {size} bytes asked for, {max(0, available - _HEADROOM_BYTES)} bytes are available"
            f" ({_HEADROOM_BYTES} stay free); lower host_bytes"
        )


def available_bytes() -> int:
    """Memory that this process may still take: the machine's and its control group's, whichever is less."""
    available = _meminfo("MemAvailable") * 1024
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = Path(limit_file).read_text().strip(), Path(usage_file).read_text().strip()
        except OSError:
            continue
        if limit != "max":
            available = min(available, int(limit) - int(usage))
    return max(0, available)


def _slot_header_bytes(layout: KVLayout) -> int:
    return 8 + 4 * layout.shard_count


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    return 0
