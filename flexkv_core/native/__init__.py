"""Bulk work behind one door: hashing, CRC32C, paged copies and the run index.

The C module ``_native`` is used where it was built; ``twin`` offers the same functions in Python and numpy, as oracle in the tests
and as fallback where no compiler is. ``NATIVE`` says which of the two answers. The contracts stand in ``_native.pyi``; both sides
raise the same errors:

- ``TypeError``   an argument of the wrong kind (a buffer of another dtype or shape, a read-only output)
- ``ValueError``  a size that does not fit: token out of int32, buffers whose lengths disagree, an image larger than its slot
- ``IndexError``  a block or slot id out of range; nothing has been copied then
"""

from __future__ import annotations

from flexkv_core.native import twin

try:
    from flexkv_core.native import _native
except ImportError:
    NATIVE = False
    hash_blocks = twin.hash_blocks
    pack_tokens = twin.pack_tokens
    crc32c = twin.crc32c
    crc32c_slots = twin.crc32c_slots
    gather = twin.gather
    scatter = twin.scatter
    gather_crc = twin.gather_crc
    scatter_verify = twin.scatter_verify
    quantise = twin.quantise
    dequantise = twin.dequantise
    answer_match = twin.answer_match
    ask_match = twin.ask_match
    INSTRUCTIONS = "python"
else:
    NATIVE = True
    hash_blocks = _native.hash_blocks
    pack_tokens = _native.pack_tokens
    crc32c = _native.crc32c
    crc32c_slots = _native.crc32c_slots
    gather = _native.gather
    scatter = _native.scatter
    gather_crc = _native.gather_crc
    scatter_verify = _native.scatter_verify
    quantise = _native.quantise
    dequantise = _native.dequantise
    answer_match = _native.answer_match
    ask_match = _native.ask_match
    INSTRUCTIONS = _native.INSTRUCTIONS

__all__ = [
    "INSTRUCTIONS",
    "NATIVE",
    "answer_match",
    "ask_match",
    "crc32c",
    "crc32c_slots",
    "dequantise",
    "gather",
    "gather_crc",
    "hash_blocks",
    "pack_tokens",
    "quantise",
    "scatter",
    "scatter_verify",
]
