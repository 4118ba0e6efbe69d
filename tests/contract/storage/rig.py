"""A small SSD tier with a host segment whose slots are filled with known bytes."""

from __future__ import annotations

import ctypes
import select
import time
from pathlib import Path

import numpy as np

from flexkv_core.layout import KVLayout
from flexkv_core.storage.base import BlockBatch, BlockStatus, SsdSpec, Statuses
from flexkv_core.storage.checksum import slot_checksums
from flexkv_core.storage.memory import HostSegment
from flexkv_core.storage.ssd import SsdStore

MIB = 1 << 20
LAYOUT = KVLayout(16, 16, 10_000, 2)  # slots of 20 KiB, of which 480 bytes are padding
HOST_SLOTS = 128


def spec_of(
    tmp_path: Path, directories: int = 1, engine: str = "auto", size: int = 24 * MIB, scrub: int = 0
) -> SsdSpec:
    paths = tuple(str(tmp_path / f"ssd{i}") for i in range(directories))
    return SsdSpec(paths, size, {"model": "m"}, LAYOUT, engine, 16, scrub, lock_timeout_s=5)


class Host:
    """A host segment and a view of its bytes. Block *i*'s content depends on *i* only; its key is ``words(i)``."""

    def __init__(self) -> None:
        self.segment = HostSegment.create(HOST_SLOTS, LAYOUT)
        size = HOST_SLOTS * LAYOUT.slot_bytes
        raw = (ctypes.c_uint8 * size).from_address(self.segment.address)
        self.bytes = np.ctypeslib.as_array(raw).reshape(HOST_SLOTS, -1)

    def fill(self, host_slots: np.ndarray, blocks: np.ndarray) -> None:
        """Put the blocks there as a store from a device does."""
        for slot, block in zip(host_slots, blocks, strict=True):
            self.bytes[slot] = content(block)
        host_slots = np.asarray(host_slots, np.int32)
        self.segment.checksums[host_slots] = slot_checksums(
            self.segment.address, LAYOUT, host_slots, words(blocks)
        )

    def wipe(self) -> None:
        self.bytes[:] = 0
        self.segment.checksums[:] = 0

    def holds(self, host_slot: int, block: int) -> bool:
        """Whether all shards' bytes and the checksums are the block's."""
        slot = np.array([host_slot], np.int32)
        found = slot_checksums(self.segment.address, LAYOUT, slot, words(np.array([block])))
        used = LAYOUT.shard_bytes * LAYOUT.shard_count
        same = (self.bytes[host_slot, :used] == content(block)[:used]).all()
        return bool(same and (self.segment.checksums[host_slot] == found[0]).all())


def content(block: int) -> np.ndarray:
    return np.random.default_rng(int(block)).integers(0, 256, LAYOUT.slot_bytes, dtype=np.uint8)


def words(blocks: np.ndarray) -> np.ndarray:
    """uint64 [n, 2]."""
    blocks = np.asarray(blocks, np.uint64)
    return np.stack([blocks * np.uint64(0x9E3779B97F4A7C15), blocks + np.uint64(1)], axis=1)


def batch_of(blocks: np.ndarray, slots: np.ndarray, host_slots: np.ndarray) -> BlockBatch:
    blocks = np.asarray(blocks)
    return BlockBatch(
        words(blocks), words(blocks - 1), np.asarray(slots, np.int32), np.asarray(host_slots, np.int32)
    )


def read_all(store: SsdStore, batch: BlockBatch, timeout_s: float = 20) -> Statuses:
    """Statuses in the batch's order."""
    statuses = np.full(len(batch), 99, np.uint32)
    store.reader.begin(np.arange(len(batch)), batch)
    deadline = time.monotonic() + timeout_s
    while True:
        done = store.reader.finished()
        assert (statuses[done.ids] == 99).all(), "reported twice"
        statuses[done.ids] = done.statuses
        if not store.reader.pending:
            break
        assert time.monotonic() < deadline
        select.select([store.reader.fileno()], [], [], 0.05)
    assert (statuses != 99).all()
    return statuses


OK, CORRUPT, IO_ERROR, DROPPED = BlockStatus
