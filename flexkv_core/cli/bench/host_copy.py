"""Paged copies against a contiguous memcpy, checksums, and block hashing; single-threaded, on the tables that the product uses.

The layouts are those of 32 layers with K and V: each layer's K and V in planes of their own (``apart``: ``[2, blocks, …]``, or SGLang's
pools), beside each other within a block (``joined``: ``[blocks, 2, …]``), and all layers of a block in one place (``packed``).

Method: two buffers far larger than the caches, touched before. Each round runs every copy once over all blocks in a fresh random order,
and one contiguous memcpy of the same bytes before and after each; a ratio is the mean of those two over the copy's time, so that what
else the machine does falls on both. Medians over rounds. The memcpy is libc's on more bytes than its own threshold for streaming
stores, its fastest way.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core import native
from flexkv_core.cli.bench.rounding import rounding_figures
from flexkv_core.types import KEY_BYTES

_LAYERS = 32
_SEGMENTS = 2 * _LAYERS  # K and V
_LAYOUTS = ("apart", "joined", "packed")
_PIECES_BYTES = {"16k": 16 << 10, "64k": 64 << 10}
_COPIES = ("gather", "scatter", "gather_crc", "scatter_verify", "scatter_layers")
_DATA_BYTES = 512 << 20


@dataclass(frozen=True)
class _Arena:
    """A paged cache and a pool of slots, each ``data_bytes`` or a little less, and the figures of one benchmark run."""

    paged: npt.NDArray[np.uint8]
    pool: npt.NDArray[np.uint8]
    rounds: int

    @classmethod
    def touched(cls, data_bytes: int, rounds: int) -> _Arena:
        """Both buffers with every page written once, all bytes equal; they begin with a page, as the host tier and an engine's tensors do."""
        paged, pool = (np.frombuffer(mmap.mmap(-1, data_bytes), np.uint8) for _ in range(2))
        paged[:], pool[:] = 1, 1
        return cls(paged, pool, rounds)


@dataclass(frozen=True)
class _Geometry:
    """Blocks of ``_SEGMENTS`` pieces that fill the arena, in a random order on both sides."""

    piece_bytes: int
    arguments: Mapping[str, Any]  # of native.gather
    count: int
    layer_segments: int  # neighbours in a slot

    @classmethod
    def random(cls, arena: _Arena, layout: str, piece_bytes: int, rng: np.random.Generator) -> _Geometry:
        """A fresh random order of all blocks and of all slots."""
        image_bytes = _SEGMENTS * piece_bytes
        count = len(arena.paged) // image_bytes
        joined = 1 if layout == "apart" else 2  # K and V side by side: one piece
        size, segments = joined * piece_bytes, _SEGMENTS // joined
        step, stride = (size, image_bytes) if layout == "packed" else (count * size, size)
        arguments = {
            "segment_addrs": arena.paged.ctypes.data + np.arange(segments, dtype=np.int64) * step,
            "block_strides": np.full(segments, stride, np.int64),
            "piece_bytes": size,
            "blocks": rng.permutation(count).astype(np.int64),
            "block_count": count,
            "slot_base": arena.pool.ctypes.data,
            "slot_stride": image_bytes,
            "slots": rng.permutation(count).astype(np.int32),
            "slot_count": count,
        }
        return cls(piece_bytes, arguments, count, segments // _LAYERS)

    @property
    def image_bytes(self) -> int:
        """Bytes of one block."""
        return _SEGMENTS * self.piece_bytes

    @property
    def data_bytes(self) -> int:
        """Bytes that one copy moves."""
        return self.count * _SEGMENTS * self.piece_bytes


def run(quick: bool = False) -> dict[str, float]:
    """Measure gather, scatter and their checksumming forms; ratios to memcpy (higher is better) and GB/s of payload.

    ``<copy>_<size>_ratio`` is the worst layout's, ``<copy>_<size>_<layout>_ratio`` each one's. ``scatter_layers`` copies layer by layer.
    Takes 1 GiB of memory (``quick``: 128 MiB, whose ratios mean little).
    """
    arena = _Arena.touched(_DATA_BYTES // 8 if quick else _DATA_BYTES, rounds=3 if quick else 7)
    figures: dict[str, float] = {}
    for size, piece_bytes in _PIECES_BYTES.items():
        of_layouts = [_copy_figures(arena, size, layout, piece_bytes) for layout in _LAYOUTS]
        for name in _COPIES:
            figures[f"{name}_{size}_ratio"] = min(
                of_layout[f"{name}_{size}_{layout}_ratio"]
                for of_layout, layout in zip(of_layouts, _LAYOUTS, strict=True)
            )
        for of_layout in of_layouts:
            figures |= of_layout
    figures |= rounding_figures(arena.rounds)
    figures["crc32c_gbs"] = crc32c_gbs()
    figures["hash_block_ns"] = hash_block_ns()
    return figures


def hash_block_ns(tokens: int = 131_072, tokens_per_block: int = 16, batches: int = 20) -> float:
    """Nanoseconds a block of ``native.hash_blocks`` over int32 tokens, by :func:`_undisturbed_s`."""
    ids = np.random.default_rng(0).integers(0, 150_000, tokens, dtype=np.int32)
    parent = bytes(KEY_BYTES)
    return (
        _undisturbed_s(lambda: native.hash_blocks(parent, ids, tokens_per_block), batches)
        * 1e9
        / (tokens // tokens_per_block)
    )


def crc32c_gbs(data_bytes: int = 1 << 20, batches: int = 20) -> float:
    """GB/s of ``native.crc32c`` over data that lies in the caches, by :func:`_undisturbed_s`."""
    data = np.random.default_rng(0).integers(0, 256, data_bytes, dtype=np.uint8)
    return data_bytes / _undisturbed_s(lambda: native.crc32c(data), batches) / 1e9


def _copy_figures(arena: _Arena, size: str, layout: str, piece_bytes: int) -> dict[str, float]:
    """The figures of one layout and piece size. Every round takes the copies in another order."""
    rng = np.random.default_rng(piece_bytes)
    ratios: dict[str, list[float]] = {}
    speeds: dict[str, list[float]] = {}
    for _ in range(arena.rounds):
        geometry = _Geometry.random(arena, layout, piece_bytes, rng)
        copies = _copies(geometry)
        before = _memcpy_s(arena, geometry.data_bytes)
        speeds.setdefault("memcpy", []).append(geometry.data_bytes / before / 1e9)
        for name in rng.permutation(list(copies)).tolist():
            elapsed = _elapsed_s(copies[name])
            after = _memcpy_s(arena, geometry.data_bytes)
            ratios.setdefault(name, []).append((before + after) / 2 / elapsed)
            speeds.setdefault(name, []).append(geometry.data_bytes / elapsed / 1e9)
            before = after
    figures = {f"{name}_{size}_{layout}_ratio": median(ratios[name]) for name in _COPIES}
    return figures | {
        f"{name}_{size}_{layout}_gbs": median(values) for name, values in sorted(speeds.items())
    }


def _copies(geometry: _Geometry) -> Mapping[str, Callable[[], object]]:
    """The copies by name, over the same blocks and slots."""
    arguments, count = geometry.arguments, geometry.count
    keys = bytes(KEY_BYTES * count)
    expected, crcs, ok = np.empty(count, np.uint32), np.empty(count, np.uint32), np.empty(count, np.uint8)
    native.gather_crc(
        **arguments, keys=keys, crc_out=expected
    )  # the arena is uniform: every copy leaves this true

    def scatter_verify() -> None:
        mismatches = native.scatter_verify(**arguments, keys=keys, crc_expected=expected, ok_out=ok)
        assert mismatches == 0, f"{mismatches} of {count} images failed their checksum"

    def scatter_layers() -> None:
        for first in range(0, len(arguments["segment_addrs"]), geometry.layer_segments):
            run = slice(first, first + geometry.layer_segments)
            some = {name: arguments[name][run] for name in ("segment_addrs", "block_strides")}
            place = {"shard_offset": first * arguments["piece_bytes"], "image_stride": geometry.image_bytes}
            native.scatter(**{**arguments, **some, **place})

    return {
        "gather": lambda: native.gather(**arguments),
        "scatter": lambda: native.scatter(**arguments),
        "gather_crc": lambda: native.gather_crc(**arguments, keys=keys, crc_out=crcs),
        "scatter_verify": scatter_verify,
        "scatter_layers": scatter_layers,
    }


def _memcpy_s(arena: _Arena, data_bytes: int) -> float:
    return _elapsed_s(lambda: ctypes.memmove(arena.pool.ctypes.data, arena.paged.ctypes.data, data_bytes))


def _elapsed_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _undisturbed_s(call: Callable[[], object], batches: int) -> float:
    """The best batch's median of 20 calls, batches 50 ms apart.

    Work that lives in registers and caches runs at half its speed while a neighbour uses the other thread of the core (hashing: 8 and
    15 ns a block in turn on one virtual machine), in phases of a second: the best batch is the one outside of them.
    """
    medians = []
    for _ in range(batches):
        medians.append(median(_elapsed_s(call) for _ in range(20)))
        time.sleep(0.05)
    return min(medians)
