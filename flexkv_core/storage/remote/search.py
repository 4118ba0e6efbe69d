"""The longest prefix that a store has, in few round trips."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Ask = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]]
"""One round trip: whether the store has the blocks at these places (int64 [n], ascending)."""


def longest_prefix(count: int, ask: Ask, probes_max: int) -> int:
    """How many of ``count`` blocks the store has from the first on.

    Each round asks for at most ``probes_max`` places spread over what is undecided, which so shrinks by that factor: 8,192 blocks take 4
    rounds of 16. Blocks leave a store one by one, so one that was not asked for may be missing all the same: a read finds that out.
    """
    has, lacks = 0, count  # blocks before `has` are there; the one at `lacks` is not, or is the end
    while has < lacks:
        places = _spread(has, lacks, probes_max)
        there = ask(places)
        first_missing = len(there) if there.all() else int(there.argmin())
        if first_missing < len(places):
            lacks = int(places[first_missing])
        if first_missing:
            has = int(places[first_missing - 1]) + 1
    return has


def _spread(start: int, stop: int, most: int) -> npt.NDArray[np.int64]:
    """At most ``most`` places in ``start`` … ``stop - 1``, the first and the last among them."""
    if stop - start <= most or most == 1:
        return np.arange(start, min(stop, start + most))
    places: npt.NDArray[np.int64] = np.unique(np.linspace(start, stop - 1, most).astype(np.int64))
    return places
