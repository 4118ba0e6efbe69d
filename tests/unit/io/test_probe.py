from __future__ import annotations

import errno
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexkv_core.errors import ConfigError
from flexkv_core.io import IoKind, Region, open_engine, probe, uring
from flexkv_core.io.uring import registration_pieces
from tests.contract.io.disk import BLOCK_BYTES, BLOCKS, open_disk

GIB = 1 << 30

# As a container engine's default profile: io_uring_setup(2) fails with EPERM. x86-64 and arm64 number it alike.
UNDER_SECCOMP = """
import ctypes, logging, struct, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
program = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 425, 0x06, 0, 0, 0x00050001, 0x06, 0, 0, 0x7FFF0000)
code = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(code)))) == 0  # PR_SET_SECCOMP, a filter
from flexkv_core.errors import ConfigError
from flexkv_core.io import open_engine
with open_engine("auto", []) as engine:
    print("got", engine.name)
try:
    open_engine("uring", [])
except ConfigError as error:
    print("refused:", error)
"""


def test_falls_back_to_threads_where_a_container_blocks_io_uring() -> None:
    done = subprocess.run([sys.executable, "-c", UNDER_SECCOMP], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "I/O engine: threads; io_uring is blocked here (a container's seccomp profile, or kernel.io_uring_disabled)",
        "got threads",
        "refused: io_engine: uring cannot be had: io_uring is blocked here (a container's seccomp profile, or"
        " kernel.io_uring_disabled); use threads or auto",
    ]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOMEM, errno.EMFILE])
def test_says_once_why_it_took_threads(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "said the kernel")

    monkeypatch.setattr(probe, "UringEngine", refuse)
    with caplog.at_level(logging.INFO), open_engine("auto", []) as engine:
        assert engine.name == "threads"
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("name", "depth"), [("aio", 64), ("auto", 0), ("auto", 5000)])
def test_refuses_what_it_does_not_know(name: str, depth: int) -> None:
    with pytest.raises(ConfigError, match=r"io_engine|io_queue_depth"):
        open_engine(name, [], depth)


def test_too_little_lockable_memory_costs_registration_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(uring, "memlock_limit_bytes", lambda: 8 << 20)
    region = Region(1 << 40, 16 << 20)
    with open_disk(tmp_path) as disk, open_engine("uring", [disk.fd], regions=[region]) as engine:
        disk.move(engine, IoKind.WRITE, [0])
        assert engine.wait().results.tolist() == [BLOCK_BYTES]
    assert "RLIMIT_MEMLOCK allows 8388608" in caplog.text


def test_what_the_kernel_does_not_register_is_used_unregistered(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with open_disk(tmp_path) as disk, open_engine("uring", [disk.fd], regions=[Region(4096, 4096)]) as engine:
        disk.move(engine, IoKind.WRITE, [0])
        assert engine.wait().results.tolist() == [BLOCK_BYTES]
    assert "not registered" in caplog.text


def test_pieces_are_at_most_a_gibibyte_and_ascend() -> None:
    pieces = registration_pieces([Region(8 * GIB, 2 * GIB + 4096), Region(0, 4096)])
    assert pieces.tolist() == [
        [0, 4096],
        [8 * GIB, 9 * GIB],
        [9 * GIB, 10 * GIB],
        [10 * GIB, 10 * GIB + 4096],
    ]


def test_operations_across_two_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(uring, "PIECE_BYTES_MAX", BLOCK_BYTES + BLOCK_BYTES // 2)
    with open_disk(tmp_path) as disk, open_engine("uring", [disk.fd], 8, [disk.region]) as engine:
        disk.move(engine, IoKind.WRITE, np.arange(BLOCKS))
        assert engine.wait(BLOCKS).results.tolist() == [BLOCK_BYTES] * BLOCKS
        np.testing.assert_array_equal(disk.content(), disk.memory)
