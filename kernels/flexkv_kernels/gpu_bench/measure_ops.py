"""Speed of whole ops, as the product runs them: through the bound copier, with its checksums and in the modes that its calibration chose."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch

from flexkv_core.layout import KVLayout
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import TransferOp
from flexkv_core.types import Direction
from flexkv_kernels.cuda_copier import CudaCopier
from flexkv_kernels.cuda_driver import CudaDriver, pin
from flexkv_kernels.gpu_bench.measure import PIECES, SEGMENTS, WAY, Rounds, plain_s
from flexkv_kernels.gpu_bench.report import Figures
from flexkv_kernels.gpu_calibration import Scratch
from flexkv_kernels.stream_copier import PROGRAMS_DEFAULT

TOKENS = 16
SLOT_BYTES_MAX = 4 << 20  # of a block of 16 tokens of a large model


def op_figures(rounds: int, size_bytes: int) -> Figures:
    """A store and a load of ``size_bytes``, the load with and without verification, against one large pinned copy; what the
    calibration chose, and what binding took."""
    figures: Figures = {}
    for name, piece_bytes in PIECES.items():
        segments = min(SEGMENTS, SLOT_BYTES_MAX // piece_bytes)
        scratch = Scratch(piece_bytes, segments, size_bytes, torch.device("cuda"), PROGRAMS_DEFAULT)
        scratch.fill()
        ops = _Ops(scratch)
        try:
            figures[f"bind_{name}_s"] = ops.bind_s
            figures[f"calibration_{name}"] = ops.modes
            figures |= ops.measure(name, rounds)
        finally:
            ops.close()
    return figures


def pin_figures(size_bytes: int = 2 << 30) -> Figures:
    """Seconds a GiB to pin a host tier: of which nobody has touched the memory, and of which all pages are there."""
    host = HostSegment.create(size_bytes >> 20, KVLayout(TOKENS, TOKENS, 1 << 20))
    driver, figures = CudaDriver(), Figures()
    torch.cuda.synchronize()
    for name in ("untouched", "touched"):
        pinned = pin(host.address, size_bytes, 1 << 20, driver.register, budget_s=30.0)
        figures[f"pin_{name}_s_per_gib"] = pinned.seconds * (1 << 30) / max(1, pinned.pinned_bytes)
        for start in range(0, pinned.pinned_bytes, pinned.piece_bytes):
            driver.unregister(host.address + start)
    host.close()
    return figures


class _Ops:
    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._host = HostSegment.create(scratch.count, KVLayout(TOKENS, TOKENS, scratch.block_bytes))
        self._copier = CudaCopier(scratch.segments, scratch.device)
        start = time.perf_counter()
        self._copier.bind(self._host, 0)
        self.bind_s = time.perf_counter() - start
        self.modes = str(self._copier._modes)
        self._rng = np.random.default_rng()
        self._op_id = 0

    def measure(self, name: str, rounds: int) -> Figures:
        count, figures = self._scratch.count, Figures()
        slots = self._rng.permutation(count).astype(np.int32)
        keys = self._rng.bytes(16 * count)
        copies = {
            Direction.STORE: {"d2h_op": partial(self._store_s, slots, keys)},
            Direction.LOAD: {
                "h2d_op": partial(self._load_s, slots, keys, True),
                "h2d_op_unverified": partial(self._load_s, slots, keys, False),
            },
        }
        for (
            direction,
            those,
        ) in copies.items():  # the store first: it writes the checksums that the load verifies
            measured = Rounds()
            measured.run(those, partial(plain_s, self._scratch, direction, None), rounds)
            found = measured.figures(name, count * self._scratch.block_bytes)
            figures |= {
                key.replace("plain", f"{WAY[direction]}_op_link"): value for key, value in found.items()
            }
        return figures

    def close(self) -> None:
        self._copier.close()
        self._host.close()

    def _store_s(self, slots: np.ndarray, keys: bytes) -> float:
        op = self._op(Direction.STORE, slots, keys)
        start = time.perf_counter()
        self._copier.gather(op, self._copier.mark())
        return time.perf_counter() - start

    def _load_s(self, slots: np.ndarray, keys: bytes, verify: bool) -> float:
        op = self._op(Direction.LOAD, slots, keys)
        start = time.perf_counter()
        ok = self._copier.scatter(op, self._copier.mark(), verify)
        elapsed = time.perf_counter() - start
        assert ok.all(), "a block was refused"
        return elapsed

    def _op(self, direction: Direction, slots: np.ndarray, keys: bytes) -> TransferOp:
        self._op_id += 1
        torch.cuda.synchronize()
        return TransferOp(self._op_id, direction, keys, slots, self._rng.permutation(self._scratch.count))
