"""A connector whose loads have trouble in turn, for servers of any version: named by ``kv_connector_module_path``.

What did not come is zeros on the device, so that an answer that was computed from it would be another.
"""

from __future__ import annotations

import ctypes
import itertools
import time

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import TransferError
from flexkv_core.transfer.plan import TransferOp
from flexkv_kernels.copier import CpuCopier
from flexkv_vllm.connector import FlexKVConnector
from tests.matrix.turns import MIDDLE_IS_MISSING, NOTHING_COMES, SLOW, SLOW_S, WELL

_scatter = CpuCopier.scatter
_turns = itertools.chain((NOTHING_COMES, MIDDLE_IS_MISSING, SLOW), itertools.repeat(WELL))


def _troubled(copier: CpuCopier, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
    turn = next(_turns)
    if turn == NOTHING_COMES:
        _clear(copier, op.blocks)
        raise TransferError("injected: nothing comes")
    if turn == SLOW:
        time.sleep(SLOW_S)
    ok = _scatter(copier, op, after, verify)
    if turn == MIDDLE_IS_MISSING:
        middle = len(op.slots) // 2
        _clear(copier, op.blocks.reshape(len(op.slots), -1)[middle])
        ok[middle] = False
    return ok


def _clear(copier: CpuCopier, blocks: npt.NDArray[np.int64]) -> None:
    segments = copier.segments
    for base, stride in zip(segments.addresses.tolist(), segments.strides.tolist(), strict=True):
        for block in blocks.ravel().tolist():
            ctypes.memset(base + block * stride, 0, segments.piece_bytes)


CpuCopier.scatter = _troubled  # type: ignore[method-assign]


class TroubledConnector(FlexKVConnector):
    """As its base class, in a process whose loads have trouble."""
