"""Keeps a catalogue's space on the disk while nobody has it open, so that a full disk does not keep the tier from starting.

SQLite makes a log and its index (``-wal``, ``-shm``) when a database is opened and deletes both when it is closed. What they took
would be anyone's until the next start, and what they have not grown to yet is anyone's while they are open. So

- the log is allocated in full and has a second name, ``-reserve``: SQLite deletes the first one only. The next start gives the same file its
  first name back, emptied by zeros over its header, which needs no space.
- the index is allocated in full while it is there. When it goes, ``-spare`` takes its space, and makes way when it comes again.

A kill at any moment leaves one name or the other. Where a file system knows no hard links or has no space, the tier works without.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

INDEX_BYTES = 128 << 10
"""Of a log of up to 12,000 pages: 32 KiB for every 4,096."""
_HEADER_BYTES = 32
_SUFFIXES = ("-wal", "-shm", "-reserve", "-spare")


class LogSpace:
    """Of the database at ``path``. Call :meth:`lend` before it is opened, :meth:`claim` then, :meth:`give_back` once it is closed.

    Args:
        log_bytes: how large the log may become.
    """

    def __init__(self, path: Path, log_bytes: int) -> None:
        self._log, self._index, self._reserve, self._spare = (
            path.with_name(path.name + suffix) for suffix in _SUFFIXES
        )
        self._log_bytes = log_bytes
        self._index_fd = -1

    @property
    def is_reserved(self) -> bool:
        """Whether the log can grow to its bound on a full disk."""
        try:
            return self._reserve.stat().st_blocks * 512 >= self._log_bytes
        except FileNotFoundError:
            return False

    def lend(self) -> None:
        """Give SQLite what it needs to open the database."""
        with contextlib.suppress(OSError):
            self._spare.unlink(missing_ok=True)
            if self._reserve.exists() and not self._log.exists():
                fd = os.open(self._reserve, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.pwrite(fd, bytes(_HEADER_BYTES), 0)
                    os.fsync(fd)  # before it is a log: what it held has been folded into the database since
                finally:
                    os.close(fd)
                os.link(self._reserve, self._log)

    def claim(self) -> None:
        """Allocate both files, which exist now."""
        try:
            self._claim_log()
            # Kept open as long as SQLite locks parts of it: a process that closes any descriptor of a file loses its locks there.
            self._index_fd = os.open(self._index, os.O_RDWR | os.O_CLOEXEC)
            os.posix_fallocate(self._index_fd, 0, INDEX_BYTES)
        except OSError as error:
            logger.warning(
                "catalogue: no space is kept for its log, %s: where others fill the disk the tier may not start",
                error.strerror,
            )

    def give_back(self) -> None:
        """The database was closed: keep the index's space."""
        if self._index_fd >= 0:
            os.close(self._index_fd)
            self._index_fd = -1
        if not self._index.exists():
            with contextlib.suppress(OSError):
                _allocate(self._spare, INDEX_BYTES)

    def _claim_log(self) -> None:
        _allocate(self._log, self._log_bytes)
        if self._reserve.exists() and self._reserve.samefile(self._log):
            return
        self._reserve.unlink(missing_ok=True)
        os.link(self._log, self._reserve)


def _allocate(path: Path, size: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    finally:
        os.close(fd)
