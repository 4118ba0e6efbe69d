"""Where a client puts the keys of a request: memory that it shares with the server, so that a lookup of 131,072 tokens sends 40 bytes.

One request is under way at a time, and its keys are the only content. The server makes the memory, whose size is sealed, and copies out what
it needs; whatever a client writes meanwhile, it looks up keys that do not exist.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from flexkv_core.errors import CapacityError
from flexkv_core.serve.wire import WireError
from flexkv_core.types import KEY_BYTES

ARENA_BYTES = 4 << 20
"""The keys of 262,144 blocks, four million tokens in blocks of 16. Pages are taken when they are first used."""


class Arena:
    """See the module's text. ``fd`` is closed with it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        try:
            self._map = mmap.mmap(fd, ARENA_BYTES, mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise CapacityError(f"the memory for keys cannot be mapped: {error}") from error
        self._content = memoryview(self._map).toreadonly()

    @classmethod
    def create(cls) -> Arena:
        """A new one."""
        fd = os.memfd_create("flexkv-keys", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, ARENA_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls(fd)

    @property
    def memory(self) -> mmap.mmap:
        """Where the keys of the next request go, and are read."""
        return self._map

    def read(self, size: int) -> bytes:
        """A copy of the keys of a request, ``size`` bytes; WireError as :meth:`look`."""
        return bytes(self.look(size))

    def look(self, size: int) -> memoryview:
        """The keys of a request where they lie, which spares a lookup to read those that it does not need; to be let go of before
        :meth:`close`.

        Raises:
            WireError: more than there can be, or not whole keys.
        """
        if size > ARENA_BYTES or size % KEY_BYTES:
            raise WireError(f"{size} bytes of keys; at most {ARENA_BYTES} are allowed, {KEY_BYTES} a key")
        return self._content[:size]

    def close(self) -> None:
        """Unmap."""
        self._content.release()
        self._map.close()
        os.close(self.fd)
