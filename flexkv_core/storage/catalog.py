"""What an SSD tier holds: one record a slot, in a database that survives crashes.

The records lie in memory as one array, indexed by slot, which may be shared with another process; that is what reads look at. SQLite
keeps a copy, in write-ahead mode with a sync per commit: a row holds the records of :func:`page_records` neighbouring slots, so that a
million of them load in 0.4 s and a commit of scattered slots costs one database page each. All rows are made at the start,
so that the database never grows.

Why SQLite: measured (2 cores, a disk with 4 ms a sync) a commit of 16 scattered slots takes 3.9 ms against 7.9 ms of LMDB, which syncs
twice; 256 scattered slots 9 against 12. LMDB maps its file and trusts it, so that one flipped bit can end the process; SQLite
reports a malformed file. It needs no package.

A row carries a CRC32C over its records, seeded with its place and the epoch: what does not match is not loaded, its blocks are misses.
:meth:`Catalog.clear` begins a new epoch instead of rewriting all rows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_core import native
from flexkv_core.errors import StorageError
from flexkv_core.storage.base import BlockBatch, Records
from flexkv_core.storage.log_space import INDEX_BYTES, LogSpace
from flexkv_core.types import Slots

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
DATABASE_PAGE_BYTES = 1024
"""The unit of a commit. With 4096 a commit of 256 scattered slots took 21 ms instead of 9, and no load was faster (2026)."""
LOG_PAGES = 4096
"""The write-ahead log is folded into the database beyond this size."""
BATCH_BLOCKS_MAX = 4096
"""Records that one call may change: bounds the log."""

_ROW_OVERHEAD_BYTES = 72  # of a row within its database page: headers, page number, epoch, checksum
LOG_BYTES = 32 + (LOG_PAGES + BATCH_BLOCKS_MAX) * (DATABASE_PAGE_BYTES + 24)
"""What the log may become: a commit that is as large as can be, just before it is folded."""
_FIXED_BYTES = LOG_BYTES + 2 * INDEX_BYTES
_SEED = struct.Struct("<qq")  # page, epoch
_NO_EPOCH = -1
_CHECKSUM_WORD = 10  # where the checksums of a record begin, in words of 4 bytes
_LOAD_ROWS = 16384  # read at once: 16 MiB

Table = npt.NDArray[np.void]
"""Records, shape [slots], dtype :func:`record_dtype`."""


def record_dtype(shard_count: int) -> np.dtype[np.void]:
    """One record. ``generation`` 0: the slot is empty. Keys are two words in memory order, so that they compare quickly."""
    fields = [
        ("key", "<u8", (2,)),
        ("parent", "<u8", (2,)),
        ("generation", "<u8"),
        ("checksums", "<u4", (shard_count,)),
    ]
    return np.dtype(fields)


def page_records(shard_count: int) -> int:
    """Records of one row: what fills a database page."""
    return max(1, (DATABASE_PAGE_BYTES - _ROW_OVERHEAD_BYTES) // record_dtype(shard_count).itemsize)


def catalog_bytes(slot_count: int, shard_count: int) -> int:
    """Bound of the catalogue's files on disk."""
    return _FIXED_BYTES + int(_rows_bytes(slot_count, shard_count) * 1.04)  # inner nodes of the tree


def lacking_bytes(path: Path, slot_count: int, shard_count: int) -> int:
    """What the catalogue at ``path`` may still take from the disk: nothing once it is whole and its log is reserved."""
    bound = catalog_bytes(slot_count, shard_count)
    if not path.exists():
        return bound
    is_whole = path.stat().st_size >= _rows_bytes(slot_count, shard_count)
    if is_whole and LogSpace(path, LOG_BYTES).is_reserved:
        return 0
    return max(0, bound - path.stat().st_blocks * 512)


def _rows_bytes(slot_count: int, shard_count: int) -> int:
    row_bytes = record_dtype(shard_count).itemsize * page_records(shard_count) + _ROW_OVERHEAD_BYTES
    pages_a_row = -(-row_bytes // DATABASE_PAGE_BYTES)
    return -(-slot_count // page_records(shard_count)) * pages_a_row * DATABASE_PAGE_BYTES


class Catalog:
    """See the module's text. Changes come from one thread, at most BATCH_BLOCKS_MAX records a call; any thread may look at :attr:`table`.

    Args:
        path: of the database; made when missing, and made anew when it is not readable or of another kind.
        slot_count: slots that the tier has now; records of others are dropped.
        shard_count: checksums a record.
        table: memory for the records, zeroed by this object; its own when None.
        read_only: change nothing on disk; for looking at the catalogue of a living process.

    Raises:
        StorageError: it can be neither read nor made; with ``read_only``, it cannot be read. Or the disk has no room for what SQLite needs to
            open it: it is left as it is.
    """

    def __init__(
        self,
        path: Path,
        slot_count: int,
        shard_count: int,
        table: Table | None = None,
        read_only: bool = False,
    ) -> None:
        self.path = path
        self.table: Table = np.zeros(slot_count, record_dtype(shard_count)) if table is None else table
        assert self.table.shape == (slot_count,), (self.table.shape, slot_count)
        assert self.table.dtype == record_dtype(shard_count)
        self.bad_pages = 0
        self._page_records = page_records(shard_count)
        self._read_only = read_only
        self._lock = threading.Lock()
        self._space = LogSpace(path, LOG_BYTES)
        self._epoch = 0
        self.table[:] = np.zeros(1, self.table.dtype)
        try:
            self._database = self._open()
        except sqlite3.Error as error:
            raise StorageError(f"catalogue {path}: {error}") from error
        self._generation = int(self.table["generation"].max(initial=0))

    def records(self) -> Records:
        """A copy of what is recorded now."""
        return records_of(self.table)

    def put(self, batch: BlockBatch, checksums: npt.NDArray[np.uint32]) -> None:
        """Record blocks; durable when it returns. ``checksums``: uint32 [n, shards].

        Raises:
            StorageError: nothing was recorded.
        """
        changed = np.zeros(len(batch), self.table.dtype)
        changed["key"], changed["parent"], changed["checksums"] = batch.keys, batch.parents, checksums
        self._generation += 1
        changed["generation"] = self._generation
        self._change(batch.slots, changed)

    def remove(self, slots: Slots) -> None:
        """Remove records; durable when it returns. Slots without a record cost nothing.

        Raises:
            StorageError: nothing was removed.
        """
        slots = slots[self.table["generation"][slots] > 0]
        if len(slots):
            changed = self.table[slots]
            changed["generation"] = 0
            self._change(slots, changed)

    def clear(self) -> None:
        """Remove all records; durable when it returns.

        Raises:
            StorageError: they are all still there.
        """
        with self._lock, self._transaction():
            self._database.execute("UPDATE meta SET value = ? WHERE name = 'epoch'", (self._epoch + 1,))
        self._epoch += 1
        self.table["generation"] = 0

    def close(self) -> None:
        """Fold the log into the database and close it. May be called twice."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._database.close()
            if not self._read_only:
                self._space.give_back()

    def _change(self, slots: Slots, changed: Table) -> None:
        assert len(slots) <= BATCH_BLOCKS_MAX, len(slots)
        before = self.table[slots]
        pages = np.unique(slots // self._page_records)
        with self._lock:
            self.table[slots] = changed
            try:
                with self._transaction():
                    self._update(pages)
            except StorageError:
                self.table[slots] = before
                raise

    def _update(self, pages: Iterable[int]) -> None:
        self._database.executemany(
            "UPDATE pages SET epoch = ?, checksum = ?, records = ? WHERE page = ?", self._rows(pages)
        )

    def _rows(self, pages: Iterable[int]) -> Iterator[tuple[int, int, bytes, int]]:
        size = self._page_records
        for page in map(int, pages):
            records = (
                self.table[page * size : (page + 1) * size].tobytes().ljust(size * self.table.itemsize, b"\0")
            )
            yield self._epoch, _checksum(page, self._epoch, records), records, page

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise StorageError(f"catalogue {self.path}: {error}") from error

    # Opening

    def _open(self) -> sqlite3.Connection:
        if self._read_only:
            database = _connect(self.path, "ro")
            self._load(database)
            return database
        try:
            if self.path.exists():
                self._space.lend()
                database = _connect(self.path, "rw")
                self._load(database)
                if self._fits(database):
                    self._space.claim()
                    return database
                database.close()
                logger.info("catalogue %s: made anew for %d slots", self.path, len(self.table))
        except (sqlite3.Error, StorageError, struct.error, ValueError, TypeError) as error:
            if isinstance(error, sqlite3.OperationalError) and _is_full(self.path.parent):
                raise StorageError(f"catalogue {self.path}: {error}: the disk is full") from error
            logger.warning(
                "catalogue %s cannot be used (%s): its blocks that could be read are kept", self.path, error
            )
        return self._create()

    def _fits(self, database: sqlite3.Connection) -> bool:
        """Whether the rows are those of this number of slots, and whole."""
        rows, last = database.execute("SELECT count(*), max(page) FROM pages").fetchone()
        slots = database.execute("SELECT value FROM meta WHERE name = 'slots'").fetchone()
        return bool(
            slots == (len(self.table),) and rows == self._row_count == last + 1 and not self.bad_pages
        )

    def _kind(self) -> dict[str, int]:
        """What must agree before rows can be read."""
        return {
            "format": FORMAT_VERSION,
            "record_bytes": self.table.itemsize,
            "page_records": self._page_records,
        }

    @property
    def _row_count(self) -> int:
        return -(-len(self.table) // self._page_records)

    def _load(self, database: sqlite3.Connection) -> None:
        meta = dict(database.execute("SELECT name, value FROM meta"))
        expected = self._kind()
        if found := {name: meta.get(name) for name in expected if meta.get(name) != expected[name]}:
            raise StorageError(f"found {found}, expected {expected}")
        self._epoch = int(meta["epoch"])
        rows = database.execute(
            "SELECT page, checksum, records FROM pages WHERE epoch = ? ORDER BY page", (self._epoch,)
        )
        while block := rows.fetchmany(_LOAD_ROWS):
            self._take(block)

    def _take(self, rows: list[tuple[int, int, bytes]]) -> None:
        """Copy whole rows into the table. Rows of another length, place or checksum are counted and left out."""
        size = self._page_records * self.table.itemsize
        column_pages, column_checksums, blobs = zip(*rows, strict=True)
        pages = np.array(column_pages, np.int64)
        right = np.fromiter(map(len, blobs), np.int64, len(rows)) == size
        if not right.all():
            blobs = tuple(blob.ljust(size, b"\0")[:size] for blob in blobs)
        joined = np.frombuffer(b"".join(blobs), np.uint8)
        seeds = np.stack([pages, np.full(len(pages), self._epoch)], axis=1).tobytes()
        found = np.zeros(len(rows), np.uint32)
        native.crc32c_slots(
            joined.ctypes.data, size, 0, size, np.arange(len(rows), dtype=np.int64), seeds, found
        )
        right &= (found == np.array(column_checksums, np.int64)) & (pages >= 0)
        self.bad_pages += int((~right).sum())
        right &= pages < self._row_count
        self._place(pages, joined.view(self.table.dtype).reshape(len(rows), self._page_records), right)

    def _place(self, pages: npt.NDArray[np.int64], records: Table, right: npt.NDArray[np.bool_]) -> None:
        size, first = self._page_records, int(pages[0])
        stop = first + len(pages)
        if (
            right.all() and stop * size <= len(self.table) and pages[-1] == stop - 1
        ):  # in order: pages are unique
            self.table[first * size : stop * size] = records.reshape(-1)
            return
        slots = (pages[right, None] * size + np.arange(size)).reshape(-1)
        inside = slots < len(self.table)
        self.table[slots[inside]] = records[right].reshape(-1)[inside]

    def _create(self) -> sqlite3.Connection:
        """A new database with what the table holds. Its name appears when it is whole."""
        for suffix in ("", "-wal", "-shm", "-journal"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        draft = self.path.with_name(self.path.name + ".new")
        draft.unlink(missing_ok=True)
        os.close(os.open(draft, os.O_CREAT | os.O_WRONLY, 0o600))
        database = _connect(draft, "draft")
        database.execute(f"PRAGMA page_size = {DATABASE_PAGE_BYTES}")
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER)")
        database.execute(
            "CREATE TABLE pages (page INTEGER PRIMARY KEY, epoch INTEGER, checksum INTEGER, records BLOB)"
        )
        self._epoch += 1
        meta = {**self._kind(), "slots": len(self.table), "epoch": self._epoch}
        database.execute("BEGIN")
        database.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        database.executemany("INSERT INTO pages VALUES (?, ?, ?, ?)", self._all_rows())
        database.execute("COMMIT")
        database.close()
        _sync(draft)
        draft.rename(self.path)
        _sync(self.path.parent)
        self.bad_pages = 0
        self._space.lend()
        database = _connect(self.path, "rw")
        self._space.claim()
        return database

    def _all_rows(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Every row in its full size, so that no later change makes the database grow."""
        size = self._page_records
        used = np.zeros(self._row_count, np.bool_)
        used[np.flatnonzero(self.table["generation"]) // size] = True
        empty = bytes(size * self.table.itemsize)
        for page in range(self._row_count):
            if used[page]:
                epoch, checksum, records, _ = next(self._rows([page]))
                yield page, epoch, checksum, records
            else:
                yield page, _NO_EPOCH, 1 << 31, empty


def records_of(table: Table) -> Records:
    """What a table of records holds."""
    slots = np.flatnonzero(table["generation"]).astype(np.int32)
    words = table.view(np.uint32).reshape(len(table), -1)[
        slots
    ]  # rows of numbers copy several times as fast as records
    keys, parents, checksums = (
        words[:, :4].tobytes(),
        words[:, 4:8].tobytes(),
        words[:, _CHECKSUM_WORD:].copy(),
    )
    return Records(slots, keys, parents, checksums, words[:, 8:_CHECKSUM_WORD].copy().view(np.uint64)[:, 0])


def _checksum(page: int, epoch: int, records: bytes) -> int:
    return native.crc32c(records, native.crc32c(_SEED.pack(page, epoch)))


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """``mode``: "ro", "rw" (a write-ahead log, a sync per commit), or "draft" (rw, nothing set yet)."""
    # A URI names the mode, so that nothing is made by accident; transactions are begun and ended by hand.
    quoted = str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    uri_mode = "ro" if mode == "ro" else "rw"
    database = sqlite3.connect(
        f"file:{quoted}?mode={uri_mode}", uri=True, isolation_level=None, check_same_thread=False
    )
    if mode == "rw":
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        database.execute("SELECT count(*) FROM meta").fetchone()  # makes the log and its index
    return database


def _is_full(folder: Path) -> bool:
    system = os.statvfs(folder)
    return system.f_bavail * system.f_frsize < INDEX_BYTES


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
