"""What gather and scatter mean, in torch, by indexing the tensors themselves: the oracle of every kernel's test."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gather_reference(tensors: Sequence[torch.Tensor], block_dim: int, blocks: torch.Tensor) -> torch.Tensor:
    """The images of ``blocks``, uint8 [n, bytes of a block in all tensors]: tensor after tensor, each in the order of its memory."""
    parts = []
    for tensor in tensors:
        part = _in_memory_order(tensor, block_dim)[blocks.to(tensor.device)].contiguous()
        parts.append(part.view(torch.uint8).view(len(blocks), -1))
    return torch.cat(parts, dim=1)


def scatter_reference(
    tensors: Sequence[torch.Tensor], block_dim: int, blocks: torch.Tensor, images: torch.Tensor
) -> None:
    """Write ``images`` (uint8 [n, bytes]) into ``blocks``, in place."""
    start = 0
    for tensor in tensors:
        view = _in_memory_order(tensor, block_dim)
        size = view[0].numel() * tensor.element_size()
        part = images[:, start : start + size].contiguous()
        view[blocks.to(tensor.device)] = part.view(view.dtype).view(len(blocks), *view.shape[1:])
        start += size


def _in_memory_order(tensor: torch.Tensor, block_dim: int) -> torch.Tensor:
    """A view with the blocks first and the other dimensions by falling stride, as integers: not every device indexes 8-bit floats."""
    inner = [dim for dim in range(tensor.dim()) if dim != block_dim]
    inner.sort(key=lambda dim: (tensor.stride(dim), tensor.shape[dim]), reverse=True)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.permute(block_dim, *inner).view(whole)
