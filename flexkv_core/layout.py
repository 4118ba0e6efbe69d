"""Where a block's bytes lie: in a slot, and in the engine's tensors.

One affine formula serves every engine. A device block is one piece a segment (a layer, or K and V of a layer); piece *s* of block *b*
lies at ``addresses[s] + b * strides[s]``. In a slot the pieces of one device block follow each other, then those of the next device
block of the same FlexKV block, then the next rank's shard::

    slot = [shard 0: [device block 0: piece 0, piece 1, …] [device block 1: …] …] [shard 1: …] … padding to 4 KiB

Where bytes are kept as fp8 (``store_dtype``), a device block's image is not its pieces but what :mod:`flexkv_core.quantised` says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import ConfigError, LayoutError

SLOT_ALIGNMENT_BYTES = 4096
"""Slots are whole pages, so that each can be the target of one O_DIRECT transfer."""


@dataclass(frozen=True)
class KVLayout:
    """The shape of one slot.

    Attributes:
        tokens_per_block: tokens of a FlexKV block; a multiple of ``device_block_tokens``.
        device_block_tokens: tokens of a block in the engine's paged cache.
        device_block_bytes: bytes of one device block in all layers of one rank.
        shard_count: ranks that write a part of each slot (tensor parallel); 1 where all ranks hold the same bytes.
        device_blocks: device blocks of one FlexKV block where the engine keeps several for the same tokens, because its layers have
            block tables of their own; 0: as many as ``tokens_per_block`` and ``device_block_tokens`` say.
        scales: 0: a slot holds the engine's own bytes. Otherwise it holds fp8, with room for so many scales a device block, and
            ``device_block_bytes`` is the size of such an image: made by :func:`flexkv_core.quantised.quantised_layout`.

    Raises:
        ConfigError: ``tokens_per_block`` is no multiple of ``device_block_tokens``.
        LayoutError: a count or size is not positive.
    """

    tokens_per_block: int
    device_block_tokens: int
    device_block_bytes: int
    shard_count: int = 1
    # Not shown: the root of all keys covers what is shown, and models with one table keep the keys they have.
    device_blocks: int = field(default=0, repr=False)
    scales: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        for name in ("tokens_per_block", "device_block_tokens", "device_block_bytes", "shard_count"):
            value = getattr(self, name)
            if value <= 0:
                raise LayoutError(f"{name} is {value}; it must be at least 1")
        for name in ("device_blocks", "scales"):
            if getattr(self, name) < 0:
                raise LayoutError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.tokens_per_block % self.device_block_tokens:
            raise ConfigError(
                f"tokens_per_block = {self.tokens_per_block}: must be a multiple of the engine's block size,"
                f" {self.device_block_tokens}"
            )

    @property
    def blocks_per_slot(self) -> int:
        """Device blocks of one FlexKV block."""
        return self.device_blocks or self.tokens_per_block // self.device_block_tokens

    def as_dict(self) -> dict[str, int]:
        """The fields, without those that are at their default and came later: what is recorded beside data stays as it was."""
        later = ("device_blocks", "scales")
        return {name: value for name, value in asdict(self).items() if value or name not in later}

    @property
    def shard_bytes(self) -> int:
        """Bytes that one rank writes into a slot."""
        return self.blocks_per_slot * self.device_block_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes from one slot to the next: all shards, padded to whole pages."""
        used = self.shard_bytes * self.shard_count
        return -(-used // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES


@dataclass(frozen=True)
class DeviceSegments:
    """Where the pieces of a device's blocks lie. The caller keeps the memory alive and in place.

    Attributes:
        addresses: int64 [segments], address of each segment's piece of block 0.
        strides: int64 [segments], bytes from a block's piece to the next block's; 0 where all blocks share one spare piece.
        piece_bytes: bytes of a piece.
        block_count: blocks that exist; ids are ``0 … block_count - 1``.
        layers: int64 [segments], the layer that each segment belongs to, counted from 0 in the order in which the engine reads them;
            every number occurs. None: not known, all segments count as one layer.

    Raises:
        LayoutError: shapes differ, a stride is smaller than a piece (blocks would overlap), or a layer has no segment.
    """

    addresses: npt.NDArray[np.int64]
    strides: npt.NDArray[np.int64]
    piece_bytes: int
    block_count: int
    layers: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.addresses.ndim != 1 or self.addresses.shape != self.strides.shape or not len(self.addresses):
            raise LayoutError(
                f"segments: found addresses {self.addresses.shape} and strides {self.strides.shape};"
                " expected one address and one stride a segment"
            )
        if self.piece_bytes <= 0 or self.block_count <= 0:
            raise LayoutError(
                f"segments: piece_bytes = {self.piece_bytes}, block_count = {self.block_count}; expected at least 1"
            )
        overlapping = (self.strides < self.piece_bytes) & (self.strides != 0)
        if overlapping.any():
            raise LayoutError(
                f"segments: found a stride of {int(self.strides[overlapping].min())} bytes; expected at least the piece's"
                f" {self.piece_bytes}"
            )
        if self.layers is not None and (
            self.layers.shape != self.addresses.shape
            or not np.array_equal(np.unique(self.layers), np.arange(self.layer_count))
        ):
            raise LayoutError(
                f"segments: found layers {self.layers.tolist()} of {len(self.addresses)} segments; expected one a segment, and all from"
                " 0 on"
            )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all segments."""
        return len(self.addresses) * self.piece_bytes

    @property
    def layer_count(self) -> int:
        """Layers that a load layer by layer has."""
        return 1 if self.layers is None else int(self.layers.max()) + 1

    def runs_of(self, layer: int, count: int = 1) -> list[slice]:
        """The segments of ``count`` layers from ``layer`` on, as few runs of neighbours, which lie side by side in a slot as well."""
        if self.layers is None:
            return [slice(0, len(self.addresses))]
        indices = np.flatnonzero((self.layers >= layer) & (self.layers < layer + count))
        parts = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
