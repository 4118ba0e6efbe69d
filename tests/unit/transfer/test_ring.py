"""The ring: batches arrive whole and in order, never more than there is room for."""

from __future__ import annotations

import os
import threading

import numpy as np

from flexkv_core.transfer.ring import COMMAND, COMPLETION, Ring


def records(start: int, count: int) -> np.ndarray:
    batch = np.zeros(count, COMPLETION)
    batch["op"] = np.arange(start, start + count)
    return batch


def test_records_have_their_sizes() -> None:
    assert (COMMAND.itemsize, COMPLETION.itemsize) == (64, 16)


def test_all_or_nothing_and_around_the_end() -> None:
    sender = Ring.create(COMPLETION, 8)
    receiver = Ring(sender.handle, COMPLETION)
    sent = taken = 0
    for count in (5, 3, 0, 8, 1, 7, 6, 2, 8):
        if sent - taken + count > 8:
            assert not sender.push(records(sent, count))
            assert receiver.take()["op"].tolist() == list(range(taken, sent))
            taken = sent
        assert sender.push(records(sent, count))
        sent += count
    assert receiver.take()["op"].tolist() == list(range(taken, sent))
    assert not len(receiver.take())
    assert not sender.push(records(0, 9))
    sender.close()


def test_two_threads_and_a_waiting_sender() -> None:
    sender = Ring.create(COMPLETION, 64)
    receiver = Ring(sender.handle, COMPLETION)
    total, got = 20_000, list[int]()

    def receive() -> None:
        while len(got) < total:
            got.extend(receiver.take()["op"].tolist())

    thread = threading.Thread(target=receive)
    thread.start()
    sent, rng = 0, np.random.default_rng(0)
    while sent < total:
        count = min(int(rng.integers(1, 65)), total - sent)
        assert sender.push(records(sent, count), timeout_s=10)
        sent += count
    thread.join(10)
    assert got == list(range(total))


def test_closing_frees_the_descriptors() -> None:
    before = os.listdir("/proc/self/fd")
    Ring.create(COMPLETION, 8).close()
    assert os.listdir("/proc/self/fd") == before
