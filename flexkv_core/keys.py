"""BlockKeys: which bytes a block must hold, in 16 bytes.

The root of every key is a fingerprint of all that must agree before bytes may be shared (model, dtype, layout, format version),
then the namespace (LoRA adapter, cache salt, a user's own). From there keys are chained: key *i* is XXH3-128 over key *i - 1* and
the tokens of block *i* as little-endian int32. Unlike an engine's own block hashes, which may be seeded per process, these are
equal in every process and after every restart.

XXH3 is not a cryptographic hash. Tenants who must not probe each other's cache get a namespace each (a cache salt), which enters
the root.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xxhash

from flexkv_core import native
from flexkv_core.types import KEY_BYTES, TokenIds

FORMAT_VERSION = 1


def fingerprint(identity: Mapping[str, object]) -> bytes:
    """16 bytes over everything that must agree before two processes may share bytes.

    ``identity`` is JSON-serialisable; the order of its keys does not matter. The format version of FlexKV is added.
    """
    text = json.dumps({"flexkv_format": FORMAT_VERSION, **identity}, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_digest(text.encode())


def namespace_root(root: bytes, namespace: Sequence[str]) -> bytes:
    """Parent key of a sequence's first block: ``root`` itself for the empty namespace.

    The parts are length-prefixed, so ``("ab", "c")`` and ``("a", "bc")`` differ.
    """
    if not namespace:
        return root
    parts = [part.encode() for part in namespace]
    return xxhash.xxh3_128_digest(root + b"".join(len(part).to_bytes(4, "little") + part for part in parts))


@dataclass(frozen=True)
class Salt:
    """Something besides tokens that the blocks from ``position`` (in tokens) on depend on, an image for instance.

    ``digest`` names the content. The block that holds ``position`` and all later ones get other keys.
    """

    position: int
    digest: str


class KeyChain:
    """Keys of one growing sequence; hashes each token once.

    ``salts`` are sorted by position. Not thread-safe.
    """

    def __init__(self, root: bytes, tokens_per_block: int, salts: Sequence[Salt] = ()) -> None:
        assert len(root) == KEY_BYTES
        self._root = root
        self._tokens_per_block = tokens_per_block
        self._salts = sorted(salts, key=lambda salt: salt.position)
        self._salts_used = 0
        self._keys = bytearray()

    def __len__(self) -> int:
        """Blocks whose keys are known."""
        return len(self._keys) // KEY_BYTES

    def keys(self, blocks: int) -> bytes:
        """Keys of the first ``blocks`` blocks, ``16 * blocks`` bytes; at most ``len(self)`` of them."""
        assert blocks <= len(self), (blocks, len(self))
        return bytes(self._keys[: KEY_BYTES * blocks])

    def extend(self, tokens: Sequence[int], count: int) -> None:
        """Take in ``tokens[:count]`` of the whole sequence; what was taken in before is not looked at again.

        Raises:
            ValueError: a token id outside int32.
        """
        start, stop = len(self), count // self._tokens_per_block
        while start < stop:
            parent, end = self._enter_block(start, stop)
            size = self._tokens_per_block
            packed = memoryview(native.pack_tokens(tokens, start * size, end * size)).cast("i")
            self._keys += native.hash_blocks(parent, packed, size)
            start = end

    def _enter_block(self, block: int, stop: int) -> tuple[bytes, int]:
        """The parent of ``block`` with the salts that begin in it mixed in, and the end of the span that meets no other salt."""
        parent = bytes(self._keys[-KEY_BYTES:]) or self._root
        size = self._tokens_per_block
        while self._salts_used < len(self._salts):
            salt = self._salts[self._salts_used]
            if salt.position >= (block + 1) * size:
                stop = min(stop, salt.position // size)
                break
            parent = namespace_root(parent, ("salt", salt.digest, str(salt.position - block * size)))
            self._salts_used += 1
        return parent, stop


def hash_tokens(root: bytes, tokens: TokenIds, tokens_per_block: int) -> bytes:
    """Keys of the full blocks of ``tokens`` (int32 or int64, one dimension); ``16 * (len(tokens) // tokens_per_block)`` bytes.

    Raises:
        ValueError: a token id outside int32.
    """
    return native.hash_blocks(root, tokens, tokens_per_block)
