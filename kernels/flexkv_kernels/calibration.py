"""Which mode is fastest for how many bytes: measured for a short time at start, because it depends on the GPU, the bus and the pieces."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from flexkv_core.types import Direction
from flexkv_kernels.paths import Mode

logger = logging.getLogger(__name__)

SIZES_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
"""Transfer sizes that are measured; a transfer takes what was best at the nearest size below."""

DEFAULT_MODE = Mode.STAGED
"""Where nothing was measured: its DMA is in large pieces and its kernel stays in device memory, whatever the piece's size."""

TOLERANCE = {Mode.DMA: 1.2, Mode.DIRECT: 1.15}
"""A mode is taken up to this factor beyond the fastest, in this order. DMA needs no SM: measured while the GPU multiplies matrices (H200,
2026-11-27), DMA of 64 KiB pieces kept 0.84 of the bus and kernels 0.2 to 0.4; while it does nothing, all have 0.86 to 0.94. DIRECT needs
the fewest calls of the host, and so holds its speed beside checksums and other threads, where STAGED went from 0.94 to 0.5."""

Measure = Callable[[Direction, Mode, int], float]
"""Seconds that one transfer of so many bytes takes."""


@dataclass(frozen=True)
class ModeTable:
    """The choice by direction: pairs (least bytes, mode), sizes rising. ``direct``: whether kernels reach the slots."""

    choices: Mapping[Direction, Sequence[tuple[int, Mode]]]
    direct: bool = True

    def choose(self, direction: Direction, size_bytes: int) -> Mode:
        """The mode for a transfer of ``size_bytes``."""
        chosen = DEFAULT_MODE
        for place, (least, mode) in enumerate(self.choices.get(direction, ())):
            if place and size_bytes < least:
                break
            chosen = mode
        return chosen

    def choose_for_layers(self, direction: Direction, layer_bytes: int) -> Mode:
        """The mode for a transfer layer by layer, of ``layer_bytes`` at a time: never STAGED."""
        mode = self.choose(direction, layer_bytes)
        if mode is Mode.STAGED:
            return Mode.DIRECT if self.direct else Mode.DMA
        return mode

    def __str__(self) -> str:
        return "; ".join(
            f"{direction.value}: "
            + ", ".join(f"{mode.value} from {least >> 10} KiB" for least, mode in choices)
            for direction, choices in self.choices.items()
        )


def calibrate(
    measure: Measure,
    modes: Sequence[Mode] = tuple(Mode),
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    budget_s: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
) -> ModeTable:
    """Measure every mode at every size in both directions, for at most about ``budget_s``; what is left out gets the default.

    The best of three calls counts, after one that is not counted (a kernel's first call compiles it).
    """
    deadline, direct = clock() + budget_s, Mode.DIRECT in modes
    choices: dict[Direction, list[tuple[int, Mode]]] = {direction: [] for direction in Direction}
    for size in sizes_bytes:
        for direction in Direction:
            seconds: dict[Mode, float] = {}
            for mode in modes:
                measure(direction, mode, size)
                seconds[mode] = min(measure(direction, mode, size) for _ in range(3))
                if clock() > deadline:
                    logger.warning("calibration stopped after %.1f s, at %d KiB", budget_s, size >> 10)
                    return ModeTable(choices, direct)
            choices[direction].append((size, _best(seconds)))
    return ModeTable(choices, direct)


def _best(seconds: Mapping[Mode, float]) -> Mode:
    fastest = min(seconds, key=seconds.__getitem__)
    close = [
        mode for mode, factor in TOLERANCE.items() if seconds.get(mode, inf) <= factor * seconds[fastest]
    ]
    return close[0] if close else fastest
