"""The copier that rounds to fp8 on the GPU: there and back against torch's own casts, and slot by slot against the CPU's copier."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from flexkv_core.layout import KVLayout
from flexkv_core.quantised import quantised_layout
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import Delivery, DeviceCopier, TransferOp
from flexkv_core.types import Direction
from flexkv_kernels.choice import copier_for

BLOCKS, TOKENS, LAYERS = 96, 16, 4
SPARE_SCALES = 3


def check_quantising_copier() -> list[str]:
    """What was wrong; nothing is the wanted answer. On a thread of its own: the driver's calls need the device's context there."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_check).result()


def _check() -> list[str]:
    generator = torch.Generator().manual_seed(11)
    values = [
        torch.randn(2, BLOCKS, TOKENS, 8, 64, generator=generator).to(torch.bfloat16) for _ in range(LAYERS)
    ]
    order = np.random.default_rng(5).permutation(BLOCKS)
    mine, others = order[: BLOCKS // 2], order[BLOCKS // 2 :]
    wanted = torch.cat([_rounded(tensor[:, mine]) for tensor in values])
    tensors = [tensor.cuda() for tensor in values]
    found: list[str] = []
    images = []
    for on in (values, tensors):
        copier, host = _open(on)
        images.append(_store(copier, host, mine))
        if on is tensors:
            found += _load(copier, tensors, others, wanted)
            tensors[1][0, int(mine[3]), 2, 1, 7] = float("nan")
            kept = copier.gather(_op(Direction.STORE, mine), copier.mark())
            if kept is None or np.flatnonzero(~kept).tolist() != [3]:
                found.append("a block with a NaN was taken, or another was refused")
        copier.close()
        host.close()
    if not np.array_equal(images[0], images[1]):
        found.append(f"slots: {int((images[0] != images[1]).sum())} bytes differ from the CPU's")
    return [f"rounding copier: {text}" for text in found]


def _open(tensors: list[torch.Tensor]) -> tuple[DeviceCopier, HostSegment]:
    scales = 2 * LAYERS + SPARE_SCALES
    copier = copier_for(tensors, block_dim=1, scales=scales)
    layout = KVLayout(TOKENS, TOKENS, copier.segments.block_bytes)
    host = HostSegment.create(BLOCKS, quantised_layout(layout, scales))
    copier.bind(host, 0)
    return copier, host


def _op(direction: Direction, blocks: np.ndarray, delivery: Delivery = Delivery.WHOLE) -> TransferOp:
    slots = np.arange(len(blocks), dtype=np.int32)[::-1].copy()
    return TransferOp(1, direction, bytes(16 * len(blocks)), slots, blocks, delivery=delivery)


def _store(copier: DeviceCopier, host: HostSegment, blocks: np.ndarray) -> np.ndarray:
    """The slots' bytes then, uint8 [bytes]."""
    copier.gather(_op(Direction.STORE, blocks), copier.mark())
    size = host.slot_count * host.layout.slot_bytes
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host.address)).copy()


def _load(
    copier: DeviceCopier, tensors: list[torch.Tensor], blocks: np.ndarray, wanted: torch.Tensor
) -> list[str]:
    found = []
    for delivery in (Delivery.WHOLE, Delivery.LAYERWISE):
        for tensor in tensors:
            tensor[:, blocks] = 0
        op = _op(Direction.LOAD, blocks, delivery)
        if delivery is Delivery.WHOLE:
            ok = copier.scatter(op, copier.mark(), True)
            found += [] if ok.all() else ["a checksum did not match"]
        else:
            copier.scatter_layers(op, copier.mark(), copier.follow)
        loaded = torch.cat([tensor[:, blocks] for tensor in tensors]).cpu()
        if not torch.equal(loaded, wanted):
            found.append(f"{delivery.value}: {int((loaded != wanted).sum())} values")
    return found


def _rounded(values: torch.Tensor) -> torch.Tensor:
    floats = values.float()
    scale = floats.abs().flatten(2).amax(2)[..., None, None, None] / 448
    return ((floats / scale).to(torch.float8_e4m3fn).float() * scale).to(torch.bfloat16)
