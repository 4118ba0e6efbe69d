"""Runs the kernels on one geometry and compares every byte with the reference, what must not be touched included."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from flexkv_core.layout import DeviceSegments
from flexkv_kernels import paged_copy
from flexkv_kernels.access import choose_access
from flexkv_kernels.checksum import weighted_sums
from flexkv_kernels.gpu_bench.geometry import Geometry
from flexkv_kernels.paged_copy import SegmentTable
from flexkv_kernels.reference import gather_reference, scatter_reference
from flexkv_kernels.segments import pieces_of


@dataclass(frozen=True)
class Case:
    """What to copy: ``moved`` blocks of a geometry in a random order, images ``gap`` bytes apart, ``programs`` programs."""

    geometry: Geometry
    seed: int
    moved: int
    gap: int = 0
    programs: int = 3
    skip: bool = False  # leave the first block out by a negative id
    checksum: bool = False
    layerwise: bool = False  # layer by layer


def differences(case: Case, device: str = "cpu") -> list[str]:
    """What the kernels did differently from the reference; nothing is the wanted answer."""
    run = _Run(case, device)
    return run.gather() + run.scatter()


class _Run:
    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.dim = case.geometry.block_dim
        self.tensors = case.geometry.tensors(case.seed, device)
        self.segments: DeviceSegments = pieces_of(self.tensors, self.dim)
        rng = np.random.default_rng(case.seed)
        self.blocks = torch.from_numpy(rng.permutation(case.geometry.blocks)[: case.moved]).to(device)
        self.named = self.blocks.clone()
        if case.skip:
            self.named[0] = -1
        # A buffer with room around every image, to see what is written beside them.
        self.pitch = self.segments.block_bytes + case.gap
        self.size = self.pitch * case.moved + case.gap
        order = torch.from_numpy(rng.permutation(case.moved)).to(device)
        self.offsets = case.gap + order * self.pitch

    def gather(self) -> list[str]:
        buffer = torch.full((self.size,), 0xA5, dtype=torch.uint8, device=self.device)
        sums = self._sums()
        self._call(paged_copy.gather, buffer, sums)
        images = gather_reference(self.tensors, self.dim, self.blocks)
        wanted = torch.full_like(buffer, 0xA5)
        for place in range(int(self.case.skip), self.case.moved):
            start = int(self.offsets[place])
            wanted[start : start + images.shape[1]] = images[place]
        found = [] if torch.equal(buffer, wanted) else [f"gather: {int((buffer != wanted).sum())} bytes"]
        return found + self._compare_sums("gather", sums, images)

    def scatter(self) -> list[str]:
        generator = torch.Generator(self.device).manual_seed(self.case.seed + 1)
        buffer = torch.randint(
            0, 256, (self.size,), dtype=torch.uint8, device=self.device, generator=generator
        )
        size = self.segments.block_bytes
        images = torch.stack([buffer[int(start) : int(start) + size] for start in self.offsets])
        wanted = self.case.geometry.tensors(self.case.seed, self.device)
        first = int(self.case.skip)
        scatter_reference(wanted, self.dim, self.blocks[first:], images[first:])
        sums = self._sums()
        self._call(paged_copy.scatter, buffer, sums)
        pairs = zip(self.tensors, wanted, strict=True)
        wrong = [index for index, (mine, theirs) in enumerate(pairs) if not _same_bytes(mine, theirs)]
        found = [f"scatter: tensors {wrong}"] if wrong else []
        return found + self._compare_sums("scatter", sums, images)

    def _call(self, kernel, buffer: torch.Tensor, sums: torch.Tensor | None) -> None:  # type: ignore[no-untyped-def]
        images = buffer.data_ptr() + self.offsets
        alignment = int(np.gcd.reduce(images.cpu().numpy()))
        access = choose_access(self.segments, alignment, self.case.checksum)
        table = SegmentTable.on(self.device, self.segments)
        if not self.case.layerwise:
            kernel(table, self.named, images, access, self.case.programs, sums)
            return
        for layer in range(self.segments.layer_count):
            for run in self.segments.runs_of(layer):
                kernel(table, self.named, images, access, self.case.programs, run=run)

    def _sums(self) -> torch.Tensor | None:
        if not self.case.checksum:
            return None
        return torch.zeros(self.case.moved, dtype=torch.int64, device=self.device)

    def _compare_sums(self, what: str, sums: torch.Tensor | None, images: torch.Tensor) -> list[str]:
        if sums is None:
            return []
        wanted = weighted_sums(images.cpu().numpy())
        wanted[: int(self.case.skip)] = 0
        return [] if (sums.cpu().numpy() == wanted).all() else [f"{what}: checksums"]


def _same_bytes(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    # As bytes, because NaN equals nothing.
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[mine.element_size()]
    return torch.equal(mine.view(whole), theirs.view(whole))
