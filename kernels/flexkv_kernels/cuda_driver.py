"""The few calls of CUDA's driver that torch does not offer: copies in batches, and pinning of memory that exists.

The library is the driver's own, ``libcuda.so.1``, so that no toolkit need be installed. Signatures are those of the CUDA 13.0 Driver API,
sections 6.13 (memory management) and 6.5 (error handling).
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flexkv_core.errors import TransferError
from flexkv_kernels.streams import Addresses

logger = logging.getLogger(__name__)

PIN_PIECE_BYTES_MAX = 1 << 30
_PORTABLE_AND_MAPPED = 0x1 | 0x2  # CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP
_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class BatchAttributes(ctypes.Structure):
    """CUmemcpyAttributes. The location hints are for managed memory only and stay 0."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_location", ctypes.c_int * 2),
        ("target_location", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class CudaDriver:
    """The driver library of this process, or another of the same functions.

    Attributes:
        batches: whether it copies in batches (CUDA 12.8 and newer); otherwise each copy is a call of its own.

    Raises:
        TransferError: there is no driver.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise TransferError(f"CUDA's driver library cannot be loaded: {error}") from error
        # The second version dropped the argument that names the failed copy.
        self._batch = getattr(self._library, "cuMemcpyBatchAsync_v2", None)
        self._batch_v1 = getattr(self._library, "cuMemcpyBatchAsync", None)
        self.batches = self._batch is not None or self._batch_v1 is not None

    def copy(self, sources: Addresses, targets: Addresses, sizes: Addresses, stream: int) -> None:
        """Queue ``sizes[i]`` bytes from ``sources[i]`` to ``targets[i]`` on ``stream`` (a CUstream, not the default one)."""
        if self.batches and len(sizes) > 1:
            self._copy_batch(sources, targets, sizes, stream)
        else:
            self.copy_each(sources, targets, sizes, stream)

    def copy_each(self, sources: Addresses, targets: Addresses, sizes: Addresses, stream: int) -> None:
        """The same by one call a copy; serves pageable host memory too."""
        call, handle = self._library.cuMemcpyAsync, ctypes.c_void_p(stream)
        for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True):
            status = call(ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size), handle)
            self._check(status, "cuMemcpyAsync")

    def register(self, address: int, size_bytes: int) -> None:
        """Pin memory of this process and map it for all devices.

        Raises:
            TransferError: the driver refuses.
        """
        status = self._library.cuMemHostRegister_v2(
            ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), _PORTABLE_AND_MAPPED
        )
        self._check(status, "cuMemHostRegister")

    def kernels_reach(self, address: int) -> bool:
        """Whether a kernel reaches pinned host memory by the host's own address, as it does on all but a few platforms."""
        found = ctypes.c_uint64(0)
        status = self._library.cuMemHostGetDevicePointer_v2(ctypes.byref(found), ctypes.c_void_p(address), 0)
        self._check(status, "cuMemHostGetDevicePointer")
        return found.value == address

    def unregister(self, address: int) -> None:
        """Undo :meth:`register`."""
        self._check(self._library.cuMemHostUnregister(ctypes.c_void_p(address)), "cuMemHostUnregister")

    def _copy_batch(self, sources: Addresses, targets: Addresses, sizes: Addresses, stream: int) -> None:
        pointers = [
            np.ascontiguousarray(array, np.uint64).ctypes.data_as(ctypes.c_void_p)
            for array in (targets, sources, sizes)
        ]
        attributes = BatchAttributes(source_access_order=_STREAM_ORDER)
        first = ctypes.c_size_t(0)
        shared = (
            ctypes.c_size_t(len(sizes)),
            ctypes.byref(attributes),
            ctypes.byref(first),
            ctypes.c_size_t(1),
        )
        if self._batch is not None:
            status = self._batch(*pointers, *shared, ctypes.c_void_p(stream))
        else:
            assert self._batch_v1 is not None
            failed = ctypes.c_size_t(0)
            status = self._batch_v1(*pointers, *shared, ctypes.byref(failed), ctypes.c_void_p(stream))
        self._check(status, "cuMemcpyBatchAsync")

    def _check(self, status: int, what: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise TransferError(f"{what} failed: {(text.value or b'unknown error').decode()} ({status})")


@dataclass(frozen=True)
class PinnedRange:
    """What was pinned: ``pinned_bytes`` from ``address`` on, in pieces of ``piece_bytes``, of ``wanted_bytes``."""

    address: int
    wanted_bytes: int
    pinned_bytes: int
    piece_bytes: int
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether all of it is pinned; kernels may reach it only then."""
        return self.pinned_bytes == self.wanted_bytes


def pin(
    address: int,
    size_bytes: int,
    unit_bytes: int,
    register: Callable[[int, int], None],
    budget_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> PinnedRange:
    """Pin host memory in pieces of whole ``unit_bytes`` (a slot) and at most 1 GiB, for at most about ``budget_s``.

    Pinning touches every page, and nothing can stop the driver within a piece: the budget may be exceeded by one piece. What is left is
    used unpinned, which is slower and still right.
    """
    piece_bytes = max(1, PIN_PIECE_BYTES_MAX // unit_bytes) * unit_bytes
    started, done = clock(), 0
    while done < size_bytes:
        size = min(piece_bytes, size_bytes - done)
        if clock() - started > budget_s:
            logger.warning(
                "host tier: pinned %d of %d bytes in %.1f s, the limit", done, size_bytes, budget_s
            )
            break
        try:
            register(address + done, size)
        except TransferError as error:
            logger.warning("host tier: pinned %d of %d bytes: %s", done, size_bytes, error)
            break
        done += size
    seconds = clock() - started
    logger.info("host tier: pinned %d of %d bytes in %.2f s", done, size_bytes, seconds)
    return PinnedRange(address, size_bytes, done, piece_bytes, seconds)
