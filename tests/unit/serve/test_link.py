"""What a client does with a server that lies, drips, falls silent or dies: one error or none, within its time, and nothing is left open."""

from __future__ import annotations

import contextlib
import json
import os
import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from flexkv_core import native
from flexkv_core.block_manager import ModelConfig
from flexkv_core.cli.torture.device import LAYOUT
from flexkv_core.errors import FlexKVError
from flexkv_core.native import twin
from flexkv_core.serve.arena import ARENA_BYTES, Arena
from flexkv_core.serve.link import Link, Refused, ask_status, open_link
from flexkv_core.serve.tenants import Greeting
from flexkv_core.serve.wire import (
    HEADER,
    PAYLOAD_BYTES_MAX,
    Kind,
    Planned,
    WireError,
    frame,
    pack_count,
    pack_usage,
    unpack_count,
)

GREETING = Greeting(ModelConfig({"model": "test"}, LAYOUT), "", bytes(16), "test")
TERMS = {"slot_count": 10, "huge_pages": False, "has_remote": False}


def hello(terms: object = TERMS) -> bytes:
    body = terms if isinstance(terms, bytes) else json.dumps(terms).encode()
    return frame(Kind.HELLO, 0, body)


@contextlib.contextmanager
def peer(folder: Path, behave: Callable[[sockets.socket], None]) -> Iterator[Path]:
    """A listener that takes one connection and does what ``behave`` does with it."""
    path = folder / "serve.sock"
    with sockets.socket(sockets.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connected, _ = listener.accept()
            with connected, contextlib.suppress(OSError):
                behave(connected)

        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        thread.join(20)
        assert not thread.is_alive()


def say(words: bytes, descriptors: int = 0) -> Callable[[sockets.socket], None]:
    """Send that with so many descriptors of nothing, and close."""

    def behave(connected: sockets.socket) -> None:
        with open(os.devnull) as nothing:
            sockets.send_fds(connected, [words], [nothing.fileno()] * descriptors)
        connected.recv(65536)

    return behave


def drip(connected: sockets.socket) -> None:
    """A byte now and then, of what would be a long and proper greeting."""
    for byte in hello(b" " * 60_000):
        connected.sendall(bytes([byte]))
        time.sleep(0.05)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


GREETINGS = {
    "it closes at once": (say(b""), OSError),
    "half a header": (say(hello()[: HEADER.size // 2]), OSError),
    "half a greeting": (say(hello()[:-3], 4), OSError),
    "an error": (say(frame(Kind.ERROR, 0, b"no room")), Refused),
    "no descriptors": (say(hello()), WireError),
    "too few descriptors": (say(hello(), 3), WireError),
    "too many descriptors": (say(hello(), 5), FlexKVError),
    "another kind": (say(frame(Kind.USAGE, 0), 4), WireError),
    "no kind": (say(HEADER.pack(0, 999, 0, 0), 4), WireError),
    "too long": (say(HEADER.pack(65_537, Kind.HELLO, 0, 0), 4), WireError),
    "no JSON": (say(hello(b"{"), 4), WireError),
    "deep JSON": (say(hello(b"[" * 60_000), 4), WireError),
    "a list": (say(hello([1]), 4), WireError),
    "no slots": (say(hello({}), 4), WireError),
    "less than no slots": (say(hello({**TERMS, "slot_count": -1}), 4), WireError),
    "too many slots": (say(hello({**TERMS, "slot_count": 1 << 40}), 4), WireError),
    "slots in words": (say(hello({**TERMS, "slot_count": "ten"}), 4), WireError),
    "a segment that is none": (say(hello(), 4), FlexKVError),
    "silence": (lambda connected: connected.recv(1 << 20) and time.sleep(1.0), TimeoutError),
    "drops": (drip, TimeoutError),
}


@pytest.mark.parametrize(("behave", "error"), GREETINGS.values(), ids=GREETINGS.keys())
def test_greetings(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behave: Callable[[sockets.socket], None],
    error: type[Exception],
) -> None:
    if error is TimeoutError:
        monkeypatch.setattr("flexkv_core.serve.link.GREETING_TIMEOUT_S", 0.4)
    before = open_files()
    begin = time.monotonic()
    with peer(tmp_path, behave) as path, pytest.raises(error):
        open_link(path, GREETING, lambda *_: None, lambda _: None)
    assert time.monotonic() - begin < 10
    assert open_files() == before


STATUSES = {
    "it closes at once": (say(b""), OSError),
    "an error": (say(frame(Kind.ERROR, 1, b"no")), Refused),
    "no JSON": (say(frame(Kind.STATUS, 1, b"{")), WireError),
    "a number": (say(frame(Kind.STATUS, 1, b"7")), WireError),
    "too long": (say(HEADER.pack(PAYLOAD_BYTES_MAX + 1, Kind.STATUS, 0, 1)), WireError),
    "drops": (drip, TimeoutError),
}


@pytest.mark.parametrize(("behave", "error"), STATUSES.values(), ids=STATUSES.keys())
def test_statuses(tmp_path: Path, behave: Callable[[sockets.socket], None], error: type[Exception]) -> None:
    with peer(tmp_path, behave) as path, pytest.raises(error):
        ask_status(path, 0.4 if error is TimeoutError else 10.0)


class Ends:
    """A link, and the server's ends of its two sockets. ``heard`` are the events that came; a USAGE of (0, 0) is one too many."""

    def __init__(self) -> None:
        mine, self.calls = sockets.socketpair()
        events, self.events = sockets.socketpair()
        self.calls.settimeout(10)
        self.heard: list[Kind] = []
        self.broken = threading.Event()
        host: object = None  # nothing is copied here
        self.link = Link(mine, events, Arena.create(), host, False, self._hear, lambda _: self.broken.set())  # type: ignore[arg-type]

    def _hear(self, link: Link, kind: Kind, number: int, payload: memoryview) -> None:
        self.heard.append(kind)
        if payload.tobytes() == pack_usage(0, 0):
            raise ZeroDivisionError("a fault in the client")

    def ask(self, answer: bytes, deadline_s: float = 0.3) -> int | None:
        """One lookup of two keys, which is answered with these bytes."""
        self.calls.sendall(answer)
        return self.link.match(bytes(32), deadline_s)

    def ask_slowly(self, answer: bytes) -> int | None:
        """The same, answered after a moment: not before it was asked."""
        timer = threading.Timer(0.1, self.calls.sendall, [answer])
        timer.start()
        found = self.link.match(bytes(32), 10.0)
        timer.join()
        return found

    def close(self) -> None:
        self.link.close()
        self.calls.close()
        self.events.close()


@pytest.fixture(params=["native", "twin"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setattr(
        "flexkv_core.serve.link.ask_match", native.ask_match if request.param == "native" else twin.ask_match
    )
    made = Ends()
    yield made
    made.close()


def match(number: int, blocks: int = 2) -> bytes:
    return frame(Kind.MATCH, number, pack_count(blocks))


BAD_ANSWERS = {
    "another number": match(2),
    "another kind": frame(Kind.RESET, 1, pack_count(2)),
    "a kind that is none": HEADER.pack(0, 99, 0, 1),
    "too long": HEADER.pack(PAYLOAD_BYTES_MAX + 1, Kind.MATCH, 0, 1),
    "too short": frame(Kind.MATCH, 1, b"\0"),
    "an error": frame(Kind.ERROR, 0, b"\xff no"),
}


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys())
def test_bad_answers_break_the_link(ends: Ends, answer: bytes) -> None:
    assert ends.ask(answer) is None
    assert ends.link.is_broken
    assert ends.broken.is_set()
    assert ends.link.match(bytes(32), 5.0) is None


def test_an_answer_in_pieces_and_a_late_one(ends: Ends) -> None:
    assert ends.ask(match(1)[:5]) is None  # half of it: too late
    begin = time.monotonic()
    assert ends.link.match(bytes(32), 5.0) is None  # nobody waits a second time
    assert time.monotonic() - begin < 1
    ends.calls.sendall(match(1)[5:])
    assert ends.ask_slowly(match(2, 7)) == 7
    assert not ends.link.is_broken


def test_a_late_plan_is_given_back(ends: Ends) -> None:
    assert ends.link.call(Kind.GET, bytes(32), 0.1, Planned.unpack) is None
    plan = Planned(77, 0, np.arange(2, dtype=np.int32), np.empty(0, np.int32))
    ends.calls.sendall(frame(Kind.GET, 1, *plan.pack()))
    assert ends.ask_slowly(match(2)) == 2
    asked = len(frame(Kind.MATCH, 2, bytes(9)))
    sent = ends.calls.recv(4096)
    kinds = [HEADER.unpack_from(sent, at)[1::2] for at in (0, asked, asked + HEADER.size)]
    assert kinds == [(Kind.GET, 1), (Kind.CANCEL, 77), (Kind.MATCH, 2)]


def test_a_server_that_stays_silent_is_given_up(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_core.serve.link.SUSPENDED_MAX_S", 0.2)
    assert ends.link.match(b"", 0.05) is None
    time.sleep(0.3)
    assert ends.link.match(b"", 0.05) is None
    assert ends.link.is_broken


def test_a_server_that_does_not_read_is_given_up(ends: Ends) -> None:
    for _ in range(64):
        ends.link.tell(Kind.RESULT, 1, bytes(256 << 10))
    assert ends.link.is_broken


def test_a_server_that_dies_in_the_middle_of_its_answer(ends: Ends) -> None:
    ends.calls.sendall(match(1)[:-1])
    ends.calls.close()
    assert ends.link.match(bytes(32), 5.0) is None
    assert ends.link.is_broken


@pytest.mark.parametrize(
    "words",
    [HEADER.pack(0, 99, 0, 0), frame(Kind.USAGE, 0, pack_usage(0, 0))],
    ids=["garbage", "a fault"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_events_that_cannot_be_taken_in_break_the_link(ends: Ends, words: bytes) -> None:
    ends.events.sendall(frame(Kind.USAGE, 0, pack_usage(1, 2)) + words)
    assert ends.broken.wait(10)
    assert ends.heard[0] is Kind.USAGE
    assert ends.link.match(bytes(32), 5.0) is None


def test_more_keys_than_fit_in_are_cut(ends: Ends) -> None:
    ends.calls.sendall(match(1))
    assert ends.link.call(Kind.MATCH, bytes(ARENA_BYTES + 16), 0.3, unpack_count) == 2


BAD_PLANS = {
    "a slot that is not there": ([0, 10], []),
    "a slot below the first": ([-1], []),
    "a read of no block": ([0, 1], [2]),
    "a read below the first": ([0, 1], [-1]),
    "more blocks than were asked for": ([0, 1, 2, 3, 4], []),
}


@pytest.mark.parametrize(("slots", "reads"), BAD_PLANS.values(), ids=BAD_PLANS.keys())
def test_plans_that_lie_break_the_link(ends: Ends, slots: list[int], reads: list[int]) -> None:
    """The copier would write where they say."""
    plan = Planned(5, 0, np.array(slots, np.int32), np.array(reads, np.int32))
    ends.calls.sendall(frame(Kind.GET, 1, *plan.pack()))
    unpack = partial(Planned.unpack, blocks_max=4, slots_max=10)
    assert ends.link.call(Kind.GET, bytes(64), 0.3, unpack) is None
    assert ends.link.is_broken
