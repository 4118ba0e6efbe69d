"""Speeds of gather and scatter on the device, and of every mode over the bus, against plain large copies of the same bytes.

Method: buffers far larger than the GPU's caches, random data, all blocks in a fresh random order on both sides. A round takes each copy
once, in a fresh order, with a plain copy before and after; a ratio is the mean of those two over the copy's time. Medians over rounds.
On the device times are CUDA events around the kernel; over the bus they are the host's clock from the call to the end, so that queueing
counts, as it does in the product.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np
import torch

from flexkv_core.types import Direction
from flexkv_kernels import paged_copy
from flexkv_kernels.access import choose_access
from flexkv_kernels.gpu_calibration import Scratch
from flexkv_kernels.paths import Mode
from flexkv_kernels.stream_copier import PROGRAMS_DEFAULT

PIECES = {"4k": 4 << 10, "16k": 16 << 10, "64k": 64 << 10, "256k": 256 << 10, "1m": 1 << 20}
SEGMENTS = 64  # K and V of 32 layers
PROGRAMS_PER_SM = 16
WAY = {Direction.STORE: "d2h", Direction.LOAD: "h2d"}

Figures = dict[str, float]


@dataclass
class Rounds:
    """Times of copies and of the plain copies around them."""

    ratios: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, copies: Mapping[str, Callable[[], float]], plain: Callable[[], float], rounds: int) -> None:
        """``rounds`` times every copy once, in random order."""
        rng = np.random.default_rng()
        for copy in (*copies.values(), plain):  # compile, map, warm up
            copy()
        for _ in range(rounds):
            before = plain()
            for name in rng.permutation(list(copies)).tolist():
                elapsed = copies[name]()
                after = plain()
                self.ratios.setdefault(name, []).append((before + after) / 2 / elapsed)
                self.seconds.setdefault(name, []).append(elapsed)
                self.seconds.setdefault("plain", []).append(after)
                before = after

    def figures(self, suffix: str, size_bytes: int) -> Figures:
        """Medians: ``<copy>_<suffix>_ratio`` and ``_gbs`` (GB/s of payload)."""
        found = {f"{name}_{suffix}_ratio": median(values) for name, values in sorted(self.ratios.items())}
        return found | {
            f"{name}_{suffix}_gbs": size_bytes / median(values) / 1e9
            for name, values in sorted(self.seconds.items())
        }


def device_figures(rounds: int, size_bytes: int) -> Figures:
    """Gather into, and scatter from, packed device memory, the whole GPU working on it, against one device-to-device copy."""
    figures: Figures = {}
    device = torch.device("cuda")
    programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    for name, piece_bytes in PIECES.items():
        scratch = Scratch(piece_bytes, SEGMENTS, size_bytes, device, programs)
        scratch.fill()
        packed = torch.empty_like(scratch.paged)
        table = paged_copy.SegmentTable.on(device, scratch.segments)
        access = choose_access(scratch.segments, 256)
        blocks = torch.randperm(scratch.count, device=device)
        images = packed.data_ptr() + torch.randperm(scratch.count, device=device) * scratch.block_bytes
        copies = {
            "device_gather": partial(
                _event_s, partial(paged_copy.gather, table, blocks, images, access, programs)
            ),
            "device_scatter": partial(
                _event_s, partial(paged_copy.scatter, table, blocks, images, access, programs)
            ),
        }
        measured = Rounds()
        measured.run(copies, partial(_event_s, partial(packed.copy_, scratch.paged)), rounds)
        found = measured.figures(name, scratch.count * scratch.block_bytes)
        figures |= {key.replace("plain", "device_copy"): value for key, value in found.items()}
    return figures


def bus_figures(rounds: int, size_bytes: int, busy: bool, programs: int = PROGRAMS_DEFAULT) -> Figures:
    """Every mode in both directions against one large pinned copy; ``busy``: while matrices are multiplied on another stream."""
    figures: Figures = {}
    mark = "_busy" if busy else ""
    for name, piece_bytes in PIECES.items():
        scratch = Scratch(piece_bytes, SEGMENTS, size_bytes, torch.device("cuda"), programs)
        scratch.fill()
        for direction, way in WAY.items():
            matmul = Matmul() if busy else None
            copies = {
                f"{way}_{mode.value}": partial(_transfer_s, scratch, direction, mode, matmul) for mode in Mode
            }
            measured = Rounds()
            measured.run(copies, partial(plain_s, scratch, direction, matmul), rounds)
            found = measured.figures(name + mark, scratch.count * scratch.block_bytes)
            figures |= {key.replace("plain", f"{way}_link"): value for key, value in found.items()}
            best = max(found[f"{way}_{mode.value}_{name}{mark}_ratio"] for mode in Mode)
            figures[f"{way}_best_{name}{mark}_ratio"] = best
    return figures


def matmul_figures(size_bytes: int, programs: int = PROGRAMS_DEFAULT) -> Figures:
    """How much slower a matrix product runs while 16 KiB pieces are copied: time beside each mode over time alone."""
    scratch = Scratch(PIECES["16k"], SEGMENTS, size_bytes, torch.device("cuda"), programs)
    figures: Figures = {}
    for direction, way in WAY.items():
        for mode in Mode:
            ratios = []
            for _ in range(3):
                alone = Matmul().timed(lambda: None)
                beside = Matmul().timed(partial(_transfer_s, scratch, direction, mode, None, quiet=False))
                ratios.append(beside / alone)
            figures[f"matmul_beside_{way}_{mode.value}_slowdown"] = median(ratios)
    return figures


class Matmul:
    """8192 × 8192 products in bf16 on a stream of their own."""

    PRODUCTS = 40

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._factors = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
        self._out = torch.empty(8192, 8192, dtype=torch.bfloat16, device="cuda")
        self._end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()

    def keep_busy(self) -> None:
        """Queue products unless enough are queued."""
        if self._end.query():
            self._queue()

    def timed(self, beside: Callable[[], object]) -> float:
        """Seconds that a queue of products takes while ``beside`` is called again and again."""
        torch.cuda.synchronize()
        start = torch.cuda.Event(enable_timing=True)
        start.record(self._stream)
        self._queue()
        while not self._end.query():
            beside()
        self._end.synchronize()
        return start.elapsed_time(self._end) / 1e3

    def _queue(self) -> None:
        with torch.cuda.stream(self._stream):
            for _ in range(self.PRODUCTS):
                torch.matmul(self._factors[0], self._factors[1], out=self._out)
            self._end.record(self._stream)


def _event_s(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _transfer_s(
    scratch: Scratch, direction: Direction, mode: Mode, matmul: Matmul | None, quiet: bool = True
) -> float:
    rng = np.random.default_rng()
    if matmul is not None:
        matmul.keep_busy()
    elif quiet:
        torch.cuda.synchronize()
    start = time.perf_counter()
    scratch.run(direction, mode, scratch.count * scratch.block_bytes, rng)
    return time.perf_counter() - start


def plain_s(scratch: Scratch, direction: Direction, matmul: Matmul | None) -> float:
    """Seconds of one copy of all of ``scratch`` between pinned memory and the device; what the ratios compare with."""
    if matmul is not None:
        matmul.keep_busy()
    else:
        torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    start = time.perf_counter()
    with torch.cuda.stream(stream):
        if direction is Direction.STORE:
            scratch.host.copy_(scratch.paged, non_blocking=True)
        else:
            scratch.paged.copy_(scratch.host, non_blocking=True)
    stream.synchronize()
    return time.perf_counter() - start
