"""Rounding to fp8 and back (``store_dtype: fp8``) against a memcpy of the engine's bytes, single-threaded: K and V of 32 layers, 16 KiB each."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from flexkv_core import native
from flexkv_core.quantised import QuantisedImage

_SEGMENTS = 64
_PIECE_BYTES = 16 << 10
_BLOCKS = 128  # 128 MiB, far beyond the caches


def rounding_figures(rounds: int) -> dict[str, float]:
    """GB/s of the engine's bytes, and ratios to the mean of the memcpys before and after (higher is better); medians over ``rounds``."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(_BLOCKS * _SEGMENTS * _PIECE_BYTES // 2, np.float32)
    paged = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)  # bfloat16, cut off
    copy = np.ones_like(paged)
    image = QuantisedImage(_PIECE_BYTES, _SEGMENTS, _SEGMENTS)
    pool = np.ones(_BLOCKS * image.image_bytes, np.uint8)
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        arguments: dict[str, Any] = {
            "segment_addrs": paged.ctypes.data
            + np.arange(_SEGMENTS, dtype=np.int64) * _BLOCKS * _PIECE_BYTES,
            "block_strides": np.full(_SEGMENTS, _PIECE_BYTES, np.int64),
            "piece_bytes": _PIECE_BYTES,
            "blocks": rng.permutation(_BLOCKS),
            "block_count": _BLOCKS,
            "images": pool.ctypes.data + rng.permutation(_BLOCKS) * image.image_bytes,
            "scales_offset": image.scales_offset,
            "image_bytes": image.image_bytes,
        }

        def memcpy_s() -> float:
            return _elapsed_s(lambda: ctypes.memmove(copy.ctypes.data, paged.ctypes.data, paged.nbytes))

        before = memcpy_s()
        for name, call in (("quantise", native.quantise), ("dequantise", native.dequantise)):
            elapsed = _elapsed_s(partial(call, **arguments))
            after = memcpy_s()
            figures.setdefault(f"{name}_16k_ratio", []).append((before + after) / 2 / elapsed)
            figures.setdefault(f"{name}_16k_gbs", []).append(paged.nbytes / elapsed / 1e9)
            before = after
    return {name: median(found) for name, found in figures.items()}


def _elapsed_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
