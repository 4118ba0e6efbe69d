"""Bulk work drops the GIL: a Python thread gets on while it runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

_BYTES = 64 << 20


@pytest.fixture(autouse=True)
def _rare_switches() -> Iterator[None]:
    """With a switch interval this long, a thread only gets on where the other one gives the GIL away."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    yield
    sys.setswitchinterval(interval)


def steps_during(call: Callable[[], object], repeats: int) -> int:
    """Python steps that another thread takes while ``call`` runs again and again."""
    started, stop, steps = threading.Event(), False, 0

    def count() -> None:
        nonlocal steps
        started.set()
        while not stop:
            steps += 1
            time.sleep(0)  # gives the GIL back, so that the calling thread returns at once

    thread = threading.Thread(target=count)
    thread.start()
    started.wait()
    before = steps
    for _ in range(repeats):
        call()
    during = steps - before
    stop = True
    thread.join()
    return during


def test_the_measurement_notices_a_call_that_holds_the_gil():
    assert steps_during(lambda: sum(range(300_000)), 3) == 0


@pytest.mark.parametrize(
    "name",
    [
        "hash",
        "crc",
        "crc_slots",
        "gather",
        "scatter",
        "gather_crc",
        "scatter_verify",
        "quantise",
        "dequantise",
    ],
)
def test_another_thread_gets_on(native_module, name):
    source, target = np.zeros(_BYTES, np.uint8), np.zeros(_BYTES, np.uint8)
    count, piece = 64, _BYTES // 64
    slots, keys = np.arange(count, dtype=np.int32), bytes(16 * count)
    crcs, ok = np.zeros(count, np.uint32), np.zeros(count, np.uint8)
    segments, strides = np.array([source.ctypes.data]), np.array([piece])
    geometry = (segments, strides, piece, slots, count, target.ctypes.data, piece, slots, count)
    native_module.gather_crc(*geometry, keys, crcs)
    images, half = target.ctypes.data + np.arange(count) * piece, piece // 2
    rounding = (segments, strides, piece, slots, count, images, half, half + 4)
    calls = {
        "hash": lambda: native_module.hash_blocks(bytes(16), source.view(np.int32), 16),
        "crc": lambda: native_module.crc32c(source),
        "crc_slots": lambda: native_module.crc32c_slots(
            target.ctypes.data, piece, 0, piece, slots, keys, crcs
        ),
        "gather": lambda: native_module.gather(*geometry),
        "scatter": lambda: native_module.scatter(*geometry),
        "gather_crc": lambda: native_module.gather_crc(*geometry, keys, crcs),
        "scatter_verify": lambda: native_module.scatter_verify(*geometry, keys, crcs, ok),
        "quantise": lambda: native_module.quantise(*rounding),
        "dequantise": lambda: native_module.dequantise(*rounding),
    }
    assert steps_during(calls[name], repeats=5) > 0
