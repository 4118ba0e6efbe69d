"""What the engine hands out. Frozen: a plan is a promise about slots, and its end is told to the engine, not written into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexkv_core.types import KEY_BYTES, Slots

NO_SLOTS: Slots = np.empty(0, dtype=np.int32)
NO_SLOTS.setflags(write=False)


@dataclass(frozen=True)
class Lease:
    """Keeps slots from being reused until it is given back; ``lease_id`` is never used twice by one engine."""

    lease_id: int


@dataclass(frozen=True, eq=False)
class Reads:
    """Blocks of a get that only the SSD has: to be read into host slots first.

    ``index``: int32 [r], ascending, places in the plan's ``host_slots``; ``ssd_slots``: int32 [r], where the bytes lie. The host slots are
    the plan's own until ``finish_get``.
    """

    index: Slots
    ssd_slots: Slots

    def __len__(self) -> int:
        return len(self.index)


NO_READS = Reads(NO_SLOTS, NO_SLOTS)


@dataclass(frozen=True, eq=False)
class GetPlan:
    """Where the blocks of a prefix lie.

    ``blocks``: length of the longest prefix that can be loaded, counted from the sequence's first block.
    ``host_slots``: int32 of shape [max(0, blocks - start_block)], for blocks ``start_block`` … ``blocks - 1``; each has its bytes there now, but
    those of ``reads``, which must be read from the SSD first. ``lease`` is None when there is nothing to load (the arrays are empty then).
    """

    lease: Lease | None
    start_block: int
    blocks: int
    host_slots: Slots
    sequence_keys: bytes
    reads: Reads = NO_READS

    @property
    def count(self) -> int:
        """Number of blocks to load."""
        return len(self.host_slots)

    @property
    def keys(self) -> bytes:
        """The keys of exactly the blocks to load, 16 bytes each."""
        return self.sequence_keys[KEY_BYTES * self.start_block : KEY_BYTES * (self.start_block + self.count)]


@dataclass(frozen=True, eq=False)
class PutPlan:
    """Where new blocks go.

    Blocks ``start_block`` … ``start_block + count - 1`` of the sequence are to be written to ``slots`` (int32 of shape [count], host
    tier); ``keys`` are the keys of exactly these blocks. Blocks before ``start_block`` are known already. Blocks behind the last one
    found no room. ``lease`` is None when count is 0.
    """

    lease: Lease | None
    start_block: int
    slots: Slots
    keys: bytes

    @property
    def count(self) -> int:
        """Number of blocks to store."""
        return len(self.slots)


@dataclass(frozen=True, eq=False)
class WritePlan:
    """Blocks to copy from host memory to the SSD, in an order in which no block comes before the one that it follows.

    ``keys``: 16 bytes a block; ``parents``: the key before each, 16 zero bytes for the first block of a sequence; ``host_slots``, ``ssd_slots``:
    int32 [n], kept until ``finish_write``.
    """

    lease: Lease
    keys: bytes
    parents: bytes
    host_slots: Slots
    ssd_slots: Slots

    @property
    def count(self) -> int:
        """Number of blocks to write."""
        return len(self.ssd_slots)


@dataclass
class CacheStats:
    """Counters since the engine was made; ``reset`` of the engine does not clear them."""

    get_plans: int = 0
    get_hits: int = 0  # get plans that found at least one block
    blocks_asked: int = 0
    blocks_hit: int = 0
    put_plans: int = 0
    blocks_known: int = 0  # blocks that a put did not have to store again
    blocks_no_room: int = 0  # blocks that a put left out because nothing more could be evicted
    blocks_published: int = 0
    blocks_dropped: int = (
        0  # planned blocks that were aborted, cut off at commit, or orphaned by an abort or a reset
    )
    blocks_evicted: int = 0  # slots of the host tier that made room; the block may still be on the SSD
    ssd_blocks_evicted: int = 0
    blocks_planned_reads: int = 0
    blocks_read: int = 0  # from the SSD, published in the host tier or a duplicate of one that was
    blocks_written: int = 0  # to the SSD, and found there since
    blocks_write_failed: int = 0
    writes_dropped: int = 0  # blocks that drop_oldest_writes took out of the queue; they are owed since
    blocks_loaded: int = 0  # by the warm start
    copies_invalidated: int = 0  # a tier lost its copy, another still has one
    blocks_invalidated: int = 0  # left the tree because a block at or above them failed its checksum
    resets: int = 0
