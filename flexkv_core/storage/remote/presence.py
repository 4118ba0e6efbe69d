"""What is known of a store's contents without asking it: which prefixes it had and which blocks it had not, for a while."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from flexkv_core.types import KEY_BYTES

ENTRIES_MAX = 65536
"""Of each kind: about 10 MB."""


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

    def prefix(self, keys: bytes, start: int = 0) -> int:
        """How many blocks of ``keys`` the store is known to have from the first on; ``start`` if it is no more than that."""
        if not self._found:
            return start
        now, found = self._clock(), self._found
        for end in range(len(keys), start * KEY_BYTES, -KEY_BYTES):
            expires = found.get(keys[end - KEY_BYTES : end])
            if expires is not None and expires > now:
                return end // KEY_BYTES
        return start

    def is_missing(self, key: bytes) -> bool:
        """Whether the store is known not to have the block."""
        expires = self._missing.get(key)
        return expires is not None and expires > self._clock()

    def note_found(self, keys: bytes) -> None:
        """The store has all of ``keys``, a sequence from its first block on."""
        if keys:
            self._note(self._found, keys[-KEY_BYTES:], self._found_s)

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
        self._missing.clear()

    def _note(self, entries: OrderedDict[bytes, float], key: bytes, hold_s: float) -> None:
        entries.pop(key, None)
        entries[key] = self._clock() + hold_s
        if len(entries) > ENTRIES_MAX:
            entries.popitem(last=False)
