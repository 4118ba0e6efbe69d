"""What a tier below host memory owes that keeps blocks in numbered slots.

Two objects share such a tier: a reader and a writer, each used by one thread. The reader never waits for the writer: a commit that
syncs a disk takes milliseconds, and a request waits for reads only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import KVLayout
from flexkv_core.types import KEY_BYTES, Slots


class BlockStatus(IntEnum):
    """How a read or write of one block ended. The values travel in completion records."""

    OK = 0  # a read: the bytes are in the host slot and match their checksum; a write: they are durable
    CORRUPT = 1  # the slot's bytes are not what was written: the slot is in quarantine and must not be used again in this run
    IO_ERROR = 2  # the system refused; the slot may be used again
    DROPPED = 3  # not done: the slot does not hold that block (any more), or the process ended first


Statuses = npt.NDArray[np.uint32]
"""BlockStatus values, shape [blocks]."""


@dataclass(frozen=True)
class BlockBatch:
    """Blocks to move between host slots and slots of the tier.

    Attributes:
        keys: uint64 [n, 2], the 16 bytes of each BlockKey as two words in memory order.
        parents: uint64 [n, 2], the key before each in its chain; used by writes only.
        slots: int32 [n], of the tier. No slot occurs twice.
        host_slots: int32 [n].
    """

    keys: npt.NDArray[np.uint64]
    parents: npt.NDArray[np.uint64]
    slots: Slots
    host_slots: Slots

    def __len__(self) -> int:
        return len(self.slots)


class Finished(NamedTuple):
    """Reads that ended: ``ids`` as they were given (int64 [n]), and their :class:`BlockStatus` (uint32 [n])."""

    ids: npt.NDArray[np.int64]
    statuses: Statuses


@dataclass(frozen=True)
class Records:
    """What a tier holds, in the order of its slots.

    Attributes:
        slots: int32 [n].
        keys, parents: ``16 * n`` bytes.
        checksums: uint32 [n, shards].
        generations: uint64 [n]; grows with every batch that was written, so it orders blocks by age.
    """

    slots: Slots
    keys: bytes
    parents: bytes
    checksums: npt.NDArray[np.uint32]
    generations: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.slots)


class BlockReader(ABC):
    """Tier -> host memory. One thread uses it."""

    @abstractmethod
    def begin(self, ids: npt.NDArray[np.int64], batch: BlockBatch) -> None:
        """Start to read. The caller keeps the host slots free of other use until each block is reported; ``ids`` are its own names
        for them. Never blocks."""

    @abstractmethod
    def finished(self) -> Finished:
        """What ended since the last call, in the order in which it did; each block once. Bytes with a wrong checksum are never
        reported as OK. The checksums of the host segment are set for what is OK."""

    @property
    @abstractmethod
    def pending(self) -> int:
        """Blocks that were begun and not reported."""

    @abstractmethod
    def fileno(self) -> int:
        """Readable when an operation has ended. Not so for a block that :meth:`begin` refused at once: the next :meth:`finished`
        reports it."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is under way."""


class BlockWriter(ABC):
    """Host memory -> tier. One thread uses it."""

    @abstractmethod
    def write(self, batch: BlockBatch) -> Statuses:
        """Write and make durable. The caller keeps the host slots unchanged meanwhile. What the slots held before is forgotten first,
        so that no crash leaves a record beside bytes of another block."""

    @abstractmethod
    def forget(self, slots: Slots) -> None:
        """Remove the records of ``slots``; durable when it returns.

        Raises:
            StorageError: the records are still there.
        """

    @abstractmethod
    def clear(self) -> None:
        """Remove all records; as :meth:`forget`."""

    @abstractmethod
    def close(self) -> None:
        """Everything durable, files closed."""


@dataclass(frozen=True)
class SsdSpec:
    """An SSD tier: where, how large, and of what.

    Attributes:
        directories: given by the user, absolute; slot *s* lies in number ``s % len``. The catalogue lies in the first.
        bytes_per_directory: bound of what FlexKV takes in each, the catalogue's share included.
        identity: what the bytes are, JSON-serialisable; data of another identity is kept apart.
        layout: of a slot.
        engine, depth: of the I/O; see :func:`flexkv_core.io.open_engine`.
        scrub_bytes_per_s: bandwidth of the scrubber, 0 for none.
        lock_timeout_s: how long to wait for another owner of the directories to end.
    """

    directories: tuple[str, ...]
    bytes_per_directory: int
    identity: dict[str, Any]
    layout: KVLayout
    engine: str = "auto"
    depth: int = 64
    scrub_bytes_per_s: int = 0
    lock_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        assert self.directories
        assert all(Path(directory).is_absolute() for directory in self.directories), self.directories

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SsdSpec:
        """The reverse of :meth:`as_dict`."""
        layout, directories = KVLayout(**values["layout"]), tuple(values["directories"])
        return cls(**{**values, "layout": layout, "directories": directories})


def key_words(keys: bytes) -> npt.NDArray[np.uint64]:
    """uint64 [n, 2] of ``16 * n`` bytes; shares their memory."""
    assert len(keys) % KEY_BYTES == 0, len(keys)
    return np.frombuffer(keys, np.uint64).reshape(-1, 2)
