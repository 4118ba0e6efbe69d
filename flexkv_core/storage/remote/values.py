"""What is kept under a name: a header, and the bytes of one slot without its padding.

The header repeats what the name says and more: format, sizes, key, epoch, and a CRC32C a shard, seeded with the key as in host memory. A
value that is not what its name promises is never given out, whoever wrote it::

    value = [magic "FKVB"] [format u16] [shards u16] [payload bytes u64] [epoch u64] [key 16] [CRC32C u32 a shard] [payload]

All numbers are little-endian. The format's number is a part of the prefix too, so that values of another are not even found.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flexkv_core import native
from flexkv_core.layout import KVLayout
from flexkv_core.storage.base import BlockStatus, Statuses
from flexkv_core.storage.checksum import slot_checksums
from flexkv_core.storage.memory import HostSegment
from flexkv_core.storage.remote.base import Bytes, Value
from flexkv_core.types import Slots

_NO_STRIDE = np.zeros(1, np.int64)
_FIRST = np.zeros(1, np.int64)

FORMAT = 1
MAGIC = b"FKVB"
PIECE_BYTES = 256 << 10
"""What is brought to its place before its checksum is taken: it is in the second-level cache then."""


def deployment_prefix(root: bytes) -> str:
    """Where the values lie of all who may share: ``root`` is the fingerprint of what must agree."""
    return f"flexkv/v{FORMAT}/{root.hex()}"


def names_of(prefix: str, keys: npt.NDArray[np.uint64], epoch: int) -> list[str]:
    """The values' names. ``keys``: uint64 [n, 2]. ``epoch``: 0, or the number of a cache that was reset and shares no more."""
    where = f"{prefix}-{epoch:016x}" if epoch else prefix
    text, count = np.ascontiguousarray(keys).tobytes().hex(), len(keys)
    return [f"{where}/{text[32 * i : 32 * i + 32]}" for i in range(count)]


def header_dtype(shard_count: int) -> np.dtype[np.void]:
    """Of the header."""
    return np.dtype(
        [
            ("magic", "S4"),
            ("format", "<u2"),
            ("shards", "<u2"),
            ("payload_bytes", "<u8"),
            ("epoch", "<u8"),
            ("key", "<u8", (2,)),
            ("checksums", "<u4", (shard_count,)),
        ]
    )


class ValueBuffers:
    """Memory for the headers of one batch at a time, and views of the host tier's slots. One thread uses it.

    ``headers_max``: blocks of a batch at most.
    """

    def __init__(self, host: HostSegment, headers_max: int) -> None:
        self._host = host
        self._layout = host.layout
        self._headers = np.zeros(headers_max, header_dtype(host.layout.shard_count))
        self._header_bytes = self._headers.view(np.uint8).reshape(headers_max, -1)
        self._slots = slot_bytes_of(host)
        self._arrivals: list[_Arrival] = []
        self._checksums = np.zeros((headers_max, host.layout.shard_count), np.uint32)

    @property
    def region(self) -> Bytes:
        """The memory of all headers."""
        return self._header_bytes.reshape(-1)

    def values(self, host_slots: Slots) -> list[Value]:
        """Where the values of a batch lie that is written; headers in the batch's order."""
        payload = payload_bytes(self._layout)
        return [
            Value(self._header_bytes[row], self._slots[slot, :payload])
            for row, slot in enumerate(host_slots.tolist())
        ]

    def places(self, keys: npt.NDArray[np.uint64], host_slots: Slots) -> list[Value]:
        """Where the values of a batch shall lie that is read; forgets what was read before."""
        count = len(keys)
        self._headers[:count] = np.zeros(
            (), self._headers.dtype
        )  # what is not read is no header of the batch before
        values, shard_bytes = self.values(host_slots), self._layout.shard_bytes
        self._arrivals = [
            _Arrival(value.payload, key.tobytes(), shard_bytes, self._checksums[row])
            for row, (value, key) in enumerate(zip(values, keys, strict=True))
        ]
        return [Value(*value[:2], arrival) for value, arrival in zip(values, self._arrivals, strict=True)]

    def fill(self, keys: npt.NDArray[np.uint64], host_slots: Slots, epoch: int) -> None:
        """Write the headers of a batch that is about to be written: checksums as the host tier has them."""
        rows = self._headers[: len(keys)]
        rows["magic"], rows["format"] = MAGIC, FORMAT
        rows["shards"], rows["payload_bytes"] = self._layout.shard_count, payload_bytes(self._layout)
        rows["epoch"], rows["key"] = epoch, keys
        rows["checksums"] = self._host.checksums[host_slots]

    def verify(
        self, keys: npt.NDArray[np.uint64], host_slots: Slots, epoch: int, statuses: Statuses
    ) -> Statuses:
        """What was read, compared with its header and its name. Sets the host tier's checksums of what is right."""
        rows = self._headers[: len(keys)]
        same = (rows["magic"] == MAGIC) & (rows["format"] == FORMAT)
        same &= (rows["shards"] == self._layout.shard_count) & (rows["epoch"] == epoch)
        same &= (rows["payload_bytes"] == payload_bytes(self._layout)) & (rows["key"] == keys).all(axis=1)
        read = statuses == BlockStatus.OK
        candidates = np.flatnonzero(read & same)
        found = self._found(candidates, keys, host_slots)
        right = (found == rows["checksums"][candidates]).all(axis=1)
        self._host.checksums[host_slots[candidates[right]]] = found[right]
        verified: Statuses = statuses.copy()
        verified[read] = BlockStatus.CORRUPT
        verified[candidates[right]] = BlockStatus.OK
        return verified

    def _found(
        self, rows: npt.NDArray[np.intp], keys: npt.NDArray[np.uint64], host_slots: Slots
    ) -> npt.NDArray[np.uint32]:
        """Of what lies in the slots of these rows; uint32 [rows, shards]."""
        found: npt.NDArray[np.uint32] = self._checksums[rows]
        rest = np.flatnonzero([not self._arrivals[row].is_whole for row in rows])
        if len(rest):
            slots, key = host_slots[rows[rest]], keys[rows[rest]]
            found[rest] = slot_checksums(
                self._host.address, self._layout, np.ascontiguousarray(slots), np.ascontiguousarray(key)
            )
        return found


class _Arrival:
    """The checksums of one payload that is read; see :class:`~flexkv_core.storage.remote.base.Checks`.

    ``out``: uint32 [shards], seeded with ``key`` (16 bytes) as in host memory; filled when :attr:`is_whole`.
    """

    def __init__(self, payload: Bytes, key: bytes, shard_bytes: int, out: npt.NDArray[np.uint32]) -> None:
        self._payload, self._key, self._out = payload, key, out
        self._shard_bytes = shard_bytes
        self._seed = self._checksum = native.crc32c(key)
        self._at = 0

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are there."""
        return self._at == len(self._payload)

    def arrived(self, count: int) -> None:
        """See the contract."""
        stop = self._at + count
        assert stop <= len(self._payload), (stop, len(self._payload))
        while self._at < stop:
            shard = self._at // self._shard_bytes
            end = (shard + 1) * self._shard_bytes
            until = min(stop, end)
            self._checksum = native.crc32c(self._payload[self._at : until], self._checksum)
            self._at = until
            if until == end:
                self._out[shard], self._checksum = self._checksum, self._seed

    def land(self, payload: Bytes) -> None:
        """See the contract. One pass over the bytes a shard, and one wait for the GIL after it: of sixteen threads each waits long."""
        size = self._shard_bytes
        for shard in range(len(self._out)):
            native.gather_crc(
                np.array([payload.ctypes.data + shard * size]),
                _NO_STRIDE,
                size,
                _FIRST,
                1,
                self._payload.ctypes.data + shard * size,
                size,
                _FIRST,
                1,
                self._key,
                self._out[shard : shard + 1],
            )
        self._at = len(payload)


def payload_bytes(layout: KVLayout) -> int:
    """Bytes of a slot that mean something."""
    return layout.shard_bytes * layout.shard_count


def slot_bytes_of(host: HostSegment) -> npt.NDArray[np.uint8]:
    """uint8 [slots, slot_bytes]: the host tier's memory. Valid while ``host`` is open."""
    size = host.slot_count * host.layout.slot_bytes
    raw = (ctypes.c_uint8 * size).from_address(host.address)
    return np.ctypeslib.as_array(raw).reshape(host.slot_count, -1)


class Joiner:
    """Puts values together in one piece, for clients that want them so. Each thread has one piece of memory for it, used again and again:
    fresh memory would cost a page fault each 4 KiB, twice the time of the copy."""

    def __init__(self) -> None:
        self._local = threading.local()

    def joined(self, value: Value) -> memoryview:
        """Valid until the thread's next call."""
        room: bytearray | None = getattr(self._local, "room", None)
        if room is None or len(room) != value.size:
            room = self._local.room = bytearray(value.size)
        view, header = np.frombuffer(room, np.uint8), len(value.header)
        view[:header] = value.header
        view[header:] = value.payload
        return memoryview(room)


def split_into(data: memoryview | bytes, value: Value) -> BlockStatus:
    """Copy what was read to where the value lies; CORRUPT when it has another length."""
    found = np.frombuffer(data, np.uint8)
    if len(found) != value.size:
        return BlockStatus.CORRUPT
    value.header[:] = found[: len(value.header)]
    payload = found[len(value.header) :]
    if value.checks is None:
        value.payload[:] = payload
    else:
        value.checks.land(payload)
    return BlockStatus.OK


def regions_of(host: HostSegment, buffers: Sequence[ValueBuffers]) -> list[Bytes]:
    """All memory that values lie in."""
    return [slot_bytes_of(host).reshape(-1), *(buffer.region for buffer in buffers)]
