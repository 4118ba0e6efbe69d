"""Contracts of the C extension; ``twin`` keeps the same ones.

Buffers are C-contiguous and one-dimensional. "ids" are int32 or int64, "addresses" and strides int64. Addresses are the caller's
word: the caller guarantees that the memory behind them is mapped and stays so until the call returns. Ids are copied before they are
checked, so changing them from another thread meanwhile is harmless. Calls that move or hash more than some tens of KiB drop the GIL.
"""

from collections.abc import Sequence

from typing_extensions import Buffer

INSTRUCTIONS: str
"""The instructions that were chosen at import: "avx512", "avx2", "sse42" or "generic"."""

def select_instructions(name: str | None, /) -> None:
    """For tests and benchmarks: use this set of instructions, or the best for None. ValueError where the machine can't run it."""

def hash_blocks(parent: Buffer, tokens: Buffer, tokens_per_block: int) -> bytes:
    """Keys of the full blocks of ``tokens``: key_i = XXH3_128(key_{i-1} || tokens of block i as int32 little-endian).

    parent: the 16 bytes before the first block. tokens: int32 or int64, shape [tokens]; both give the same keys; an int64 token out
    of int32's range is a ValueError. Digests are canonical (big-endian), as of python-xxhash. The tail that fills no block is dropped.
    """

def pack_tokens(tokens: Sequence[int] | Buffer, start: int, stop: int) -> bytes:
    """tokens[start:stop] as int32 little-endian bytes.

    Quick for lists, tuples and int32/int64 buffers; another sequence is sliced first. ValueError for a token out of int32's range
    and for start and stop that are not 0 <= start <= stop <= len(tokens).
    """

def crc32c(data: Buffer, crc: int = 0) -> int:
    """CRC32C (Castagnoli, RFC 3720) of data; ``crc`` is the value of what came before, so crc32c(b, crc32c(a)) == crc32c(a + b)."""

def crc32c_slots(
    base_addr: int,
    slot_bytes: int,
    offset: int,
    length: int,
    slots: Buffer,
    keys: Buffer,
    out: Buffer,
    threads: int = 1,
) -> None:
    """out[i] = crc32c(the bytes at base_addr + slots[i] * slot_bytes + offset, of this length, seeded with crc32c(key_i)).

    slots: ids, shape [n], not negative. keys: 16 * n bytes. out: uint32, shape [n]. offset + length may not exceed slot_bytes.
    threads: how many share the slots, the calling one included, at most 64; the others need no GIL, and sleep until the next
    call. Of several calls at once only one has them.
    """

def gather(
    segment_addrs: Buffer,
    block_strides: Buffer,
    piece_bytes: int,
    blocks: Buffer,
    block_count: int,
    slot_base: int,
    slot_stride: int,
    slots: Buffer,
    slot_count: int,
    blocks_per_slot: int = 1,
    shard_offset: int = 0,
    image_stride: int = 0,
) -> None:
    """Copy paged blocks into slots.

    With S segments, n slots and k = blocks_per_slot, for every i < n, j < k, s < S, piece_bytes bytes go

        from  segment_addrs[s] + blocks[i * k + j] * block_strides[s]
        to    slot_base + slots[i] * slot_stride + shard_offset + (j * S + s) * piece_bytes

    so that a slot's image is k * S * piece_bytes contiguous bytes; with an image_stride (S * piece_bytes at least), to

              slot_base + slots[i] * slot_stride + shard_offset + j * image_stride + s * piece_bytes

    which serves some of the segments of slots that hold more. segment_addrs, block_strides: int64, shape [S]. blocks: ids, shape
    [n * k], each in [0, block_count). slots: ids, shape [n], each in [0, slot_count). All ids are checked before a byte is copied;
    the IndexError names position and value. No byte may lie beyond slot_stride (ValueError).
    """

def scatter(
    segment_addrs: Buffer,
    block_strides: Buffer,
    piece_bytes: int,
    blocks: Buffer,
    block_count: int,
    slot_base: int,
    slot_stride: int,
    slots: Buffer,
    slot_count: int,
    blocks_per_slot: int = 1,
    shard_offset: int = 0,
    image_stride: int = 0,
) -> None:
    """Copy slots into paged blocks: gather's arguments, the other way."""

def gather_crc(
    segment_addrs: Buffer,
    block_strides: Buffer,
    piece_bytes: int,
    blocks: Buffer,
    block_count: int,
    slot_base: int,
    slot_stride: int,
    slots: Buffer,
    slot_count: int,
    keys: Buffer,
    crc_out: Buffer,
    blocks_per_slot: int = 1,
    shard_offset: int = 0,
) -> None:
    """gather, and crc_out[i] = crc32c(image of slot i, seeded with crc32c(key_i)), of the very bytes that were written.

    keys: 16 * n bytes. crc_out: uint32, shape [n], writable.
    """

def scatter_verify(
    segment_addrs: Buffer,
    block_strides: Buffer,
    piece_bytes: int,
    blocks: Buffer,
    block_count: int,
    slot_base: int,
    slot_stride: int,
    slots: Buffer,
    slot_count: int,
    keys: Buffer,
    crc_expected: Buffer,
    ok_out: Buffer,
    blocks_per_slot: int = 1,
    shard_offset: int = 0,
) -> int:
    """scatter, with the checksum of what was copied; returns how many slots' images no longer have theirs: their blocks hold zeros then.

    keys: 16 * n bytes. crc_expected: uint32, shape [n]. ok_out: uint8, shape [n], writable; 1 where the blocks hold the
    image of slot i, 0 where they hold zeros.
    """

def quantise(
    segment_addrs: Buffer,
    block_strides: Buffer,
    piece_bytes: int,
    blocks: Buffer,
    block_count: int,
    images: Buffer,
    scales_offset: int,
    image_bytes: int,
) -> None:
    """Paged blocks of bfloat16 to images of fp8, as ``flexkv_core.quantised`` defines them.

    With S segments and n blocks, for every i < n, s < S, the piece of piece_bytes at

        segment_addrs[s] + blocks[i] * block_strides[s]

    goes to images[i] + s * piece_bytes / 2, and its scale (float32) to images[i] + scales_offset + 4 * s; all other bytes of the image, which
    has image_bytes, become 0. Where a piece holds a NaN or an infinity its scale is not finite. segment_addrs, block_strides: int64,
    shape [S], multiples of 2. blocks: ids, shape [n], each in [0, block_count) (IndexError otherwise, before a byte is written). images:
    int64 addresses, shape [n]. ValueError where the pieces do not fit before scales_offset, or their scales before image_bytes.
    """

def dequantise(
    segment_addrs: Buffer,
    block_strides: Buffer,
    piece_bytes: int,
    blocks: Buffer,
    block_count: int,
    images: Buffer,
    scales_offset: int,
    image_bytes: int,
    first_segment: int = 0,
) -> None:
    """Images to paged blocks: quantise's arguments, the other way. The segments are those of the image from ``first_segment`` on."""

def ask_match(fd: int, memory: Buffer, keys: Buffer, kind: int, number: int, timeout_s: float, /) -> int:
    """Put ``keys`` at the start of ``memory``, ask through a socket how many blocks of them are there, in a frame of ``kind`` as defined in
    ``flexkv_core/serve/wire.py``, and wait for the answer.

    Returns the blocks; -1 where no answer to this question came within timeout_s: what came instead was not received, and the caller has to
    wait for the answer. Drops the GIL. ValueError: the keys do not go into memory. BlockingIOError: the socket takes nothing more now,
    nothing was sent. OSError: the other side is gone. The twin leaves the answer to its caller.
    """

def answer_match(index: object, fd: int, kind: int, memory: Buffer, /) -> bool:
    """Answer such a question where it is all that a socket has to be received, its keys at the start of ``memory``: as ``index.match`` without
    ``through_writing``.

    index: a RunIndex, of which nobody makes use meanwhile. Returns whether it was answered; otherwise nothing was received. Waits for
    nothing. The twin leaves all questions to its caller.
    """

class Uring:
    """io_uring over open files; ``flexkv_core.io.uring`` wraps it, and ``flexkv_core.io.base.IoEngine`` is its contract. It is missing
    where the extension was built without Linux's headers; there is no twin. One thread at a time (RuntimeError otherwise)."""

    def __new__(cls, files: Buffer, depth: int) -> Uring:
        """files: int32 descriptors. depth: 1 .. 4096. OSError: EPERM, EACCES or ENOSYS where the host refuses io_uring, EOPNOTSUPP
        where its kernel is older than 5.11."""

    def register_buffers(self, pieces: Buffer) -> None:
        """Once. pieces: int64 [start, end, start, end, …], ascending, each at most 1 GiB. OSError where the kernel refuses: operations
        go on unregistered then. Faults untouched memory in, which takes seconds."""

    def submit(self, kind: int, ops: Buffer, length: int, deadline_s: float) -> int:
        """ops: records of IO_OP. deadline_s: negative for none. ValueError as of IoEngine.submit, and after close()."""

    def wait(self, min_count: int, timeout_s: float) -> tuple[bytes, bytes]:
        """Tags (int64) and results (int32). timeout_s: negative for none."""

    def cancel(self, batch: int) -> None: ...
    def fileno(self) -> int: ...
    def inject(self, results: Buffer) -> None:
        """For tests: results (int32) that the next completions report instead of the kernel's: a negative errno, or at most that many
        bytes; 2**31 - 1 for the truth."""

    def close(self) -> None: ...
    @property
    def pending(self) -> int: ...
