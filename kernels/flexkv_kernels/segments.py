"""An engine's tensors as segments: whatever the order of their dimensions, a block becomes one or more contiguous pieces a tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from flexkv_core.errors import LayoutError
from flexkv_core.layout import DeviceSegments


def pieces_of(
    tensors: Sequence[torch.Tensor], block_dim: int = 0, layers: Sequence[int] | None = None
) -> DeviceSegments:
    """The segments of ``tensors``, each of any shape and on any one device; dimension ``block_dim`` counts the blocks. ``layers`` gives
    each tensor's layer where they are not one a layer in order, as with K and V apart.

    A tensor whose blocks are not contiguous (K and V as ``[2, blocks, …]``, heads outside of blocks) gives one segment for each index
    of its outer dimensions, largest stride first. Pieces are as long as the tensors allow, and equally long in all of them.

    Raises:
        LayoutError: no tensors, a number of ``layers`` that is not theirs, other devices, other numbers of blocks, or blocks of which the bytes do not lie in whole elements
            side by side (a stride of 0, or overlapping dimensions).
    """
    if not tensors:
        raise LayoutError("KV tensors: found none; expected one a layer")
    _check_alike(tensors, block_dim)
    of_tensor = list(range(len(tensors))) if layers is None else list(layers)
    if len(of_tensor) != len(tensors):
        raise LayoutError(
            f"KV tensors: found {len(tensors)} and layers of {len(of_tensor)}; expected one a tensor"
        )
    piece_bytes = min(_contiguous_bytes(tensor, block_dim) for tensor in tensors)
    starts, strides, of_segment = [], [], []
    for index, tensor in enumerate(tensors):
        offsets = _piece_offsets(index, tensor, block_dim, piece_bytes)
        starts += [tensor.data_ptr() + offset for offset in offsets]
        strides += [tensor.stride(block_dim) * tensor.element_size()] * len(offsets)
        of_segment += [of_tensor[index]] * len(offsets)
    return DeviceSegments(
        addresses=np.array(starts, np.int64),
        strides=np.array(strides, np.int64),
        piece_bytes=piece_bytes,
        block_count=tensors[0].shape[block_dim],
        layers=np.array(of_segment, np.int64),
    )


def _check_alike(tensors: Sequence[torch.Tensor], block_dim: int) -> None:
    devices = {str(tensor.device) for tensor in tensors}
    counts = {tensor.shape[block_dim] for tensor in tensors}
    if len(devices) > 1 or len(counts) > 1:
        raise LayoutError(
            f"KV tensors: found devices {sorted(devices)} and block counts {sorted(counts)}; expected one of each"
        )


def inner_dimensions(tensor: torch.Tensor, block_dim: int) -> list[tuple[int, int]]:
    """(stride in elements, size) of the dimensions within a block, smallest stride first; those of size 1 say nothing."""
    return sorted(
        (tensor.stride(dim), tensor.shape[dim])
        for dim in range(tensor.dim())
        if dim != block_dim and tensor.shape[dim] > 1
    )


def _contiguous_bytes(tensor: torch.Tensor, block_dim: int) -> int:
    """The longest run of bytes that a block has side by side."""
    run = 1
    for stride, size in inner_dimensions(tensor, block_dim):
        # The second: a lone block would let a piece run on beyond where the next block would begin.
        if stride != run or run >= tensor.stride(block_dim):
            break
        run *= size
    return run * tensor.element_size()


def _piece_offsets(index: int, tensor: torch.Tensor, block_dim: int, piece_bytes: int) -> list[int]:
    """Bytes from the tensor's start to each piece of block 0, in the order of the dimensions, largest stride first."""
    extent = tensor.element_size()
    outer: list[range] = []
    for stride, size in inner_dimensions(tensor, block_dim):
        step = stride * tensor.element_size()
        if step < extent:
            raise LayoutError(
                f"KV tensor {index}: found shape {tuple(tensor.shape)}, strides {tensor.stride()}; expected dimensions that do not overlap"
            )
        extent = step * size
        if extent > piece_bytes:
            outer.append(_steps(step, size, piece_bytes))
    return [sum(steps) for steps in itertools.product(*reversed(outer))]


def _steps(step: int, size: int, piece_bytes: int) -> range:
    """Where pieces begin along one dimension; a dimension that runs on within a piece is stepped over piece by piece."""
    if step >= piece_bytes:
        return range(0, step * size, step)
    if (step * size) % piece_bytes:
        raise LayoutError(
            f"KV tensors: found {step * size} bytes side by side in one tensor and {piece_bytes} in another;"
            " expected a multiple"
        )
    return range(0, step * size, piece_bytes)
