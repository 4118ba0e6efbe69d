"""How a value that is read comes to its place: its checksums, and the answer of a Valkey server however a network cuts it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from valkey.exceptions import ConnectionError as LostError
from valkey.exceptions import ResponseError, ValkeyError
from valkey.exceptions import TimeoutError as LateError

from flexkv_core import native
from flexkv_core.layout import KVLayout
from flexkv_core.storage.base import BlockStatus
from flexkv_core.storage.memory import HostSegment
from flexkv_core.storage.remote.base import Value
from flexkv_core.storage.remote.valkey_wire import read_in_place
from flexkv_core.storage.remote.values import ValueBuffers, split_into

SHARDS, SHARD_BYTES = 3, 1000
LAYOUT = KVLayout(16, 16, SHARD_BYTES, SHARDS)
KEYS = np.array([[5, 6], [7, 8]], np.uint64)
SLOTS = np.array([3, 1], np.int32)


@pytest.fixture(scope="module")
def host() -> Iterator[HostSegment]:
    segment = HostSegment.create(4, LAYOUT)
    yield segment
    segment.close()


def written(host: HostSegment) -> list[bytes]:
    """Two whole values, from slots 0 and 2."""
    slots = np.array([0, 2], np.int32)
    buffers = ValueBuffers(host, 2)
    values = buffers.values(slots)
    for value, key, slot in zip(values, KEYS, slots, strict=True):
        value.payload[:] = np.random.default_rng(int(slot)).integers(0, 256, len(value.payload))
        for shard in range(SHARDS):
            part = value.payload[shard * SHARD_BYTES : (shard + 1) * SHARD_BYTES]
            host.checksums[slot, shard] = native.crc32c(part, native.crc32c(key.tobytes()))
    buffers.fill(KEYS, slots, 0)
    return [value.header.tobytes() + value.payload.tobytes() for value in values]


@given(st.lists(st.integers(1, SHARDS * SHARD_BYTES), max_size=12), st.integers(0, SHARDS * SHARD_BYTES - 1))
def test_checksums_do_not_depend_on_the_pieces(host: HostSegment, cuts: list[int], wrong: int) -> None:
    buffers, values = ValueBuffers(host, 2), written(host)
    places = buffers.places(KEYS, SLOTS)
    for place, data in zip(places, values, strict=True):
        place.header[:] = np.frombuffer(data[: len(place.header)], np.uint8)
        place.payload[:] = np.frombuffer(data[len(place.header) :], np.uint8)
    places[1].payload[wrong] ^= 1
    at = 0
    for stop in sorted({*cuts, SHARDS * SHARD_BYTES}):
        for place in places:
            place.arrived(stop - at)
        at = stop
    found = buffers.verify(KEYS, SLOTS, 0, np.zeros(2, np.uint32))
    assert found.tolist() == [BlockStatus.OK, BlockStatus.CORRUPT]


@pytest.mark.parametrize("told", [0, 1500], ids=["untold", "half told"])
def test_what_was_not_told_of_is_checked_all_the_same(host: HostSegment, told: int) -> None:
    buffers, values = ValueBuffers(host, 2), written(host)
    places = buffers.places(KEYS, SLOTS)
    for place, data in zip(places, values, strict=True):
        assert split_into(data, Value(*place[:2])) is BlockStatus.OK
        place.arrived(told)
    places[0].payload[-1] ^= 1
    found = buffers.verify(KEYS, SLOTS, 0, np.zeros(2, np.uint32))
    assert found.tolist() == [BlockStatus.CORRUPT, BlockStatus.OK]


def test_what_a_library_hands_out_is_checked_as_it_is_copied(host: HostSegment) -> None:
    buffers, values = ValueBuffers(host, 2), written(host)
    places = buffers.places(KEYS, SLOTS)
    flipped = bytearray(values[1])
    flipped[-SHARD_BYTES - 1] ^= 1
    assert split_into(values[0], places[0]) is BlockStatus.OK
    assert split_into(bytes(flipped), places[1]) is BlockStatus.OK
    assert split_into(values[0] + b"x", places[0]) is BlockStatus.CORRUPT
    assert places[0].header.tobytes() + places[0].payload.tobytes() == values[0]
    found = buffers.verify(KEYS, SLOTS, 0, np.zeros(2, np.uint32))
    assert found.tolist() == [BlockStatus.OK, BlockStatus.CORRUPT]


class Connection:
    """What is used of valkey-py's: a pool of one connection, whose other end is ``server``."""

    def __init__(self) -> None:
        self._sock, self.server = socket.socketpair()
        self._sock.settimeout(5)
        self.commands: list[tuple[object, ...]] = []
        self.is_connected, self.is_lent = True, False

    def get_connection(self, command: str) -> Connection:
        self.is_lent = True
        return self

    def send_command(self, *words: object) -> None:
        self.commands.append(words)

    def disconnect(self) -> None:
        self.is_connected = False
        self._sock.close()

    def release(self, connection: Connection) -> None:
        self.is_lent = False

    def left(self) -> bytes:
        """What was not read."""
        return self._sock.recv(4096)


def place() -> Value:
    return Value(np.zeros(56, np.uint8), np.zeros(1_000, np.uint8))


def ask(
    answer: bytes, cut: int, deadline_s: float = 5.0
) -> tuple[BlockStatus | ValkeyError, Value, Connection]:
    """Read one value, whose answer comes in pieces of ``cut`` bytes; what that gave or raised."""
    connection, value = Connection(), place()

    def say() -> None:
        with contextlib.suppress(OSError):  # it was not read to its end
            for at in range(0, len(answer), cut):
                connection.server.sendall(answer[at : at + cut])
                time.sleep(0.0002 if cut < 10 else 0)
            if deadline_s > 1:
                connection.server.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=say)
    thread.start()
    outcome: BlockStatus | ValkeyError
    try:
        outcome = read_in_place(connection, "name", value, time.monotonic() + deadline_s)
    except ValkeyError as error:
        outcome = error
    thread.join()
    assert not connection.is_lent
    return outcome, value, connection


BODY = bytes(range(256)) * 4 + bytes(32)


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_an_answer_in_pieces(cut: int) -> None:
    status, value, connection = ask(b"$1056\r\n" + BODY + b"\r\n", cut)
    assert status is BlockStatus.OK
    assert value.header.tobytes() + value.payload.tobytes() == BODY
    assert connection.commands == [("GETRANGE", "name", 0, 1056)]
    assert connection.is_connected
    assert connection.left() == b"", "the next answer begins where this one ends"


@pytest.mark.parametrize("cut", [1, 3, 1 << 20])
def test_nothing_there(cut: int) -> None:
    status, _, connection = ask(b"$0\r\n\r\n", cut)
    assert status is BlockStatus.DROPPED
    assert connection.is_connected
    assert connection.left() == b""


@pytest.mark.parametrize("length", [1, 44, 1055, 1057])
@pytest.mark.parametrize("cut", [1, 1 << 20])
def test_another_length_ends_the_connection(length: int, cut: int) -> None:
    status, _, connection = ask(b"$%d\r\n" % length + bytes(length) + b"\r\n", cut)
    assert status is BlockStatus.CORRUPT
    assert not connection.is_connected


BAD = {
    "an error": (b"-LOADING the data\r\n", ResponseError),
    "half an answer": (b"$1056\r\n" + BODY[:-1], LostError),
    "half a line": (b"$10", LostError),
    "nothing": (b"", LostError),
    "another end": (b"$1056\r\n" + BODY + b"xx", LostError),
    "an empty value without its end": (b"$0\r\nxx", LostError),
}


@pytest.mark.parametrize(("answer", "error"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("cut", [1, 1 << 20])
def test_bad_answers_end_the_connection(answer: bytes, error: type[Exception], cut: int) -> None:
    outcome, _, connection = ask(answer, cut)
    assert isinstance(outcome, error)
    assert not connection.is_connected


def test_an_answer_that_drips_is_given_up() -> None:
    outcome, _, connection = ask(b"$1056\r\n" + BODY, 1, deadline_s=0.05)
    assert isinstance(outcome, LateError)
    assert not connection.is_connected
