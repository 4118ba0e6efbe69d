"""What the engine hands out. Frozen: a plan is a promise about slots, and its end is told to the engine, not written into it."""

from __future__ import annotations

from dataclasses import dataclass

from flexkv_core.types import KEY_BYTES, Slots


@dataclass(frozen=True)
class Lease:
    """Keeps slots from being reused until it is given back; ``lease_id`` is never used twice by one engine."""

    lease_id: int


@dataclass(frozen=True, eq=False)
class GetPlan:
    """Where the blocks of a prefix lie.

    ``blocks``: length of the longest prefix that some tier has, counted from the sequence's first block.
    ``host_slots``: int32 of shape [max(0, blocks - start_block)], for blocks ``start_block`` … ``blocks - 1``; -1 where only a lower
    tier has the block. ``lease`` is None when there is nothing to load (the array is empty then).
    """

    lease: Lease | None
    start_block: int
    blocks: int
    host_slots: Slots
    sequence_keys: bytes

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
    blocks_evicted: int = 0
    blocks_invalidated: int = 0  # left the tree because a block at or above them failed its checksum
    resets: int = 0
