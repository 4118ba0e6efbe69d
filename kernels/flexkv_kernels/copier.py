"""Device copiers: how blocks move between a device and the slots of the host segment.

The CPU's is here. The CUDA copier (own streams, events, pinned slots) in ``cuda_copier.py`` implements the same protocol,
:class:`flexkv_core.transfer.plan.DeviceCopier`; ``choice.py`` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flexkv_core import native
from flexkv_core.errors import LayoutError
from flexkv_core.layout import DeviceSegments
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import TransferOp
from flexkv_core.types import KEY_BYTES, BlockIds, Slots


class CpuCopier:
    """Copies in the host's own memory with the native library; the GIL is dropped meanwhile.

    Args:
        segments: where the engine's blocks lie. ``keep_alive`` holds their memory.
    """

    def __init__(self, segments: DeviceSegments, keep_alive: object = None) -> None:
        self.segments = segments
        self._keep_alive = keep_alive

    @classmethod
    def from_tensors(cls, tensors: Sequence[torch.Tensor], block_dim: int = 0) -> CpuCopier:
        """One tensor a layer, of any shape in which the bytes of one index of ``block_dim`` are one contiguous piece.

        Raises:
            LayoutError: a tensor is not on the CPU, its blocks are not contiguous, or the tensors differ in size.
        """
        return cls(segments_of(tensors, block_dim), keep_alive=list(tensors))

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

    def mark(self) -> object:
        """The CPU computes when it is called: what was submitted is done."""
        return None

    def gather(self, op: TransferOp, after: object) -> None:
        """Blocks -> slots, and the slots' checksums; see the protocol."""
        checksums = np.empty(len(op.slots), np.uint32)
        native.gather_crc(**self._arguments(op.slots, op.blocks), keys=op.keys, crc_out=checksums)
        self._host.checksums[op.slots, self._shard] = checksums

    def scatter(self, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        """Slots -> blocks, each checked while it is in the cache; see the protocol."""
        wanted = op.blocks.reshape(len(op.slots), -1)
        if (op.blocks < 0).any():
            # Only the first slot of a load can be wanted in part: behind what the device held already.
            head = self._scatter_part(op.keys[:KEY_BYTES], int(op.slots[0]), wanted[0], verify)
            if len(op.slots) == 1:
                return head
            rest = replace(op, keys=op.keys[KEY_BYTES:], slots=op.slots[1:], blocks=wanted[1:].ravel())
            return np.concatenate([head, self.scatter(rest, after, verify)])
        if not verify:
            native.scatter(**self._arguments(op.slots, op.blocks))
            return np.ones(len(op.slots), np.bool_)
        ok = np.zeros(len(op.slots), np.uint8)
        expected = np.ascontiguousarray(self._host.checksums[op.slots, self._shard])
        arguments = self._arguments(op.slots, op.blocks)
        native.scatter_verify(**arguments, keys=op.keys, crc_expected=expected, ok_out=ok)
        return ok.view(np.bool_)

    def _scatter_part(
        self, key: bytes, slot: int, blocks: npt.NDArray[np.int64], verify: bool
    ) -> npt.NDArray[np.bool_]:
        """Copy the device blocks of one slot that are not -1, if the whole slot matches its checksum."""
        layout, slots = self._host.layout, np.array([slot], np.int32)
        found = np.zeros(1, np.uint32)
        if verify:
            offset = self._shard * layout.shard_bytes
            native.crc32c_slots(
                self._host.address, layout.slot_bytes, offset, layout.shard_bytes, slots, key, found
            )
            if found[0] != self._host.checksums[slot, self._shard]:
                return np.zeros(1, np.bool_)
        for place, block in enumerate(blocks):
            if block >= 0:
                arguments = self._arguments(slots, np.array([block], np.int64))
                arguments["blocks_per_slot"] = 1
                arguments["shard_offset"] += place * layout.device_block_bytes
                native.scatter(**arguments)
        return np.ones(1, np.bool_)

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


def segments_of(tensors: Sequence[torch.Tensor], block_dim: int = 0) -> DeviceSegments:
    """The affine description of ``tensors``, one contiguous piece a tensor and block; other dimensions in any order.

    Raises:
        LayoutError: what was found and what was expected.
    """
    if not tensors:
        raise LayoutError("KV tensors: found none; expected one a layer")
    pieces = {_piece_bytes(index, tensor, block_dim) for index, tensor in enumerate(tensors)}
    counts = {tensor.shape[block_dim] for tensor in tensors}
    if len(pieces) > 1 or len(counts) > 1:
        raise LayoutError(
            f"KV tensors: found blocks of {sorted(pieces)} bytes and block counts {sorted(counts)}; expected the same in all layers"
        )
    return DeviceSegments(
        addresses=np.array([tensor.data_ptr() for tensor in tensors], np.int64),
        strides=np.array([tensor.stride(block_dim) * tensor.element_size() for tensor in tensors], np.int64),
        piece_bytes=pieces.pop(),
        block_count=counts.pop(),
    )


def _piece_bytes(index: int, tensor: torch.Tensor, block_dim: int) -> int:
    """Bytes of one block, after checking that they are contiguous (in whatever order of the inner dimensions)."""
    if tensor.device.type != "cpu":
        raise LayoutError(f"KV tensor {index}: found device {tensor.device}; expected cpu")
    inner = [
        (tensor.stride(dim), tensor.shape[dim])
        for dim in range(tensor.dim())
        if dim != block_dim and tensor.shape[dim] > 1
    ]
    expected = 1
    for stride, size in sorted(inner):
        if stride != expected:
            raise LayoutError(
                f"KV tensor {index}: found shape {tuple(tensor.shape)}, strides {tensor.stride()}; expected the bytes of a block"
                f" (dimension {block_dim}) to be one contiguous piece"
            )
        expected *= size
    return expected * tensor.element_size()
