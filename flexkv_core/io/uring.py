"""I/O by io_uring: a whole batch per call into the C extension, without the GIL while the kernel works or is waited for."""

from __future__ import annotations

import errno
import logging
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import ClosedError
from flexkv_core.io.base import IO_OP, PAGE_BYTES, Completions, IoEngine, IoKind, IoOps, Region

if TYPE_CHECKING:
    from flexkv_core.native import _native

logger = logging.getLogger(__name__)

PIECE_BYTES_MAX = 1 << 30  # Linux registers no more as one buffer (EFAULT above)
PIECES_MAX = 16_384  # nor more buffers than that
_CAP_IPC_LOCK = 14  # capabilities(7): locked memory without a limit


class UringEngine(IoEngine):
    """The contract over one ring.

    Memory in ``regions`` is registered, which pins it and spares the kernel 2-5 times the processor time on reads. An operation that
    crosses from one registered piece of 1 GiB into the next, or lies elsewhere, is done without.
    """

    name = "uring"

    def __init__(self, files: Sequence[int], depth: int, regions: Sequence[Region] = ()) -> None:
        """As :func:`~flexkv_core.io.probe.open_engine`.

        Raises:
            OSError: this host refuses io_uring (EPERM, EACCES, ENOSYS), its kernel is older than 5.11 (EOPNOTSUPP), or the extension
                was built without it (ENOSYS).
        """
        self._ring = _uring_class()(np.asarray(files, np.int32).data, depth)
        self._is_open = True
        self.is_registered = bool(regions) and self._register(regions)

    def submit(self, kind: IoKind, ops: IoOps, length: int = 0, deadline_s: float | None = None) -> int:
        """Queue the batch, and hand over to the kernel as much as the depth allows."""
        self._check_open()
        if ops.dtype != IO_OP:
            raise ValueError(f"ops must be an array of IO_OP, not of {ops.dtype}")
        return self._ring.submit(kind, ops.data, length, -1.0 if deadline_s is None else max(0.0, deadline_s))

    def wait(self, min_count: int = 1, timeout_s: float | None = None) -> Completions:
        """Keep the ring filled until enough has finished; other Python threads run meanwhile."""
        self._check_open()
        tags, results = self._ring.wait(min_count, -1.0 if timeout_s is None else max(0.0, timeout_s))
        return Completions(np.frombuffer(tags, np.int64), np.frombuffer(results, np.int32))

    def cancel(self, batch: int) -> None:
        """Empty the queue of this batch, and ask the kernel to stop its operations."""
        self._check_open()
        self._ring.cancel(batch)

    @property
    def pending(self) -> int:
        """Queued, under way, or not yet fetched."""
        return self._ring.pending

    def fileno(self) -> int:
        """An eventfd that the kernel writes to; registered at the first call, so who never polls does not pay for it."""
        self._check_open()
        return self._ring.fileno()

    def close(self) -> None:
        """Wait for the kernel and unpin the memory."""
        self._is_open = False
        self._ring.close()

    def inject(self, results: npt.NDArray[np.int32]) -> None:
        """For tests: let the next completions report these results; a negative errno, or at most so many bytes (2**31 - 1: the
        truth)."""
        self._ring.inject(results.data)

    def _check_open(self) -> None:
        if not self._is_open:
            raise ClosedError("the I/O engine was closed")

    def _register(self, regions: Sequence[Region]) -> bool:
        pieces = registration_pieces(regions)
        wanted, limit = sum(region.size_bytes for region in regions), memlock_limit_bytes()
        if limit is not None and wanted > limit:
            logger.warning(
                "io_uring: buffers are not registered, which costs processor time: %d bytes would have to be locked and RLIMIT_MEMLOCK"
                " allows %d; raise it (ulimit -l, LimitMEMLOCK=, --ulimit memlock=-1) or grant CAP_IPC_LOCK",
                wanted,
                limit,
            )
            return False
        if len(pieces) > PIECES_MAX:
            logger.warning(
                "io_uring: buffers are not registered: %d pieces, at most %d", len(pieces), PIECES_MAX
            )
            return False
        try:
            self._ring.register_buffers(pieces.reshape(-1).data)
        except OSError as error:
            logger.warning(
                "io_uring: buffers are not registered, which costs processor time: %s", error.strerror
            )
            return False
        return True


def registration_pieces(regions: Sequence[Region]) -> npt.NDArray[np.int64]:
    """What to register for ``regions``, shape [pieces, 2]: start and end of each, ascending, whole pages, at most 1 GiB each."""
    pieces = []
    for region in sorted(regions, key=lambda region: region.address):
        assert region.address % PAGE_BYTES == 0, region
        assert region.size_bytes > 0, region
        end = region.address + region.size_bytes
        starts = range(region.address, end, PIECE_BYTES_MAX)
        pieces += [(start, min(start + PIECE_BYTES_MAX, end)) for start in starts]
    return np.array(pieces, np.int64).reshape(-1, 2)


def memlock_limit_bytes() -> int | None:
    """How much this process may lock; None where nothing limits it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1:
            return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _uring_class() -> type[_native.Uring]:
    try:
        from flexkv_core.native import _native

        return _native.Uring
    except (ImportError, AttributeError) as error:
        raise OSError(errno.ENOSYS, "the C extension was built without io_uring") from error
