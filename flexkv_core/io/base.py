"""What every I/O engine owes: whole batches in, arrays of completions out.

An engine moves fixed-size pieces between memory and files that the caller opened. It never opens, allocates or closes a file, and
never retries what the medium refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4096
"""Addresses, offsets and lengths are multiples of this for files that were opened with O_DIRECT."""

LENGTH_BYTES_MAX = (1 << 31) - PAGE_BYTES
"""What one read or write of Linux moves at most."""

IO_OP = np.dtype(
    [("tag", "<i8"), ("offset", "<i8"), ("address", "<i8"), ("file", "<i4"), ("reserved", "<i4")]
)
"""One operation: the caller's tag, where in the file, where in memory, and which of the engine's files (its index)."""

IoOps: TypeAlias = npt.NDArray[np.void]
"""Operations, dtype :data:`IO_OP`, shape [operations], C-contiguous."""


class IoKind(IntEnum):
    """What a batch does. The values are those of the C side."""

    READ = 0  # file -> memory
    WRITE = 1  # memory -> file
    SYNC = 2  # fdatasync: makes writes durable whose completion was returned before the submission; only `file` and `tag` count


@dataclass(frozen=True)
class Region:
    """Memory that operations move to and from; an engine may register it with the kernel. Operations elsewhere are legal."""

    address: int
    size_bytes: int


class Completions(NamedTuple):
    """What finished, in the order in which it did."""

    tags: npt.NDArray[np.int64]
    """As they were submitted, shape [finished]."""

    results: npt.NDArray[np.int32]
    """Shape [finished]: the length (0 of a SYNC), or a negative errno. Never less than the length: a transfer that the kernel cut
    short was continued, and failed with -ENODATA (the file ends there) or -EIO where it could not be."""


class IoEngine(ABC):
    """Reads and writes of batches, at a bounded depth.

    One thread uses an engine at a time, and a thread that submitted lives until its operations have completed. Nothing but
    :meth:`wait` and :meth:`close` blocks.

    Memory and files belong to the engine from submission until the operation's completion was returned: neither a deadline nor a
    cancellation shortens that, because a disk that is already writing to memory cannot be called back.
    """

    name: ClassVar[str]

    @abstractmethod
    def submit(self, kind: IoKind, ops: IoOps, length: int = 0, deadline_s: float | None = None) -> int:
        """Take a batch; returns its number, which no other batch of this engine has.

        At most ``depth`` operations are under way; the others wait inside, in order, and none is lost. The engine copies ``ops``.
        Operations of one batch, and of different batches, run and complete in any order.

        Args:
            kind: of all operations.
            ops: see :data:`IO_OP`; any number, also none. Each completes exactly once.
            length: bytes of each operation, > 0 (ignored for SYNC).
            deadline_s: seconds from now. What has not started by then completes with -ETIMEDOUT at the next :meth:`wait`; what is
                under way is asked to stop, and completes with -ETIMEDOUT or its true result once the kernel lets go of it.

        Raises:
            ValueError: a file that the engine does not have, a negative offset or a length out of range; nothing was taken.
            ClosedError: the engine was closed.
        """

    @abstractmethod
    def wait(self, min_count: int = 1, timeout_s: float | None = None) -> Completions:
        """Everything that finished, once at least ``min(min_count, self.pending)`` operations have, or the timeout has passed.

        Keeps the queue going: whoever polls :meth:`fileno` calls it with ``min_count=0`` whenever that is readable, and at least
        as often as deadlines shall be noticed.

        Raises:
            ClosedError: the engine was closed.
        """

    @abstractmethod
    def cancel(self, batch: int) -> None:
        """Withdraw what is left of a batch. What has not started completes with -ECANCELED at the next :meth:`wait`; what is under
        way is asked to stop, as at a deadline. An unknown or finished batch is ignored."""

    @property
    @abstractmethod
    def pending(self) -> int:
        """Operations that were submitted and whose completion :meth:`wait` has not returned."""

    @abstractmethod
    def fileno(self) -> int:
        """An eventfd, the engine's, that becomes readable when something finished and stays so until :meth:`wait` was called.
        May be readable for nothing."""

    @abstractmethod
    def close(self) -> None:
        """Withdraw what has not started, wait for what is under way, and free the engine. Completions that were not fetched are
        lost. The caller's files stay open. May be called twice."""

    def __enter__(self) -> IoEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_ops(files: Any, offsets: Any, addresses: Any, tags: Any) -> IoOps:
    """Operations from columns; each an array of one length, or one number for all."""
    columns = np.broadcast_arrays(files, offsets, addresses, tags)
    ops = np.zeros(columns[0].size, IO_OP)
    for name, column in zip(("file", "offset", "address", "tag"), columns, strict=True):
        ops[name] = column.reshape(-1)
    return ops


def check_ops(kind: IoKind, ops: IoOps, length: int, file_count: int) -> None:
    """What :meth:`IoEngine.submit` promises to refuse.

    Raises:
        ValueError: names the field, what was given and what is allowed.
    """
    if ops.dtype != IO_OP or ops.ndim != 1:
        raise ValueError(f"ops must be a 1-D array of IO_OP, not {ops.ndim}-D of {ops.dtype}")
    if kind is not IoKind.SYNC and not 0 < length <= LENGTH_BYTES_MAX:
        raise ValueError(f"length is {length}, expected 0 < length <= {LENGTH_BYTES_MAX}")
    if ops.size == 0:
        return
    files, offset_min = ops["file"], int(ops["offset"].min())
    if int(files.min()) < 0 or int(files.max()) >= file_count:
        raise ValueError(f"file is {files.min()} .. {files.max()}, expected 0 <= file < {file_count}")
    if offset_min < 0:
        raise ValueError(f"offset is {offset_min}, expected not negative")
