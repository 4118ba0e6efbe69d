"""Python twin of the C extension: the oracle of its tests, and the fallback where no compiler is.

The contracts stand in ``_native.pyi``; the same arguments give the same results and the same kinds of error. Written to be
obviously right first.
"""

from __future__ import annotations

import ctypes
import operator
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from typing_extensions import Buffer

from flexkv_core.native.twin_crc32c import crc_update
from flexkv_core.native.twin_quantise import dequantised, quantised
from flexkv_core.types import KEY_BYTES

_Array = npt.NDArray[Any]
CRC_THREADS_MAX = 64
_INTEGERS = (np.dtype(np.int32), np.dtype(np.int64))


def hash_blocks(parent: Any, tokens: Any, tokens_per_block: int) -> bytes:
    """Chained XXH3-128 keys of the full blocks; see ``_native.pyi``."""
    key = bytes(memoryview(parent))
    if len(key) != KEY_BYTES:
        raise ValueError(f"parent has {len(key)} bytes, expected {KEY_BYTES}")
    if tokens_per_block < 1:
        raise ValueError(f"tokens_per_block is {tokens_per_block}, expected at least 1")
    ids = _array(tokens, "tokens", _INTEGERS)
    count = len(ids) // tokens_per_block
    data = _as_int32_bytes(ids[: count * tokens_per_block])
    block_bytes = 4 * tokens_per_block
    keys = []
    for at in range(0, len(data), block_bytes):
        key = xxhash.xxh3_128_digest(key + data[at : at + block_bytes])
        keys.append(key)
    return b"".join(keys)


def pack_tokens(tokens: Any, start: int, stop: int) -> bytes:
    """tokens[start:stop] as int32 little-endian; see ``_native.pyi``."""
    if not 0 <= start <= stop <= len(tokens):
        raise ValueError(f"range [{start}, {stop}) does not lie in {len(tokens)} tokens")
    if _is_buffer(tokens):
        return _as_int32_bytes(_array(tokens, "tokens", _INTEGERS)[start:stop])
    return np.array([_token(token) for token in tokens[start:stop]], dtype="<i4").tobytes()


def crc32c(data: Any, crc: int = 0) -> int:
    """CRC32C of data, continuing from ``crc``; see ``_native.pyi``."""
    if not 0 <= crc <= 0xFFFFFFFF:
        raise ValueError(f"crc is {crc}, expected an unsigned 32-bit value")
    view = memoryview(data)
    if not view.c_contiguous:
        raise TypeError("data must be C-contiguous")
    return crc_update(crc, np.frombuffer(view.cast("B"), dtype=np.uint8))


def crc32c_slots(
    base_addr: int,
    slot_bytes: int,
    offset: int,
    length: int,
    slots: Any,
    keys: Any,
    out: Any,
    threads: int = 1,
) -> None:
    """CRC32C of a range of each slot, seeded with its key; see ``_native.pyi``. Runs on one thread whatever is asked for."""
    if not 1 <= threads <= CRC_THREADS_MAX:
        raise ValueError(f"threads is {threads}, expected 1 to {CRC_THREADS_MAX}")
    ids = _ids(slots, "slots")
    sums = _array(out, "out", (np.dtype(np.uint32),), writable=True)
    names = _keys(keys, len(ids))
    _expect_length("out", len(sums), len(ids))
    if min(slot_bytes, offset, length) < 0 or offset + length > slot_bytes:
        raise ValueError(f"offset {offset} and length {length} do not lie in a slot of {slot_bytes} bytes")
    if len(ids) and ids.min() < 0:
        at = int(np.argmax(ids < 0))
        raise IndexError(f"slots[{at}] is {ids[at]}, expected not negative")
    for i, slot in enumerate(ids.tolist()):
        image = _memory(base_addr + slot * slot_bytes + offset, length)
        sums[i] = crc_update(crc_update(0, names[i]), image)


def gather(
    segment_addrs: Any,
    block_strides: Any,
    piece_bytes: int,
    blocks: Any,
    block_count: int,
    slot_base: int,
    slot_stride: int,
    slots: Any,
    slot_count: int,
    blocks_per_slot: int = 1,
    shard_offset: int = 0,
    image_stride: int = 0,
) -> None:
    """Copy paged blocks into slots; see ``_native.pyi``."""
    paging = _Paging.of(segment_addrs, block_strides, piece_bytes, block_count, blocks_per_slot, image_stride)
    pool = _Pool(slot_base, slot_stride, slot_count, shard_offset)
    block_ids, slot_ids = _checked_ids(paging, pool, blocks, slots)
    for i in range(len(slot_ids)):
        _gather_slot(paging, pool, block_ids, slot_ids, i)


def scatter(
    segment_addrs: Any,
    block_strides: Any,
    piece_bytes: int,
    blocks: Any,
    block_count: int,
    slot_base: int,
    slot_stride: int,
    slots: Any,
    slot_count: int,
    blocks_per_slot: int = 1,
    shard_offset: int = 0,
    image_stride: int = 0,
) -> None:
    """Copy slots into paged blocks; see ``_native.pyi``."""
    paging = _Paging.of(segment_addrs, block_strides, piece_bytes, block_count, blocks_per_slot, image_stride)
    pool = _Pool(slot_base, slot_stride, slot_count, shard_offset)
    block_ids, slot_ids = _checked_ids(paging, pool, blocks, slots)
    for i in range(len(slot_ids)):
        _scatter_slot(paging, pool, block_ids, slot_ids, i)


def gather_crc(
    segment_addrs: Any,
    block_strides: Any,
    piece_bytes: int,
    blocks: Any,
    block_count: int,
    slot_base: int,
    slot_stride: int,
    slots: Any,
    slot_count: int,
    keys: Any,
    crc_out: Any,
    blocks_per_slot: int = 1,
    shard_offset: int = 0,
) -> None:
    """gather, and the checksum of each slot's image; see ``_native.pyi``."""
    paging = _Paging.of(segment_addrs, block_strides, piece_bytes, block_count, blocks_per_slot)
    pool = _Pool(slot_base, slot_stride, slot_count, shard_offset)
    block_ids, slot_ids = _checked_ids(paging, pool, blocks, slots)
    names = _keys(keys, len(slot_ids))
    sums = _array(crc_out, "crc_out", (np.dtype(np.uint32),), writable=True)
    _expect_length("crc_out", len(sums), len(slot_ids))
    for i in range(len(slot_ids)):
        _gather_slot(paging, pool, block_ids, slot_ids, i)
        sums[i] = _image_crc(paging, pool, int(slot_ids[i]), names[i])


def scatter_verify(
    segment_addrs: Any,
    block_strides: Any,
    piece_bytes: int,
    blocks: Any,
    block_count: int,
    slot_base: int,
    slot_stride: int,
    slots: Any,
    slot_count: int,
    keys: Any,
    crc_expected: Any,
    ok_out: Any,
    blocks_per_slot: int = 1,
    shard_offset: int = 0,
) -> int:
    """scatter, and zeros for the slots whose checksum does not hold; see ``_native.pyi``."""
    paging = _Paging.of(segment_addrs, block_strides, piece_bytes, block_count, blocks_per_slot)
    pool = _Pool(slot_base, slot_stride, slot_count, shard_offset)
    block_ids, slot_ids = _checked_ids(paging, pool, blocks, slots)
    names = _keys(keys, len(slot_ids))
    sums = _array(crc_expected, "crc_expected", (np.dtype(np.uint32),))
    passed = _array(ok_out, "ok_out", (np.dtype(np.uint8),), writable=True)
    _expect_length("crc_expected", len(sums), len(slot_ids))
    _expect_length("ok_out", len(passed), len(slot_ids))
    mismatches = 0
    for i in range(len(slot_ids)):
        passed[i] = _image_crc(paging, pool, int(slot_ids[i]), names[i]) == sums[i]
        if passed[i]:
            _scatter_slot(paging, pool, block_ids, slot_ids, i)
        else:
            _clear_blocks(paging, block_ids, i)
            mismatches += 1
    return mismatches


def quantise(
    segment_addrs: Any,
    block_strides: Any,
    piece_bytes: int,
    blocks: Any,
    block_count: int,
    images: Any,
    scales_offset: int,
    image_bytes: int,
) -> None:
    """Paged blocks of bfloat16 to images of fp8; see ``_native.pyi``."""
    paging, ids, places = _quantisable(
        segment_addrs,
        block_strides,
        piece_bytes,
        blocks,
        block_count,
        images,
        (scales_offset, image_bytes, 0),
    )
    for block, place in zip(ids, places, strict=True):
        image = _memory(place, image_bytes)
        image[:] = 0
        scales = image[scales_offset:].view(np.float32)
        for index, (addr, at) in enumerate(paging.pieces(block)):
            values = _memory(addr, piece_bytes).view(np.uint16)
            rounded, scales[index] = quantised(values)
            image[at // 2 : at // 2 + len(rounded)] = rounded


def dequantise(
    segment_addrs: Any,
    block_strides: Any,
    piece_bytes: int,
    blocks: Any,
    block_count: int,
    images: Any,
    scales_offset: int,
    image_bytes: int,
    first_segment: int = 0,
) -> None:
    """Images of fp8 to paged blocks; see ``_native.pyi``."""
    place_in_image = (scales_offset, image_bytes, first_segment)
    paging, ids, places = _quantisable(
        segment_addrs, block_strides, piece_bytes, blocks, block_count, images, place_in_image
    )
    size = piece_bytes // 2
    for block, place in zip(ids, places, strict=True):
        image = _memory(place, image_bytes)
        scales = image[scales_offset:].view(np.float32)[first_segment:]
        for index, (addr, _) in enumerate(paging.pieces(block)):
            at = (first_segment + index) * size
            _memory(addr, piece_bytes).view(np.uint16)[:] = dequantised(image[at : at + size], scales[index])


def _quantisable(
    segment_addrs: Any,
    block_strides: Any,
    piece_bytes: int,
    blocks: Any,
    block_count: int,
    images: Any,
    place_in_image: tuple[int, int, int],
) -> tuple[_Paging, _Array, list[int]]:
    """What both directions take, checked: the pieces, int64 [n, 1] blocks, and their images' addresses."""
    scales_offset, image_bytes, first = place_in_image
    if piece_bytes < 0 or piece_bytes % 2:
        raise ValueError(f"piece_bytes is {piece_bytes}, expected whole bfloat16 values")
    paging = _Paging.of(segment_addrs, block_strides, piece_bytes, block_count, 1)
    stop = first + len(paging.segment_addrs)
    if first < 0 or stop * (piece_bytes // 2) > scales_offset or scales_offset + 4 * stop > image_bytes:
        raise ValueError(
            f"{len(paging.segment_addrs)} pieces of {piece_bytes // 2} bytes from {first} on do not fit an image of {image_bytes} bytes"
            f" with scales at {scales_offset}"
        )
    places = _array(images, "images", (np.dtype(np.int64),)).tolist()
    ids = _ids(blocks, "blocks")
    _expect_length("images", len(places), len(ids))
    _expect_ids("blocks", ids, block_count)
    return paging, ids[:, None], places


@dataclass(frozen=True)
class _Paging:
    """Where blocks lie in the engine's memory, and how many of them make one slot's image."""

    segment_addrs: tuple[int, ...]
    block_strides: tuple[int, ...]
    piece_bytes: int
    block_count: int
    blocks_per_slot: int
    image_stride: int  # from one device block's pieces in a slot to the next one's

    @classmethod
    def of(
        cls,
        segment_addrs: Any,
        block_strides: Any,
        piece_bytes: int,
        block_count: int,
        blocks_per_slot: int,
        image_stride: int = 0,
    ) -> _Paging:
        int64 = (np.dtype(np.int64),)
        addrs = _array(segment_addrs, "segment_addrs", int64).tolist()
        strides = _array(block_strides, "block_strides", int64).tolist()
        _expect_length("block_strides", len(strides), len(addrs))
        if piece_bytes < 0:
            raise ValueError(f"piece_bytes is {piece_bytes}, expected not negative")
        if blocks_per_slot < 1:
            raise ValueError(f"blocks_per_slot is {blocks_per_slot}, expected at least 1")
        row = len(addrs) * piece_bytes
        if image_stride and image_stride < row:
            raise ValueError(
                f"image_stride is {image_stride}, expected 0 or at least the {row} bytes of a block's pieces"
            )
        shape = (piece_bytes, block_count, blocks_per_slot, image_stride or row)
        return cls(tuple(addrs), tuple(strides), *shape)

    @property
    def image_bytes(self) -> int:
        """Bytes from the first to the last of one slot's image."""
        return (self.blocks_per_slot - 1) * self.image_stride + len(self.segment_addrs) * self.piece_bytes

    def pieces(self, block_ids: _Array) -> Iterator[tuple[int, int]]:
        """Address of each piece of one image, and where in the image it lies."""
        for place, block in enumerate(block_ids.tolist()):
            for index, (addr, stride) in enumerate(zip(self.segment_addrs, self.block_strides, strict=True)):
                yield addr + block * stride, place * self.image_stride + index * self.piece_bytes


@dataclass(frozen=True)
class _Pool:
    """Where slots lie, and where in a slot this shard's image begins."""

    base: int
    stride: int
    count: int
    shard_offset: int

    def image_addr(self, slot: int) -> int:
        """Address of the image in a slot."""
        return self.base + slot * self.stride + self.shard_offset


def _checked_ids(paging: _Paging, pool: _Pool, blocks: Any, slots: Any) -> tuple[_Array, _Array]:
    block_ids, slot_ids = _ids(blocks, "blocks"), _ids(slots, "slots")
    _expect_length("blocks", len(block_ids), len(slot_ids) * paging.blocks_per_slot)
    if pool.shard_offset < 0 or pool.shard_offset + paging.image_bytes > pool.stride:
        raise ValueError(
            f"an image of {paging.image_bytes} bytes at shard_offset {pool.shard_offset} "
            f"does not lie in a slot of {pool.stride} bytes"
        )
    _expect_ids("blocks", block_ids, paging.block_count)
    _expect_ids("slots", slot_ids, pool.count)
    return block_ids, slot_ids


def _expect_ids(name: str, ids: _Array, count: int) -> None:
    wrong = (ids < 0) | (ids >= count)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise IndexError(f"{name}[{at}] is {ids[at]}, expected 0 <= id < {count}")


def _gather_slot(paging: _Paging, pool: _Pool, block_ids: _Array, slot_ids: _Array, i: int) -> None:
    k, size = paging.blocks_per_slot, paging.piece_bytes
    image = pool.image_addr(int(slot_ids[i]))
    for addr, at in paging.pieces(block_ids[i * k : (i + 1) * k]):
        ctypes.memmove(image + at, addr, size)


def _scatter_slot(paging: _Paging, pool: _Pool, block_ids: _Array, slot_ids: _Array, i: int) -> None:
    k, size = paging.blocks_per_slot, paging.piece_bytes
    image = pool.image_addr(int(slot_ids[i]))
    for addr, at in paging.pieces(block_ids[i * k : (i + 1) * k]):
        ctypes.memmove(addr, image + at, size)


def _clear_blocks(paging: _Paging, block_ids: _Array, i: int) -> None:
    k = paging.blocks_per_slot
    for addr, _ in paging.pieces(block_ids[i * k : (i + 1) * k]):
        ctypes.memset(addr, 0, paging.piece_bytes)


def _image_crc(paging: _Paging, pool: _Pool, slot: int, key: _Array) -> int:
    return crc_update(crc_update(0, key), _memory(pool.image_addr(slot), paging.image_bytes))


def _memory(addr: int, length: int) -> _Array:
    memory = (ctypes.c_uint8 * length).from_address(addr)
    return np.frombuffer(memoryview(memory).cast("B"), dtype=np.uint8)


def _array(buffer: Any, name: str, dtypes: Sequence[np.dtype[Any]], *, writable: bool = False) -> _Array:
    """A numpy view of a one-dimensional contiguous buffer of one of these dtypes."""
    array = np.asarray(memoryview(buffer))
    if array.dtype not in dtypes or array.ndim != 1 or not array.flags.c_contiguous:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be a contiguous 1-D buffer of {wanted}")
    if writable and not array.flags.writeable:
        raise TypeError(f"{name} must be writable")
    return array


def _ids(buffer: Any, name: str) -> _Array:
    return _array(buffer, name, _INTEGERS).astype(np.int64)


def _keys(keys: Any, count: int) -> _Array:
    view = memoryview(keys)
    if not view.c_contiguous:
        raise TypeError("keys must be C-contiguous")
    _expect_length("keys", view.nbytes, KEY_BYTES * count)
    return np.frombuffer(view.cast("B"), dtype=np.uint8).reshape(count, KEY_BYTES)


_MATCH = struct.Struct("<IHHQIIB")
"""A header of 16 bytes, and a payload."""


def ask_match(fd: int, memory: Buffer, keys: Buffer, kind: int, number: int, timeout_s: float, /) -> int:
    """See ``_native.pyi``."""
    with memoryview(memory) as room, memoryview(keys) as given:  # an error below must not keep hold of them
        if len(given) > len(room):
            raise ValueError(f"{len(given)} bytes of keys do not go into {len(room)}")
        room[: len(given)] = given
        size = len(given)
    os.write(fd, _MATCH.pack(_MATCH.size - 16, kind, 0, number, size, 0, 0))
    return -1


def answer_match(index: object, fd: int, kind: int, memory: Buffer, /) -> bool:
    """See ``_native.pyi``."""
    return False


def _is_buffer(tokens: Any) -> bool:
    try:
        memoryview(tokens)
    except TypeError:
        return False
    return True


def _expect_length(name: str, length: int, expected: int) -> None:
    if length != expected:
        raise ValueError(f"{name} has length {length}, expected {expected}")


def _token(token: Any) -> int:
    value = operator.index(token)
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"token {value} is out of int32's range")
    return value


def _as_int32_bytes(ids: _Array) -> bytes:
    narrow = ids.astype("<i4")
    if ids.dtype != narrow.dtype and not np.array_equal(narrow, ids):
        at = int(np.argmax(narrow != ids))
        raise ValueError(f"token {ids[at]} is out of int32's range")
    return narrow.tobytes()
