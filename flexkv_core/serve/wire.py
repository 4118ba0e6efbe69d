"""Messages between a server and its clients: a fixed header, a bounded payload, numbers in little-endian. Nothing on it is ever executed.

::

    frame = [u32 bytes of the payload] [u16 kind] [u16 reserved, 0] [u64 number] payload

``number`` is the request's in a request and its answer, the task's in what concerns a task. Keys do not travel: a request says how many bytes of
them lie in the memory for keys, see ``arena.py``. The first frame of a connection is HELLO or STATUS, with a payload of JSON.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import FlexKVError
from flexkv_core.tasks import KVResponseStatus, Mismatch, Purpose, TaskDone
from flexkv_core.transfer.plan import OpResult, OpStatus
from flexkv_core.types import Slots, Tier

VERSION = 1
HEADER = struct.Struct("<IHHQ")
GREETING_BYTES_MAX = 64 << 10
"""Payload of the first frame: an engine's identity is a few hundred bytes."""
PAYLOAD_BYTES_MAX = 4 << 20
"""Payload of any other frame: the slots of a plan of a million blocks."""


SLOTS_MAX = 1 << 31
"""A slot's number is an int32."""


class Kind(IntEnum):
    """What a frame is. Requests are answered with a frame of the same kind and number, or with ERROR."""

    ERROR = 0  # text; the connection ends
    HELLO = 1
    STATUS = 2
    MATCH = 3
    GET = 4
    PREFETCH = 5
    PUT = 6
    RESET = 7
    FETCH = 8
    LAUNCH = 9  # from here on without an answer
    CANCEL = 10
    RESULT = 11
    DONE = 12  # server to client, as is what follows
    FETCHED = 13
    USAGE = 14


class WireError(FlexKVError, RuntimeError):
    """What came is no frame, or not one that may come now; the connection is of no use any more."""


_MATCHED = struct.Struct("<Q")
_PLANNED = struct.Struct("<QIII")
_ASKED = struct.Struct("<IIB")
_RESULT = struct.Struct("<BBId")
_DONE = struct.Struct("<BII")
_MISMATCH = struct.Struct("<IB16s")
_USAGE = struct.Struct("<QQ")

_Value = TypeVar("_Value")
_KINDS = tuple(Kind)  # 0, 1, 2 …
_PURPOSES = tuple(Purpose)
_OP_STATUSES = tuple(OpStatus)
_TASK_STATUSES = tuple(KVResponseStatus)


def frame(kind: Kind, number: int, *parts: bytes) -> bytes:
    """One frame, to be sent."""
    payload = b"".join(parts)
    return HEADER.pack(len(payload), kind, 0, number) + payload


class FrameReader:
    """Cuts a stream into frames. Not thread-safe. A payload is valid until the next call of :meth:`space`."""

    def __init__(self, payload_bytes_max: int) -> None:
        self.payload_bytes_max = payload_bytes_max
        self._buffer = memoryview(bytearray(256 << 10))
        self._start = self._stop = 0

    def space(self) -> memoryview:
        """Where the next bytes go; tell :meth:`received` how many came."""
        used = self._stop - self._start
        if not used:
            self._start = self._stop = 0
            return self._buffer
        wanted = max(used + 1, HEADER.size + self._header()[0] if used >= HEADER.size else 0)
        if wanted > len(self._buffer):
            # A new one: somebody may still look into the old one.
            grown = memoryview(bytearray(max(wanted, 2 * len(self._buffer))))
            grown[:used] = self._buffer[self._start : self._stop]
            self._buffer = grown
        elif self._start:
            self._buffer[:used] = self._buffer[self._start : self._stop]
        self._start, self._stop = 0, used
        return self._buffer[used:]

    @property
    def is_empty(self) -> bool:
        """Whether nothing has come of the next frame."""
        return self._start == self._stop

    def received(self, count: int) -> None:
        """``count`` bytes of :meth:`space` were filled."""
        self._stop += count

    def next(self) -> tuple[Kind, int, memoryview] | None:
        """Kind, number and payload of the next frame; None until all of it is there.

        Raises:
            WireError: an unknown kind, or a payload that is too long.
        """
        start = self._start + HEADER.size
        if self._stop < start:
            return None
        length, kind, number = self._header()
        if self._stop < start + length:
            return None
        self._start = start + length
        return kind, number, self._buffer[start : self._start]

    def frames(self) -> Iterator[tuple[Kind, int, memoryview]]:
        """All that :meth:`next` has."""
        while (one := self.next()) is not None:
            yield one

    def _header(self) -> tuple[int, Kind, int]:
        """Bytes of the payload, kind and number of the frame that begins."""
        length, kind, reserved, number = HEADER.unpack_from(self._buffer, self._start)
        if length > self.payload_bytes_max:
            raise WireError(f"a frame of {length} bytes; at most {self.payload_bytes_max} are allowed")
        if kind >= len(_KINDS) or reserved:
            raise WireError(f"kind {kind} with {reserved} is no frame")
        return length, _KINDS[kind], number


@dataclass(frozen=True)
class Planned:
    """The answer to GET, PREFETCH and PUT: the task; its first block; its host slots; indices of those that a lower tier fills first."""

    task_id: int
    start_block: int
    slots: Slots
    reads: Slots

    def pack(self) -> tuple[bytes, bytes, bytes]:
        """Parts of a payload."""
        head = _PLANNED.pack(self.task_id, self.start_block, len(self.slots), len(self.reads))
        return head, self.slots.tobytes(), self.reads.tobytes()

    @classmethod
    def unpack(cls, payload: memoryview, blocks_max: int = SLOTS_MAX, slots_max: int = SLOTS_MAX) -> Planned:
        """The other way; WireError if it is something else, not for at most ``blocks_max`` blocks, or names a slot beyond ``slots_max``
        or a read of no block of it."""
        task_id, start, count, reads = _unpack(_PLANNED, payload)
        if (
            len(payload) != _PLANNED.size + 4 * (count + reads)
            or max(start + count if count else 0, reads) > blocks_max
        ):
            raise WireError(f"an answer of {len(payload)} bytes with {count} slots and {reads} reads")
        numbers = np.frombuffer(payload[_PLANNED.size :], "<i4").astype(np.int32)
        planned = cls(task_id, start, numbers[:count], numbers[count:])
        # A prefetch names no slots, and its reads only say how many they are.
        if not _are_below(planned.slots, slots_max) or not _are_below(planned.reads, count or blocks_max):
            raise WireError("an answer that names slots or blocks which are not there")
        return planned


def pack_count(blocks: int) -> bytes:
    """The answer to MATCH, RESET and FETCH."""
    return _MATCHED.pack(blocks)


def unpack_count(payload: memoryview) -> int:
    """The other way; WireError if it is something else."""
    return int(_unpack(_MATCHED, payload)[0])


def pack_asked(keys_bytes: int, start_block: int, purpose: Purpose) -> bytes:
    """The payload of a request about keys. Of MATCH only the bytes of keys count, of PUT the first block too, before which the client has
    none; FETCH has a number of the client's in the place of the first block, which FETCHED repeats."""
    return _ASKED.pack(keys_bytes, start_block, _PURPOSES.index(purpose))


def unpack_size(payload: memoryview) -> int:
    """What MATCH needs of :func:`unpack_asked`: the bytes of keys."""
    return _unpack(_ASKED, payload)[0]


def unpack_asked(payload: memoryview) -> tuple[int, int, Purpose]:
    """The other way; WireError if it is something else."""
    size, start, purpose = _unpack(_ASKED, payload)
    return size, start, _pick(_PURPOSES, purpose)


def pack_result(result: OpResult) -> tuple[bytes, bytes, bytes]:
    """Parts of a RESULT's payload; the frame's number is the task's."""
    wrong = b"" if result.wrong is None else result.wrong.tobytes()
    head = _RESULT.pack(
        _OP_STATUSES.index(result.status), result.wrong is not None, len(result.ok), result.seconds
    )
    return head, result.ok.tobytes(), wrong


def unpack_result(task_id: int, payload: memoryview) -> OpResult:
    """The other way; WireError if it is something else."""
    status, has_wrong, count, seconds = _unpack(_RESULT, payload)
    if len(payload) != _RESULT.size + count * (2 if has_wrong else 1):
        raise WireError(f"a result of {len(payload)} bytes for {count} blocks")
    flags = _flags(payload[_RESULT.size :])
    wrong = flags[count:] if has_wrong else None
    return OpResult(task_id, _pick(_OP_STATUSES, status), flags[:count], seconds, wrong)


def pack_done(done: TaskDone) -> tuple[bytes, ...]:
    """Parts of a DONE's payload; the frame's number is the task's."""
    head = _DONE.pack(_TASK_STATUSES.index(done.status), len(done.ok), len(done.mismatches))
    found = (_MISMATCH.pack(found.block, found.tier, found.key) for found in done.mismatches)
    return head, done.ok.tobytes(), b"".join(found)


def unpack_done(task_id: int, payload: memoryview) -> TaskDone:
    """The other way; WireError if it is something else."""
    status, count, found = _unpack(_DONE, payload)
    if len(payload) != _DONE.size + count + _MISMATCH.size * found:
        raise WireError(f"the end of a task in {len(payload)} bytes for {count} blocks")
    ok = _flags(payload[_DONE.size : _DONE.size + count])
    mismatches = tuple(
        Mismatch(block, _pick(tuple(Tier), tier), key)
        for block, tier, key in _MISMATCH.iter_unpack(payload[_DONE.size + count :])
    )
    return TaskDone(task_id, _pick(_TASK_STATUSES, status), ok, mismatches)


def pack_usage(used: int, total: int) -> bytes:
    """The payload of USAGE: slots of the host tier."""
    return _USAGE.pack(used, total)


def unpack_usage(payload: memoryview) -> tuple[int, int]:
    """The other way; WireError if it is something else."""
    used, total = _unpack(_USAGE, payload)
    return used, total


def _unpack(layout: struct.Struct, payload: memoryview) -> tuple[int, ...]:
    if len(payload) < layout.size:
        raise WireError(f"a payload of {len(payload)} bytes; at least {layout.size} are needed")
    return layout.unpack_from(payload)


def _pick(values: tuple[_Value, ...], index: int) -> _Value:
    if index >= len(values):
        raise WireError(f"found {index}; expected less than {len(values)}")
    return values[index]


def _are_below(numbers: Slots, bound: int) -> bool:
    """Whether all are indices of something of this length."""
    return not len(numbers) or (int(numbers.min()) >= 0 and int(numbers.max()) < bound)


def _flags(raw: memoryview) -> npt.NDArray[np.bool_]:
    flags: npt.NDArray[np.bool_] = np.frombuffer(raw, np.uint8) != 0
    return flags
