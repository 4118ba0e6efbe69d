"""Device copiers: how blocks move between a device and the slots of the host segment.

The CPU's is here. The CUDA copier (own streams, events, pinned slots) in ``cuda_copier.py`` implements the same protocol,
:class:`flexkv_core.transfer.plan.DeviceCopier`; ``choice.py`` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flexkv_core import native
from flexkv_core.errors import LayoutError
from flexkv_core.layout import DeviceSegments
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import STORE_PIECE_BYTES, TransferOp
from flexkv_core.types import BlockIds, Slots
from flexkv_kernels.segments import pieces_of


class CpuCopier:
    """Copies in the host's own memory with the native library; the GIL is dropped meanwhile.

    Args:
        segments: where the engine's blocks lie. ``keep_alive`` holds their memory.
    """

    concurrent = True
    store_piece_bytes = STORE_PIECE_BYTES

    def __init__(self, segments: DeviceSegments, keep_alive: object = None) -> None:
        self.segments = segments
        self._keep_alive = keep_alive

    @classmethod
    def from_tensors(
        cls, tensors: Sequence[torch.Tensor], block_dim: int = 0, layers: Sequence[int] | None = None
    ) -> CpuCopier:
        """One or more tensors a layer, of any layout that :func:`~flexkv_kernels.segments.pieces_of` understands.

        Raises:
            LayoutError: what was found and what was expected.
        """
        segments = pieces_of(tensors, block_dim, layers)
        if tensors[0].device.type != "cpu":
            raise LayoutError(f"KV tensors: found device {tensors[0].device}; expected cpu")
        return cls(segments, keep_alive=list(tensors))

    def bind(self, host: HostSegment, shard: int) -> None:
        """Use ``host``; see the protocol.

        Raises:
            LayoutError: the slots are made for blocks of another size.
        """
        if self.segments.block_bytes != host.layout.device_block_bytes:
            raise LayoutError(
                f"KV tensors: found {self.segments.block_bytes} bytes a block in {len(self.segments.addresses)} segments; expected"
                f" {host.layout.device_block_bytes} bytes"
            )
        self._host = host
        self._shard = shard

    def close(self) -> None:
        """Nothing was taken."""

    def mark(self) -> object:
        """The CPU computes when it is called: what was submitted is done."""
        return None

    def gather(self, op: TransferOp, after: object, layers: range | None = None) -> None:
        """Blocks -> slots, and the slots' checksums; see the protocol."""
        if layers is not None:
            self._gather_layers(op, layers)
            return
        checksums = np.empty(len(op.slots), np.uint32)
        native.gather_crc(**self._arguments(op.slots, op.blocks), keys=op.keys, crc_out=checksums)
        self._host.checksums[op.slots, self._shard] = checksums

    def _gather_layers(self, op: TransferOp, layers: range) -> None:
        per_slot = len(op.blocks) // len(op.slots)
        for run in self.segments.runs_of(layers.start, len(layers)):
            native.gather(**self._run_arguments(op.slots, op.blocks, run, 0, per_slot))
        if layers.stop == self.segments.layer_count:
            found = self._host.checksums_now(op.slots, op.keys, self._shard)
            self._host.checksums[op.slots, self._shard] = found

    def scatter(self, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        """Slots -> blocks, each checked while it is in the cache; see the protocol."""
        partial = (op.blocks.reshape(len(op.slots), -1) < 0).any(axis=1)
        if not partial.any():
            return self._scatter_whole(op, verify)
        ok = np.empty(len(op.slots), np.bool_)
        for indices, copy in ((partial, self._scatter_parts), (~partial, self._scatter_whole)):
            found = np.flatnonzero(indices)
            if len(found):
                ok[found] = copy(op.part(found), verify)
        return ok

    def scatter_layers(self, op: TransferOp, after: object, on_layer: Callable[[object], None]) -> None:
        """Slots -> blocks, layer by layer; see the protocol."""
        blocks = op.blocks.reshape(len(op.slots), -1)
        for layer in range(self.segments.layer_count):
            for run in self.segments.runs_of(layer):
                self._scatter_run(op.slots, blocks, run)
            on_layer(None)

    def follow(self, layer: object) -> None:
        """What was submitted is done."""

    def _scatter_run(self, slots: Slots, blocks: npt.NDArray[np.int64], run: slice) -> None:
        """Copy some neighbouring segments of ``blocks`` [slots, blocks_per_slot]; where negative they are left out."""
        if (blocks < 0).any():
            for place in range(blocks.shape[1]):
                wanted = blocks[:, place] >= 0
                native.scatter(**self._run_arguments(slots[wanted], blocks[wanted, place], run, place, 1))
            return
        native.scatter(**self._run_arguments(slots, blocks.ravel(), run, 0, blocks.shape[1]))

    def _run_arguments(
        self, slots: Slots, blocks: BlockIds, run: slice, place: int, blocks_per_slot: int
    ) -> dict[str, Any]:
        arguments, image_bytes = self._arguments(slots, blocks), self._host.layout.device_block_bytes
        return arguments | {
            "segment_addrs": self.segments.addresses[run],
            "block_strides": self.segments.strides[run],
            "blocks_per_slot": blocks_per_slot,
            "shard_offset": arguments["shard_offset"]
            + place * image_bytes
            + run.start * self.segments.piece_bytes,
            "image_stride": image_bytes,
        }

    def _scatter_whole(self, op: TransferOp, verify: bool) -> npt.NDArray[np.bool_]:
        if not verify:
            native.scatter(**self._arguments(op.slots, op.blocks))
            return np.ones(len(op.slots), np.bool_)
        ok = np.zeros(len(op.slots), np.uint8)
        expected = np.ascontiguousarray(self._host.checksums[op.slots, self._shard])
        arguments = self._arguments(op.slots, op.blocks)
        native.scatter_verify(**arguments, keys=op.keys, crc_expected=expected, ok_out=ok)
        return ok.view(np.bool_)

    def _scatter_parts(self, op: TransferOp, verify: bool) -> npt.NDArray[np.bool_]:
        """Copy the device blocks that are not -1, of slots that match their checksum as a whole."""
        layout, ok = self._host.layout, np.ones(len(op.slots), np.bool_)
        if verify:
            offset, found = self._shard * layout.shard_bytes, np.zeros(len(op.slots), np.uint32)
            native.crc32c_slots(
                self._host.address, layout.slot_bytes, offset, layout.shard_bytes, op.slots, op.keys, found
            )
            ok = found == self._host.checksums[op.slots, self._shard]
        everything = slice(0, len(self.segments.addresses))
        self._scatter_run(op.slots[ok], op.blocks.reshape(len(op.slots), -1)[ok], everything)
        return ok

    def _arguments(self, slots: Slots, blocks: BlockIds) -> dict[str, Any]:
        layout = self._host.layout
        return {
            "segment_addrs": self.segments.addresses,
            "block_strides": self.segments.strides,
            "piece_bytes": self.segments.piece_bytes,
            "blocks": blocks,
            "block_count": self.segments.block_count,
            "slot_base": self._host.address,
            "slot_stride": layout.slot_bytes,
            "slots": slots,
            "slot_count": self._host.slot_count,
            "blocks_per_slot": layout.blocks_per_slot,
            "shard_offset": self._shard * layout.shard_bytes,
        }
