"""Which copier a device needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexkv_core.errors import LayoutError
from flexkv_core.layout import DeviceSegments
from flexkv_core.transfer.plan import DeviceCopier
from flexkv_kernels.copier import CpuCopier
from flexkv_kernels.segments import pieces_of


def copier_for(
    tensors: Sequence[torch.Tensor], block_dim: int = 0, layers: Sequence[int] | None = None
) -> DeviceCopier:
    """The copier of the device that ``tensors`` lie on, for any layout that :func:`~flexkv_kernels.segments.pieces_of` understands.

    Raises:
        LayoutError: what was found and what was expected; or a device without a copier.
        TransferError: the tensors are on a GPU whose driver cannot be used.
    """
    return copier_over(pieces_of(tensors, block_dim, layers), tensors[0].device, list(tensors))


def copier_over(segments: DeviceSegments, device: torch.device, keep_alive: object) -> DeviceCopier:
    """The copier for segments that lie in the memory of ``device``; ``keep_alive`` holds that memory.

    Raises:
        LayoutError, TransferError: as :func:`copier_for`.
    """
    if device.type == "cpu":
        return CpuCopier(segments, keep_alive=keep_alive)
    if device.type == "cuda" and not torch.version.hip:
        # Here and not above: on a CPU there need be no Triton.
        from flexkv_kernels.cuda_copier import CudaCopier

        return CudaCopier(segments, device, keep_alive=keep_alive)
    raise LayoutError(f"KV tensors: found device {device}; expected cpu, or cuda of NVIDIA")
