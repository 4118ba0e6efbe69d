"""Runs the kernels that round to fp8 on one geometry and compares every byte with the native library's, which the tests hold to torch's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flexkv_core import native
from flexkv_core.quantised import QuantisedImage
from flexkv_kernels.gpu_bench.geometry import LAYOUTS, Geometry
from flexkv_kernels.paged_copy import SegmentTable
from flexkv_kernels.quantised_copy import choose_variant, dequantise, quantise
from flexkv_kernels.segments import pieces_of


@dataclass(frozen=True)
class QuantisedCase:
    """What to round: ``moved`` blocks of a bfloat16 geometry in a random order, ``programs`` programs, ``spare`` scales beyond one a piece."""

    geometry: Geometry
    seed: int
    moved: int
    programs: int = 3
    spare: int = 0
    skip: bool = False  # leave the first block out by a negative id
    layerwise: bool = False  # back layer by layer


def quantised_differences(case: QuantisedCase, device: str = "cpu") -> list[str]:
    """What the kernels did differently; nothing is the wanted answer."""
    run = _Run(case, device)
    return [*run.there(), *run.back()]


def quantised_cases(seed: int) -> Iterator[QuantisedCase]:
    """Every layout at several block sizes, layer by layer, with tails and left-out blocks."""
    for layout in LAYOUTS:
        for tokens in (1, 16, 64, 256):
            geometry = Geometry(layout, "bf16", blocks=24, tokens=tokens, layers=3, heads=4, dim=64)
            yield QuantisedCase(geometry, seed, moved=16, programs=200, spare=tokens % 7)
        geometry = Geometry(layout, "bf16", 24, tokens=33, layers=3, heads=3, dim=24)
        yield QuantisedCase(geometry, seed, moved=16, programs=40, skip=True, layerwise=True)


class _Run:
    def __init__(self, case: QuantisedCase, device: str) -> None:
        self.case, self.device = case, device
        self.wanted = case.geometry.tensors(case.seed)
        for index, tensor in enumerate(self.wanted):
            _make_finite(tensor, case.seed + index)
        self.tensors = [_copy(tensor, device) for tensor in self.wanted]
        self.segments = pieces_of(self.tensors, case.geometry.block_dim)
        self.image = QuantisedImage.of(self.segments, len(self.segments.addresses) + case.spare)
        self.variant = choose_variant(self.segments, self.image)
        self.table = SegmentTable.on(device, self.segments)
        rng = np.random.default_rng(case.seed)
        self.blocks = rng.permutation(case.geometry.blocks)[: case.moved]
        # Room around every image, to see what is written beside them.
        self.size = (2 * case.moved + 1) * (self.image.image_bytes + 16)
        self.offsets = (2 * rng.permutation(case.moved) + 1) * (self.image.image_bytes + 16)

    def there(self) -> list[str]:
        mine, theirs = self._buffer(self.device), self._buffer("cpu")
        self._call(quantise, mine)
        native.quantise(**self._native(theirs))
        wrong = int((mine.cpu() != theirs).sum())
        self.images = theirs
        return [f"quantise: {wrong} bytes"] if wrong else []

    def back(self) -> list[str]:
        images = self.images.to(self.device)
        images = images if images.data_ptr() % 16 == 0 else images.clone()
        for tensor in (*self.tensors, *self.wanted):
            tensor.zero_()
        runs: list[slice | None] = [None]
        if self.case.layerwise:
            runs = [run for layer in range(self.segments.layer_count) for run in self.segments.runs_of(layer)]
        for run in runs:
            self._call(dequantise, images, run=run)
        native.dequantise(**self._native(self.images))
        pairs = zip(self.tensors, self.wanted, strict=True)
        wrong = [
            index
            for index, (mine, theirs) in enumerate(pairs)
            if not torch.equal(mine.cpu().view(torch.int16), theirs.view(torch.int16))
        ]
        return [f"dequantise: tensors {wrong}"] if wrong else []

    def _buffer(self, device: str) -> torch.Tensor:
        return torch.full((self.size,), 0xA5, dtype=torch.uint8, device=device)

    def _call(self, kernel, buffer: torch.Tensor, **how: slice | None) -> None:  # type: ignore[no-untyped-def]
        named = self.blocks.copy()
        if self.case.skip:
            named[0] = -1
        lists = (
            torch.from_numpy(array).to(self.device) for array in (named, buffer.data_ptr() + self.offsets)
        )
        kernel(self.table, *lists, self.image, self.variant, self.case.programs, **how)

    def _native(self, buffer: torch.Tensor) -> dict[str, Any]:
        segments = pieces_of(self.wanted, self.case.geometry.block_dim)
        first = int(self.case.skip)
        return {
            "segment_addrs": segments.addresses,
            "block_strides": segments.strides,
            "piece_bytes": segments.piece_bytes,
            "blocks": self.blocks[first:],
            "block_count": segments.block_count,
            "images": buffer.data_ptr() + self.offsets[first:],
            "scales_offset": self.image.scales_offset,
            "image_bytes": self.image.image_bytes,
        }


def _make_finite(tensor: torch.Tensor, seed: int) -> None:
    """Values over many magnitudes, as a model's and beyond; some pieces are zeros."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(-30, 12, tensor.shape, generator=generator)
    values = torch.randn(tensor.shape, generator=generator) * 2.0**spread
    tensor.copy_(values * 10.0 ** int(torch.randint(-30, 30, (1,), generator=generator)))
    tensor[0] = 0


def _copy(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The same values at the same strides, on another device; views of one memory stay apart, which copies nothing wrong."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return copy.copy_(tensor)
