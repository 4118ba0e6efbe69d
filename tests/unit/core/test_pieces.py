"""Pieces of a load: each is copied once, an error reaches the owner, and a waiting thread really takes part."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest

from flexkv_core.errors import TransferError
from flexkv_core.transfer.pieces import Pieces
from flexkv_core.transfer.plan import OpStatus
from flexkv_core.types import Direction
from tests.unit.core.test_transfer import Rig

TIMEOUT_S = 30


def test_two_threads_copy_at_the_same_time_and_each_piece_once() -> None:
    both = threading.Barrier(2)  # breaks unless two copies run side by side
    copied: list[tuple[int, int]] = []

    def copy(piece: int) -> None:
        copied.append((piece, threading.get_ident()))
        if piece < 2:
            both.wait(TIMEOUT_S)

    pieces = Pieces(50, copy)
    helper = threading.Thread(target=pieces.work)
    helper.start()
    pieces.finish()
    helper.join(TIMEOUT_S)
    assert Counter(piece for piece, _ in copied) == Counter(range(50))
    assert len({thread for _, thread in copied[:2]}) == 2


def test_owner_waits_for_a_piece_that_another_thread_copies() -> None:
    taken, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def copy(piece: int) -> None:
        taken.set()
        assert go_on.wait(TIMEOUT_S)
        ended.set()

    pieces = Pieces(1, copy)
    helper = threading.Thread(target=pieces.work)
    helper.start()
    assert taken.wait(TIMEOUT_S)
    threading.Timer(0.05, go_on.set).start()
    pieces.finish()
    assert ended.is_set()
    helper.join(TIMEOUT_S)


def test_error_on_a_helping_thread_is_raised_on_the_owners_and_ends_the_copy() -> None:
    copied = []

    def copy(piece: int) -> None:
        copied.append(piece)
        raise TransferError("injected")

    pieces = Pieces(50, copy)
    helper = threading.Thread(target=pieces.work)
    helper.start()
    helper.join(TIMEOUT_S)
    with pytest.raises(TransferError, match="piece of a load failed"):
        pieces.finish()
    assert copied == [0]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    rig = Rig(queue_ops_max=2, timeout_s=30)
    monkeypatch.setattr(rig.engine, "_load_piece_blocks", 2)
    yield rig
    rig.close()


def fill_slots(rig: Rig, count: int) -> None:
    for block in range(count):
        rig.device.fill(block, block)
    rig.engine.submit(rig.op(1, Direction.STORE, count))
    assert rig.results.get(timeout=TIMEOUT_S).status is OpStatus.DONE
    for tensor in rig.device.tensors:
        tensor.zero_()


def test_helping_thread_copies_a_part_of_a_load(rig: Rig) -> None:
    fill_slots(rig, 9)
    threads: set[int] = set()
    both = threading.Barrier(2)
    scatter = rig.device.copier.inner.scatter

    def watched(*arguments: object) -> object:
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            both.wait(TIMEOUT_S)  # until the other thread copies as well
        return scatter(*arguments)

    rig.device.copier.inner.scatter = watched  # type: ignore[method-assign]
    rig.engine.submit(rig.op(2, Direction.LOAD, 9))
    rig.engine.help(TIMEOUT_S)
    result = rig.results.get(timeout=TIMEOUT_S)
    assert threads >= {threading.get_ident()}
    assert len(threads) == 2
    assert (result.status, result.ok.all()) == (OpStatus.DONE, True)
    assert all(rig.device.holds(block, block) for block in range(9))


def test_damaged_slot_of_a_shared_load_is_left_out(rig: Rig) -> None:
    fill_slots(rig, 9)
    rig.host.checksums[5, 0] ^= 1
    rig.engine.submit(rig.op(2, Direction.LOAD, 9))
    rig.engine.help(TIMEOUT_S)
    result = rig.results.get(timeout=TIMEOUT_S)
    assert np.flatnonzero(~result.ok).tolist() == [5]
    assert not rig.device.holds(5, 5)


def test_shared_load_that_raises_fails_and_the_thread_lives_on(rig: Rig) -> None:
    fill_slots(rig, 9)
    rig.device.copier.fail = True
    rig.engine.submit(rig.op(2, Direction.LOAD, 9))
    rig.engine.help(TIMEOUT_S)
    assert rig.results.get(timeout=TIMEOUT_S).status is OpStatus.FAILED
    rig.device.copier.fail = False
    rig.engine.submit(rig.op(3, Direction.LOAD, 9))
    assert rig.results.get(timeout=TIMEOUT_S).status is OpStatus.DONE


def test_help_ends_when_there_is_nothing_to_wait_for_and_after_its_time(rig: Rig) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    rig.engine.help(TIMEOUT_S)
    rig.device.copier.hold.clear()
    rig.engine.submit(rig.op(1, Direction.STORE))
    rig.engine.help(0.05)
    assert time.monotonic() < deadline
    assert rig.results.empty(), "the copy that is held has not ended"
    rig.device.copier.hold.set()
