"""Which copier a device needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexkv_core.errors import LayoutError
from flexkv_core.layout import DeviceSegments
from flexkv_core.quantised import check_quantisable
from flexkv_core.transfer.plan import DeviceCopier
from flexkv_kernels.copier import CpuCopier
from flexkv_kernels.quantising import QuantisingCpuCopier
from flexkv_kernels.segments import pieces_of


def copier_for(
    tensors: Sequence[torch.Tensor],
    block_dim: int = 0,
    layers: Sequence[int] | None = None,
    scales: int = 0,
) -> DeviceCopier:
    """The copier of the device that ``tensors`` lie on, for any layout that :func:`~flexkv_kernels.segments.pieces_of` understands.

    ``scales``: the layout's; not 0: blocks are rounded to fp8, see :mod:`flexkv_core.quantised`.

    Raises:
        ConfigError: blocks that would be rounded and are not bfloat16.
        LayoutError: what was found and what was expected; or a device without a copier.
        TransferError: the tensors are on a GPU whose driver cannot be used.
    """
    segments = pieces_of(tensors, block_dim, layers)
    if scales:
        for tensor in tensors:
            check_quantisable(str(tensor.dtype).removeprefix("torch."))
    return copier_over(segments, tensors[0].device, list(tensors), scales)


def copier_over(
    segments: DeviceSegments, device: torch.device, keep_alive: object, scales: int = 0
) -> DeviceCopier:
    """The copier for segments that lie in the memory of ``device``; ``keep_alive`` holds that memory. With ``scales``, as in
    :func:`copier_for`, the caller knows that the segments hold bfloat16.

    Raises:
        LayoutError, TransferError: as :func:`copier_for`.
    """
    if device.type == "cpu":
        if scales:
            return QuantisingCpuCopier(segments, scales, keep_alive=keep_alive)
        return CpuCopier(segments, keep_alive=keep_alive)
    if device.type == "cuda" and not torch.version.hip:
        # Here and not above: on a CPU there need be no Triton.
        if scales:
            from flexkv_kernels.cuda_quantising import QuantisingCudaCopier

            return QuantisingCudaCopier(segments, device, scales, keep_alive=keep_alive)
        from flexkv_kernels.cuda_copier import CudaCopier

        return CudaCopier(segments, device, keep_alive=keep_alive)
    raise LayoutError(f"KV tensors: found device {device}; expected cpu, or cuda of NVIDIA")
