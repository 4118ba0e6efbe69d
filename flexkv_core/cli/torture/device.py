"""A paged cache in numpy memory whose blocks hold what their keys say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core import native
from flexkv_core.layout import DeviceSegments, KVLayout
from flexkv_core.storage.base import key_words
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import STORE_PIECE_BYTES, TransferOp

BLOCK_TOKENS = 16
BLOCK_BYTES = 16 << 10
LAYOUT = KVLayout(BLOCK_TOKENS, BLOCK_TOKENS, BLOCK_BYTES)
"""Slots without padding: a slot's bytes are exactly :func:`content` of its key."""

_SEGMENTS = 2
_PIECE_BYTES = BLOCK_BYTES // _SEGMENTS
_PLACES = np.arange(BLOCK_BYTES // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

Bytes = npt.NDArray[np.uint8]


def content(keys: bytes) -> Bytes:
    """uint8 [n, BLOCK_BYTES]: what the blocks of ``keys`` must hold. Every word tells the key and the place."""
    words = key_words(keys)
    filled: npt.NDArray[np.uint64] = (_PLACES[None, :] ^ words[:, :1]) * np.uint64(
        0xD6E8FEB86659FD93
    ) + words[:, 1:]
    return filled.view(np.uint8)


def wrong_bytes(found: Bytes, keys: bytes) -> int:
    """How many bytes of ``found`` (uint8 [n, BLOCK_BYTES]) are not what ``keys`` say."""
    expected = content(keys)
    # Compared as words first: this runs over everything that is read.
    if (found.view(np.uint64) == expected.view(np.uint64)).all():
        return 0
    return int((found != expected).sum())


class NumpyDevice:
    """Implements :class:`~flexkv_core.transfer.plan.DeviceCopier` over ``block_count`` blocks of this process's memory."""

    def __init__(self, block_count: int) -> None:
        self._pieces = np.zeros((_SEGMENTS, block_count, _PIECE_BYTES), np.uint8)
        base = self._pieces.ctypes.data
        self.segments = DeviceSegments(
            addresses=np.array([base + s * block_count * _PIECE_BYTES for s in range(_SEGMENTS)], np.int64),
            strides=np.full(_SEGMENTS, _PIECE_BYTES, np.int64),
            piece_bytes=_PIECE_BYTES,
            block_count=block_count,
        )

    def fill(self, blocks: npt.NDArray[np.int64], keys: bytes) -> None:
        """Put there what ``keys`` say, as an engine that has computed them."""
        self._pieces[:, blocks] = content(keys).reshape(-1, _SEGMENTS, _PIECE_BYTES).transpose(1, 0, 2)

    def wipe(self, blocks: npt.NDArray[np.int64]) -> None:
        """So that what was there before is not mistaken for what was loaded."""
        self._pieces[:, blocks] = 0

    def read(self, blocks: npt.NDArray[np.int64]) -> Bytes:
        """uint8 [n, BLOCK_BYTES]."""
        return np.ascontiguousarray(self._pieces[:, blocks].transpose(1, 0, 2)).reshape(-1, BLOCK_BYTES)

    # DeviceCopier

    concurrent = False
    store_piece_bytes = STORE_PIECE_BYTES

    def bind(self, host: HostSegment, shard: int) -> None:
        """Use ``host``; see the protocol."""
        assert host.layout == LAYOUT
        assert shard == 0
        self._host = host

    def close(self) -> None:
        """Nothing was taken."""

    def mark(self) -> object:
        """Whatever was submitted is done."""
        return None

    def gather(self, op: TransferOp, after: object, layers: range | None = None) -> None:
        """Blocks -> slots, and their checksums; all segments are one layer; see the protocol."""
        checksums = np.empty(len(op.slots), np.uint32)
        native.gather_crc(**self._arguments(op), keys=op.keys, crc_out=checksums)
        self._host.checksums[op.slots, 0] = checksums

    def scatter(self, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        """Slots -> blocks, each checked; see the protocol."""
        ok = np.zeros(len(op.slots), np.uint8)
        expected = np.ascontiguousarray(self._host.checksums[op.slots, 0])
        native.scatter_verify(**self._arguments(op), keys=op.keys, crc_expected=expected, ok_out=ok)
        return ok.view(np.bool_)

    def scatter_layers(self, op: TransferOp, after: object, on_layer: Callable[[object], None]) -> None:
        """Slots -> blocks; all segments are one layer; see the protocol."""
        native.scatter(**self._arguments(op))
        on_layer(None)

    def follow(self, layer: object) -> None:
        """Whatever was submitted is done."""

    def _arguments(self, op: TransferOp) -> dict[str, Any]:
        return {
            "segment_addrs": self.segments.addresses,
            "block_strides": self.segments.strides,
            "piece_bytes": self.segments.piece_bytes,
            "blocks": op.blocks,
            "block_count": self.segments.block_count,
            "slot_base": self._host.address,
            "slot_stride": LAYOUT.slot_bytes,
            "slots": op.slots,
            "slot_count": self._host.slot_count,
            "blocks_per_slot": 1,
            "shard_offset": 0,
        }
