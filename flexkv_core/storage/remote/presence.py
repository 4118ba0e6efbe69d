"""What is known of a store's contents without asking it: which prefixes it had and which blocks it had not, for a while."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flexkv_core.types import KEY_BYTES

ENTRIES_MAX = 65536
"""Of each kind: about 10 MB."""
MARK_BITS = 20
MARKED_MAX = 2 * ENTRIES_MAX
"""Of a megabyte of marks at most an eighth is set; a prompt of 8,192 blocks costs 0.1 ms, and 1.5 ms if each key is looked up."""


class Presence:
    """Keys are chained, so that the key of a prefix's last block speaks for all of it. The caller holds a lock.

    Args:
        found_s, missing_s: how long an answer holds. A block that is missing may be written by another machine any moment.
    """

    def __init__(self, found_s: float, missing_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._found_s = found_s
        self._missing_s = missing_s
        self._clock = clock
        self._found: OrderedDict[bytes, float] = OrderedDict()
        self._missing: OrderedDict[bytes, float] = OrderedDict()
        self._marks = np.zeros(
            1 << MARK_BITS, np.bool_
        )  # which keys are worth a look: a filter without false negatives
        self._marked = 0

    def prefix(self, keys: bytes, start: int = 0) -> int:
        """How many blocks of ``keys`` the store is known to have from the first on; ``start`` if it is no more than that."""
        if not self._found:
            return start
        now = self._clock()
        for block in (np.flatnonzero(self._marks[_places(keys)[start:]])[::-1] + start).tolist():
            expires = self._found.get(keys[KEY_BYTES * block : KEY_BYTES * (block + 1)])
            if expires is not None and expires > now:
                return int(block) + 1
        return start

    def is_missing(self, key: bytes) -> bool:
        """Whether the store is known not to have the block."""
        expires = self._missing.get(key)
        return expires is not None and expires > self._clock()

    def note_found(self, keys: bytes) -> None:
        """The store has all of ``keys``, a sequence from its first block on."""
        if not keys:
            return
        self._note(self._found, keys[-KEY_BYTES:], self._found_s)
        self._marked += 1
        if self._marked > MARKED_MAX:  # of keys that are long gone
            self._marks[:] = False
            self._marks[_places(b"".join(self._found))] = True
            self._marked = len(self._found)
        self._marks[_places(keys[-KEY_BYTES:])] = True

    def note_missing(self, key: bytes) -> None:
        """The store has not this block."""
        self._found.pop(key, None)
        self._note(self._missing, key, self._missing_s)

    def forget_found(self, keys: bytes, start: int) -> None:
        """Blocks ``start`` … of the sequence may be gone."""
        for end in range(KEY_BYTES * (start + 1), len(keys) + 1, KEY_BYTES):
            self._found.pop(keys[end - KEY_BYTES : end], None)

    def forget_missing(self, key: bytes) -> None:
        """The block has been written since."""
        self._missing.pop(key, None)

    def clear(self) -> None:
        """Nothing is known any more."""
        self._found.clear()
        self._marks[:] = False
        self._marked = 0
        self._missing.clear()

    def _note(self, entries: OrderedDict[bytes, float], key: bytes, hold_s: float) -> None:
        entries.pop(key, None)
        entries[key] = self._clock() + hold_s
        if len(entries) > ENTRIES_MAX:
            entries.popitem(last=False)


def _places(keys: bytes) -> npt.NDArray[np.uint32]:
    """Of each key's mark; uint32 [blocks]."""
    places: npt.NDArray[np.uint32] = np.frombuffer(keys, "<u4")[::4] & np.uint32((1 << MARK_BITS) - 1)
    return places
