"""Frames come out as they went in, however a stream is cut; whatever else comes is a WireError and nothing worse."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core.serve.wire import (
    HEADER,
    FrameReader,
    Kind,
    Planned,
    WireError,
    frame,
    pack_asked,
    pack_done,
    pack_result,
    unpack_asked,
    unpack_count,
    unpack_done,
    unpack_result,
    unpack_usage,
)
from flexkv_core.tasks import KVResponseStatus, Mismatch, Purpose, TaskDone
from flexkv_core.transfer.plan import OpResult, OpStatus
from flexkv_core.types import Tier

FLAGS = st.lists(st.booleans(), max_size=40).map(lambda flags: np.array(flags, np.bool_))
FRAMES = st.lists(
    st.tuples(st.sampled_from(Kind), st.integers(0, 2**64 - 1), st.binary(max_size=700)), max_size=8
)


def read(reader: FrameReader, stream: bytes, cuts: list[int]) -> list[tuple[Kind, int, bytes]]:
    found = []
    while stream:
        space = reader.space()
        count = min(len(stream), len(space), cuts.pop() if cuts else len(stream))
        space[:count] = stream[:count]
        reader.received(count)
        stream = stream[count:]
        found += [(kind, number, payload.tobytes()) for kind, number, payload in reader.frames()]
    return found


@given(FRAMES, st.lists(st.integers(1, 300), max_size=60))
def test_a_stream_may_be_cut_anywhere(frames: list[tuple[Kind, int, bytes]], cuts: list[int]) -> None:
    stream = b"".join(frame(*one) for one in frames)
    assert read(FrameReader(1000), stream, cuts) == frames


def test_a_frame_longer_than_the_buffer() -> None:
    body = bytes(range(256)) * 4000
    assert read(FrameReader(2 << 20), frame(Kind.GET, 3, body), [7, 100_000]) == [(Kind.GET, 3, body)]


@given(st.binary(min_size=HEADER.size, max_size=200))
def test_random_streams_are_frames_or_errors(stream: bytes) -> None:
    reader = FrameReader(100)
    with contextlib.suppress(WireError):
        assert all(len(payload) <= 100 for _, _, payload in read(reader, stream, []))


@given(st.binary(max_size=100))
def test_random_payloads_are_understood_or_errors(payload: bytes) -> None:
    view = memoryview(payload)
    for unpack in (
        Planned.unpack,
        unpack_count,
        unpack_asked,
        unpack_usage,
        lambda view: unpack_done(1, view),
        lambda view: unpack_result(1, view),
    ):
        with contextlib.suppress(WireError):
            unpack(view)


@given(FLAGS, st.booleans(), st.sampled_from(OpStatus))
def test_results(ok: np.ndarray, compared: bool, status: OpStatus) -> None:
    sent = OpResult(9, status, ok, 0.25, ~ok if compared else None)
    came = unpack_result(9, memoryview(b"".join(pack_result(sent))))
    assert (came.op_id, came.status, came.seconds) == (9, status, 0.25)
    np.testing.assert_array_equal(came.ok, ok)
    assert (came.wrong is None) == (not compared)
    assert came.wrong is None or (came.wrong == ~ok).all()


@given(FLAGS, st.sampled_from(KVResponseStatus), st.lists(st.integers(0, 1000), max_size=4))
def test_ends_of_tasks(ok: np.ndarray, status: KVResponseStatus, blocks: list[int]) -> None:
    mismatches = tuple(Mismatch(block, Tier.SSD, bytes([block % 256]) * 16) for block in blocks)
    came = unpack_done(4, memoryview(b"".join(pack_done(TaskDone(4, status, ok, mismatches)))))
    assert (came.task_id, came.status, came.mismatches) == (4, status, mismatches)
    np.testing.assert_array_equal(came.ok, ok)


def test_plans_and_questions() -> None:
    sent = Planned(5, 2, np.array([4, 1, 9], np.int32), np.array([1], np.int32))
    payload = memoryview(b"".join(sent.pack()))
    came = Planned.unpack(payload, blocks_max=5)
    assert (came.task_id, came.start_block, came.slots.tolist(), came.reads.tolist()) == (
        5,
        2,
        [4, 1, 9],
        [1],
    )
    with pytest.raises(WireError):
        Planned.unpack(payload, blocks_max=4)
    assert unpack_asked(memoryview(pack_asked(160, 3, Purpose.CHECK))) == (160, 3, Purpose.CHECK)
