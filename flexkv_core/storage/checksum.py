"""Checksums of whole slots: one CRC32C a shard, each seeded with the block's key."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flexkv_core import native
from flexkv_core.layout import KVLayout
from flexkv_core.types import KEY_BYTES


def slot_checksums(
    address: int, layout: KVLayout, slots: npt.NDArray[np.integer], keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint32]:
    """uint32 [n, shards] of the slots at ``address + slots[i] * slot_bytes``. ``keys``: uint64 [n, 2]. Drops the GIL."""
    flat = np.ascontiguousarray(keys).tobytes()
    assert len(flat) == KEY_BYTES * len(slots), (len(flat), len(slots))
    out = np.empty((layout.shard_count, len(slots)), np.uint32)
    for shard in range(layout.shard_count):
        native.crc32c_slots(
            address,
            layout.slot_bytes,
            shard * layout.shard_bytes,
            layout.shard_bytes,
            slots,
            flat,
            out[shard],
        )
    return np.ascontiguousarray(out.T)
