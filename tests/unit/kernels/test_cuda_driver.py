"""Arguments reach the driver's functions in their places: against a library of the same prototypes, built here."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from flexkv_core.errors import TransferError
from flexkv_kernels.cuda_driver import BatchAttributes, CudaDriver

STREAM = 0x123456789ABC
COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def driver_of(version: int, folder: Path) -> CudaDriver:
    path = folder / f"libcuda{version}.so"
    source = Path(__file__).with_name("libcuda_stub.c")
    command = [str(COMPILER), "-shared", "-fPIC", f"-DVERSION={version}", "-o", str(path), str(source)]
    subprocess.run(command, check=True)
    return CudaDriver(str(path))


@pytest.mark.parametrize("version", [2, 1, 0], ids=["13.0", "12.8", "older"])
def test_batches_copy_every_piece(version: int, tmp_path: Path) -> None:
    driver = driver_of(version, tmp_path)
    source, target = np.random.default_rng().bytes(1000), np.zeros(1000, np.uint8)
    data = np.frombuffer(source, np.uint8)
    starts, sizes = np.array([0, 100, 700]), np.array([7, 600, 300])
    wanted = np.zeros(1000, np.uint8)
    for start, size in zip(starts, sizes, strict=True):
        wanted[start : start + size] = data[start : start + size]
    driver.copy(data.ctypes.data + starts, target.ctypes.data + starts, sizes, STREAM)
    assert (target == wanted).all()
    library = ctypes.CDLL(str(tmp_path / f"libcuda{version}.so"))
    counts = [ctypes.c_int.in_dll(library, name).value for name in ("batches", "single_copies")]
    assert counts == ([1, 0] if version else [0, 3])
    assert driver.batches == bool(version)


def test_without_batches_each_is_a_call(tmp_path: Path) -> None:
    driver = driver_of(2, tmp_path)
    driver.batches = False
    data, target = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
    starts = np.array([0, 32])
    driver.copy(data.ctypes.data + starts, target.ctypes.data + starts, np.array([32, 32]), STREAM)
    assert target.tolist() == list(range(64))


def test_the_attributes_are_as_long_as_the_drivers(tmp_path: Path) -> None:
    driver_of(2, tmp_path)
    library = ctypes.CDLL(str(tmp_path / "libcuda2.so"))
    assert ctypes.sizeof(BatchAttributes) == ctypes.c_size_t.in_dll(library, "attributes_bytes").value


def test_errors_carry_the_drivers_words(tmp_path: Path) -> None:
    driver = driver_of(2, tmp_path)
    driver.register(4096, 1 << 30)
    driver.unregister(4096)
    with pytest.raises(TransferError, match=r"cuMemHostRegister failed: out of memory \(2\)"):
        driver.register(4096, 1 << 41)
    with pytest.raises(TransferError, match=r"cuMemHostUnregister failed: invalid argument \(1\)"):
        driver.unregister(0)
    one = np.array([1])
    with pytest.raises(TransferError, match="cuMemcpyAsync failed"):
        driver.copy(one, one, one, STREAM + 1)
    with pytest.raises(TransferError, match="cuMemcpyBatchAsync failed"):
        driver.copy(one.repeat(2), one.repeat(2), one.repeat(2), STREAM + 1)


def test_memory_that_is_mapped_elsewhere_is_noticed(tmp_path: Path) -> None:
    driver = driver_of(2, tmp_path)
    assert driver.kernels_reach(0x7F12_3456_7000)
    assert not driver.kernels_reach(4096)


def test_no_driver_is_a_clear_error() -> None:
    with pytest.raises(TransferError, match=r"cannot be loaded: libcuda-is-not-here\.so"):
        CudaDriver("libcuda-is-not-here.so")
