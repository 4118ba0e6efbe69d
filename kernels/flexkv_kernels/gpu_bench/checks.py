"""Every kernel variant and the whole copier against the reference, with fresh random bytes, on the GPU itself."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from flexkv_kernels.gpu_bench.geometry import DTYPES, LAYOUTS, Geometry
from flexkv_kernels.gpu_bench.quantised_trip import quantised_cases, quantised_differences
from flexkv_kernels.gpu_bench.round_trip import Case, differences

BLOCK_SIZES = (1, 2, 16, 64, 128, 256)


def kernel_cases(seed: int) -> Iterator[Case]:
    """All layouts, dtypes and block sizes; every layout layer by layer; then every width of access, tails, left-out blocks, and the
    checksum."""
    for layout in LAYOUTS:
        for dtype in DTYPES:
            for tokens in BLOCK_SIZES:
                geometry = Geometry(layout, dtype, blocks=24, tokens=tokens, layers=3, heads=4, dim=64)
                yield Case(geometry, seed, moved=16, gap=16, programs=200)
        yield Case(
            Geometry(layout, "bf16", 24, 16, 3, 4, 64), seed, moved=16, gap=16, programs=40, layerwise=True
        )
    for gap in (16, 8, 4, 2, 1):
        for tokens, dim in ((1, 16), (33, 24), (200, 40)):
            geometry = Geometry("kv_outer", "bf16", blocks=12, tokens=tokens, layers=2, heads=3, dim=dim)
            yield Case(geometry, seed, moved=9, gap=gap, programs=500, skip=True)
            if gap >= 4:
                yield Case(geometry, seed, moved=9, gap=gap, programs=77, checksum=True)


def check_kernels() -> tuple[int, list[str]]:
    """How many cases ran, and what was wrong; a fresh seed each time, which a failure names."""
    seed, count, wrong = secrets.randbelow(1 << 30), 0, []
    for case in kernel_cases(seed):
        count += 1
        wrong += [f"{case}: {text}" for text in differences(case, "cuda")]
    for quantised in quantised_cases(seed):
        count += 1
        wrong += [f"{quantised}: {text}" for text in quantised_differences(quantised, "cuda")]
    return count, wrong
