"""CRC32C: published vectors, a bit-by-bit reference, and the folding constants derived anew."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexkv_core import native
from flexkv_core.native import twin

POLYNOMIAL = 0x11EDC6F41
SOURCES = Path(native.__file__).parent

shared_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def reference_crc(data: bytes, crc: int = 0) -> int:
    """One bit at a time."""
    state = crc ^ 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


# RFC 3720 appendix B.4, and the check value of the catalogue of CRC algorithms.
@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_published_vectors(implementation, data, crc):
    assert implementation.crc32c(data) == crc


@shared_fixture
@given(data=st.binary(max_size=1500), crc=st.integers(0, 2**32 - 1), start=st.integers(0, 70))
def test_any_bytes_at_any_alignment(implementation, data, crc, start):
    assert implementation.crc32c(memoryview(data)[start:], crc) == reference_crc(data[start:], crc)


@pytest.mark.parametrize(
    "length", [4096, 8191, 8192, 8193, 8192 + 63, 8192 + 256 + 64 + 7, 16384, 70_000, 300_001]
)
def test_long_data_and_continuation(implementation, length):
    data = np.random.default_rng(length).integers(0, 256, length, np.uint8)
    whole = implementation.crc32c(data, 7)
    assert whole == twin.crc32c(data, 7)
    for cut in (1, length // 3, length - 1):
        assert implementation.crc32c(data[cut:], implementation.crc32c(data[:cut], 7)) == whole


def test_the_twins_lanes_agree_with_single_steps():
    data = np.random.default_rng(1).integers(0, 256, 100_000, np.uint8)
    crc = 0
    for at in range(0, len(data), 999):
        crc = twin.crc32c(data[at : at + 999], crc)
    assert twin.crc32c(data) == crc


@pytest.mark.parametrize("crc", [-1, 2**32])
def test_an_initial_value_out_of_range_is_refused(implementation, crc):
    with pytest.raises(ValueError, match="unsigned 32-bit"):
        implementation.crc32c(b"", crc)


@pytest.mark.parametrize("data", ["text", None, np.zeros(8, np.uint8)[::2]])
def test_what_is_no_contiguous_buffer_is_refused(implementation, data):
    with pytest.raises(TypeError):
        implementation.crc32c(data)


def test_slots_are_seeded_with_their_keys(implementation):
    memory = np.random.default_rng(2).integers(0, 256, 7 * 1000, np.uint8)
    keys = np.random.default_rng(3).integers(0, 256, 16 * 4, np.uint8).tobytes()
    for dtype in (np.int32, np.int64):
        slots, out = np.array([6, 0, 3, 3], dtype), np.zeros(4, np.uint32)
        implementation.crc32c_slots(memory.ctypes.data, 1000, 13, 900, slots, keys, out)
        for i, slot in enumerate(slots.tolist()):
            image = memory[slot * 1000 + 13 : slot * 1000 + 913].tobytes()
            assert out[i] == twin.crc32c(keys[16 * i : 16 * i + 16] + image)


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
def test_threads_share_the_slots(implementation, threads):
    count = 37
    memory = np.random.default_rng(4).integers(0, 256, count * 500, np.uint8)
    keys, slots = np.random.default_rng(5).bytes(16 * count), np.random.default_rng(6).permutation(count)
    alone, shared = np.zeros(count, np.uint32), np.zeros(count, np.uint32)
    implementation.crc32c_slots(memory.ctypes.data, 500, 0, 500, slots, keys, alone)
    implementation.crc32c_slots(memory.ctypes.data, 500, 0, 500, slots, keys, shared, threads=threads)
    assert (alone == shared).all()
    assert len(set(shared.tolist())) == count


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"threads": 0}, ValueError),
        ({"threads": 65}, ValueError),
        ({"offset": -1}, ValueError),
        ({"length": -1}, ValueError),
        ({"offset": 1, "length": 64}, ValueError),
        ({"slots": np.array([0, -1], np.int32)}, IndexError),
        ({"slots": np.array([0.0, 1.0])}, TypeError),
        ({"keys": bytes(31)}, ValueError),
        ({"out": np.zeros(3, np.uint32)}, ValueError),
        ({"out": np.zeros(2, np.int32)}, TypeError),
        ({"out": bytes(8)}, TypeError),
    ],
)
def test_wrong_arguments_of_crc32c_slots(implementation, change, error):
    memory = np.zeros(128, np.uint8)
    arguments = {
        "base_addr": memory.ctypes.data,
        "slot_bytes": 64,
        "offset": 0,
        "length": 64,
        "slots": np.array([0, 1], np.int32),
        "keys": bytes(32),
        "out": np.zeros(2, np.uint32),
    }
    implementation.crc32c_slots(**arguments)
    with pytest.raises(error):
        implementation.crc32c_slots(**(arguments | change))


def folding_powers(distance_bits: int) -> tuple[int, int]:
    """The multipliers of the low and the high half of a lane that is folded ahead by this many bits."""

    def power(exponent: int) -> int:
        value = 1
        for _ in range(exponent):
            value <<= 1
            value ^= POLYNOMIAL if value >> 32 else 0
        return int(f"{value:032b}"[::-1], 2) << 1

    return power(distance_bits + 32), power(distance_bits - 32)


def test_the_folding_constants_are_the_powers_they_claim_to_be():
    lanes_bits = 8 * 4096
    for name, distances in (
        ("kernels_avx512.c", (512, 1024, 2048, lanes_bits)),
        ("kernels_avx2.c", (128, 256, 512)),
        ("kernels_sse42.c", (128, 512, lanes_bits)),
    ):
        defined = re.findall(
            r"#define BY_\w+ \w+\((0x[0-9a-f]+), (0x[0-9a-f]+)\)", (SOURCES / name).read_text()
        )
        assert [(int(low, 16), int(high, 16)) for high, low in defined] == [
            folding_powers(bits) for bits in distances
        ]


@pytest.mark.parametrize("length", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 12345, 4 << 20])
def test_threads_share_a_slot_too(implementation, length):
    size = 4 << 20
    memory = np.random.default_rng(9).integers(0, 256, 2 * size, np.uint8)
    keys, slots = np.random.default_rng(10).bytes(32), np.array([1, 0])
    alone, shared = np.zeros(2, np.uint32), np.zeros(2, np.uint32)
    implementation.crc32c_slots(memory.ctypes.data, size, 0, length, slots, keys, alone)
    implementation.crc32c_slots(memory.ctypes.data, size, 0, length, slots, keys, shared, threads=3)
    assert (alone == shared).all()


def test_a_forked_child_has_helpers_of_its_own():
    """The parent's are not in it, though it may be forked while they work."""
    code = """
import os, threading, numpy as np
from flexkv_core import native
memory, slots, keys = np.ones(64 * 4096, np.uint8), np.arange(64), bytes(16 * 64)
def sums(threads):
    out = np.zeros(64, np.uint32)
    native.crc32c_slots(memory.ctypes.data, 4096, 0, 4096, slots, keys, out, threads=threads)
    return out.tolist()
def threads_here():
    return len(os.listdir('/proc/self/task'))
alone, stop = sums(1), threading.Event()
def work():
    while not stop.is_set():
        sums(4)
thread = threading.Thread(target=work)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        right = sums(4) == alone
        os._exit(not right or (native.NATIVE and threads_here() != 4))
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
assert sums(4) == alone
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_calls_at_once_share_helpers_without_mixing_up(implementation):
    count, size = 40, 20_000 if implementation is not twin else 100
    memory = np.random.default_rng(7).integers(0, 256, count * size, np.uint8)
    keys = np.random.default_rng(8).bytes(16 * count)
    slots = np.arange(count)
    alone = np.zeros(count, np.uint32)
    implementation.crc32c_slots(memory.ctypes.data, size, 0, size, slots, keys, alone)

    def repeat(_):
        for _ in range(30 if implementation is not twin else 1):
            out = np.zeros(count, np.uint32)
            implementation.crc32c_slots(memory.ctypes.data, size, 0, size, slots, keys, out, threads=3)
            if (out != alone).any():
                return False
        return True

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(repeat, range(8)))
