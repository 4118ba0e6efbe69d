"""Copies that round bfloat16 blocks to fp8 on their way into slots, and back: what the CPU's and a GPU's copier share, and the CPU's.

The exact copiers know nothing of this; :mod:`flexkv_core.quantised` says what a slot holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core import native
from flexkv_core.errors import LayoutError, TransferError
from flexkv_core.layout import DeviceSegments
from flexkv_core.quantised import QuantisedImage
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import STORE_PIECE_BYTES, TransferOp
from flexkv_core.types import Slots


def check_slots(image: QuantisedImage, host: HostSegment) -> None:
    """Refuse slots that are made for other images.

    Raises:
        LayoutError: what was found and what was expected.
    """
    layout = host.layout
    if layout.scales != image.scales or layout.device_block_bytes != image.image_bytes:
        raise LayoutError(
            f"KV tensors: found blocks of {image.segment_count} pieces of {image.piece_bytes} bytes, as fp8 {image.image_bytes} bytes with"
            f" {image.scales} scales; expected {layout.device_block_bytes} bytes with {layout.scales} scales"
        )


def finite_slots(host: HostSegment, shard: int, slots: Slots, image: QuantisedImage) -> npt.NDArray[np.bool_]:
    """bool [n]: whether every scale in a shard of ``slots`` is finite, which says that every value was."""
    layout = host.layout
    memory = (ctypes.c_uint8 * (host.slot_count * layout.slot_bytes)).from_address(host.address)
    scales: npt.NDArray[np.float32] = np.ndarray(
        (host.slot_count, layout.blocks_per_slot, image.segment_count),
        np.float32,
        memoryview(memory).cast("B"),
        shard * layout.shard_bytes + image.scales_offset,
        (layout.slot_bytes, layout.device_block_bytes, 4),
    )
    return np.asarray(np.isfinite(scales[slots]).all(axis=(1, 2)))


class QuantisingCpuCopier:
    """A :class:`~flexkv_core.transfer.plan.DeviceCopier` of bfloat16 blocks in the host's own memory; the GIL is dropped meanwhile.

    Args:
        segments: where the engine's blocks lie. ``keep_alive`` holds their memory.
        scales: what a slot has room for, at least one a segment.

    Raises:
        LayoutError: blocks that cannot be kept as fp8.
    """

    concurrent = True
    store_piece_bytes = STORE_PIECE_BYTES

    def __init__(self, segments: DeviceSegments, scales: int, keep_alive: object = None) -> None:
        self.segments = segments
        self._image = QuantisedImage.of(segments, scales)
        self._keep_alive = keep_alive

    def bind(self, host: HostSegment, shard: int) -> None:
        """Use ``host``; see the protocol.

        Raises:
            LayoutError: the slots are made for other images.
        """
        check_slots(self._image, host)
        self._host, self._shard = host, shard

    def close(self) -> None:
        """Nothing was taken."""

    def mark(self) -> object:
        """The CPU computes when it is called: what was submitted is done."""
        return None

    def follow(self, layer: object) -> None:
        """What was submitted is done."""

    def gather(
        self, op: TransferOp, after: object, layers: range | None = None
    ) -> npt.NDArray[np.bool_] | None:
        """Blocks -> slots, and the slots' checksums; False for a slot with a value that is not finite; all layers at once with the last
        ones, because a block is rounded as a whole; see the protocol."""
        if layers is not None and layers.stop < self.segments.layer_count:
            return None
        native.quantise(**self._arguments(op, slice(None)))
        self._host.checksums[op.slots, self._shard] = self._host.checksums_now(op.slots, op.keys, self._shard)
        return finite_slots(self._host, self._shard, op.slots, self._image)

    def scatter(self, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        """Slots -> blocks, each checked before; see the protocol."""
        self._refuse_what_cannot_be(op)
        ok = np.ones(len(op.slots), np.bool_)
        if verify:
            ok = self._host.matches(op.slots, op.keys, self._shard)
        if ok.any():
            part = op if ok.all() else op.part(np.flatnonzero(ok))
            native.dequantise(**self._arguments(part, slice(None)))
        return ok

    def scatter_layers(self, op: TransferOp, after: object, on_layer: Callable[[object], None]) -> None:
        """Slots -> blocks, layer by layer; see the protocol."""
        for layer in range(self.segments.layer_count):
            for run in self.segments.runs_of(layer):
                native.dequantise(**self._arguments(op, run), first_segment=run.start)
            on_layer(None)

    def _arguments(self, op: TransferOp, run: slice) -> dict[str, Any]:
        """Of the native functions, for some segments; blocks that are negative are left out."""
        self._refuse_what_cannot_be(op)
        layout = self._host.layout
        blocks = op.blocks.reshape(len(op.slots), -1)
        shards = self._host.address + op.slots.astype(np.int64) * layout.slot_bytes
        shards += self._shard * layout.shard_bytes
        images = shards[:, None] + np.arange(blocks.shape[1], dtype=np.int64) * layout.device_block_bytes
        wanted = blocks >= 0
        return {
            "segment_addrs": self.segments.addresses[run],
            "block_strides": self.segments.strides[run],
            "piece_bytes": self.segments.piece_bytes,
            "blocks": np.ascontiguousarray(blocks[wanted]),
            "block_count": self.segments.block_count,
            "images": np.ascontiguousarray(images[wanted]),
            "scales_offset": self._image.scales_offset,
            "image_bytes": self._image.image_bytes,
        }

    def _refuse_what_cannot_be(self, op: TransferOp) -> None:
        if (op.slots < 0).any() or (op.slots >= self._host.slot_count).any():
            raise TransferError(f"op {op.op_id}: a slot does not exist ({self._host.slot_count} slots)")
