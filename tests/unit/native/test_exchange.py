"""A lookup through a socket: what each side's one call does, and what it leaves to its caller."""

from __future__ import annotations

import contextlib
import socket as sockets
import threading
import time
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from flexkv_core import native
from flexkv_core.cache.radix_tree import PyRunIndex, RunIndex
from flexkv_core.native import twin
from flexkv_core.serve.wire import Kind, frame, pack_asked, pack_count
from flexkv_core.tasks import Purpose
from flexkv_core.types import KEY_BYTES, Tier

KEYS = bytes(range(4 * KEY_BYTES))
Pair = tuple[sockets.socket, sockets.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    mine, theirs = sockets.socketpair()
    with mine, theirs:
        mine.setblocking(False)
        theirs.setblocking(False)
        yield mine, theirs


@pytest.fixture(scope="module")
def index() -> PyRunIndex:
    """Has three of the four keys, the second and third below the first."""
    if RunIndex is PyRunIndex:
        pytest.skip("the C extension is not built")
    index = RunIndex()
    above = index.insert(-1, KEYS[:KEY_BYTES], Tier.HOST, np.zeros(1, np.int32))
    index.publish(above)
    index.publish(index.insert(above, KEYS[KEY_BYTES : 3 * KEY_BYTES], Tier.HOST, np.ones(2, np.int32)))
    return index


def question(size: int, number: int = 7) -> bytes:
    return frame(Kind.MATCH, number, pack_asked(size, 0, Purpose.GET))


def fill(connected: sockets.socket) -> None:
    """Send until nothing more goes."""
    with contextlib.suppress(BlockingIOError):
        while True:
            connected.send(bytes(4096))


@pytest.mark.parametrize("blocks", range(5))
def test_question_is_answered_as_match_answers(index: PyRunIndex, pair: Pair, blocks: int) -> None:
    mine, theirs = pair
    size = KEY_BYTES * blocks
    mine.send(question(size))
    assert native.answer_match(index, theirs.fileno(), Kind.MATCH, KEYS)
    found = index.match(KEYS[:size], 0, None, Tier.HOST, False)[0]
    assert mine.recv(4096) == frame(Kind.MATCH, 7, pack_count(found))
    assert found == min(blocks, 3)


LEFT_TO_THE_CALLER = {
    "part of a question": question(32)[:-1],
    "two questions": question(32) + question(32, 8),
    "more than there can be": question(len(KEYS) + KEY_BYTES),
    "not whole keys": question(KEY_BYTES + 1),
    "another kind": frame(Kind.GET, 7, pack_asked(32, 0, Purpose.GET)),
    "no kind": b"\xff" * len(question(32)),
    "a longer payload": frame(Kind.MATCH, 7, pack_asked(32, 0, Purpose.GET) + b"\0"),
}


@pytest.mark.parametrize("words", LEFT_TO_THE_CALLER.values(), ids=LEFT_TO_THE_CALLER.keys())
def test_what_else_comes_is_left_to_the_caller(index: PyRunIndex, pair: Pair, words: bytes) -> None:
    mine, theirs = pair
    mine.send(words)
    for answering in (native.answer_match, twin.answer_match):
        assert not answering(index, theirs.fileno(), Kind.MATCH, KEYS)
    assert theirs.recv(4096) == words
    with pytest.raises(BlockingIOError):
        mine.recv(1)


def test_question_of_who_does_not_read_is_left_to_the_caller(index: PyRunIndex, pair: Pair) -> None:
    mine, theirs = pair
    fill(theirs)
    mine.send(question(32))
    assert not native.answer_match(index, theirs.fileno(), Kind.MATCH, KEYS)
    assert theirs.recv(4096) == question(32)


def test_answering_nothing_and_nobody(index: PyRunIndex, pair: Pair) -> None:
    mine, theirs = pair
    assert not native.answer_match(index, theirs.fileno(), Kind.MATCH, KEYS)
    mine.close()
    assert not native.answer_match(index, theirs.fileno(), Kind.MATCH, KEYS)
    assert theirs.recv(1) == b""


def test_what_is_no_index(pair: Pair) -> None:
    mine, theirs = pair
    mine.send(question(32))
    with pytest.raises(TypeError):
        native.answer_match(object(), theirs.fileno(), Kind.MATCH, KEYS)
    assert theirs.recv(4096) == question(32)


def replies(theirs: sockets.socket, words: bytes) -> threading.Thread:
    """Waits for a question of two keys, and says that a moment later."""

    def reply() -> None:
        theirs.settimeout(10)
        assert theirs.recv(4096) == question(32)
        time.sleep(0.05)  # the other side waits by then
        theirs.send(words)

    thread = threading.Thread(target=reply)
    thread.start()
    return thread


def test_asking(native_module: ModuleType, pair: Pair) -> None:
    mine, theirs = pair
    thread = replies(theirs, frame(Kind.MATCH, 7, pack_count(2)) + b"and more")
    memory = bytearray(100)
    assert native_module.ask_match(mine.fileno(), memory, KEYS[:32], Kind.MATCH, 7, 10.0) == 2
    thread.join()
    assert memory == KEYS[:32] + bytes(68)
    assert mine.recv(4096) == b"and more"


OTHER_ANSWERS = {
    "another number": frame(Kind.MATCH, 8, pack_count(2)),
    "another kind": frame(Kind.GET, 7, pack_count(2)),
    "another length": frame(Kind.MATCH, 7, bytes(9)),
    "half of it": frame(Kind.MATCH, 7, pack_count(2))[:-1],
    "too many": frame(Kind.MATCH, 7, pack_count(1 << 63)),
    "an error": frame(Kind.ERROR, 0, b"no"),
}


@pytest.mark.parametrize("words", OTHER_ANSWERS.values(), ids=OTHER_ANSWERS.keys())
def test_other_answers_are_left_to_the_caller(implementation: ModuleType, pair: Pair, words: bytes) -> None:
    mine, theirs = pair
    thread = replies(theirs, words)
    assert implementation.ask_match(mine.fileno(), bytearray(100), KEYS[:32], Kind.MATCH, 7, 10.0) == -1
    thread.join()
    assert mine.recv(4096) == words


def test_asking_in_vain(implementation: ModuleType, pair: Pair) -> None:
    mine, theirs = pair
    arguments = (mine.fileno(), bytearray(100), KEYS, Kind.MATCH, 7)
    assert implementation.ask_match(*arguments, 0.02) == -1
    fill(mine)
    with pytest.raises(BlockingIOError):
        implementation.ask_match(*arguments, 10.0)
    theirs.close()
    with pytest.raises(ConnectionError):
        implementation.ask_match(*arguments, 10.0)


def test_asking_waits_as_long_as_told(native_module: ModuleType, pair: Pair) -> None:
    for timeout_s in (0.0, 0.02):
        begin = time.monotonic()
        assert native_module.ask_match(pair[0].fileno(), bytearray(100), b"", Kind.MATCH, 7, timeout_s) == -1
        assert time.monotonic() - begin >= timeout_s


def test_asking_about_too_many_keys(implementation: ModuleType, pair: Pair) -> None:
    mine, theirs = pair
    with pytest.raises(ValueError, match="do not go into"):
        implementation.ask_match(mine.fileno(), bytearray(len(KEYS) - 1), KEYS, Kind.MATCH, 7, 1.0)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
