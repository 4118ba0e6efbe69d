"""A file system that fills up under the SSD tier: the caller sees misses, never errors, and the tier keeps to its bound."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_core.cli.torture.load import Load, leaked_slots, make_manager, settings
from flexkv_core.errors import CapacityError
from flexkv_core.ssd_link import PAUSE_MAX_S

DISK_BYTES = 48 << 20
SSD_SLOTS = 768
HOST_SLOTS = 256


@pytest.fixture(params=["ext4", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The root of a small file system; ext4 lies in a file behind a loop device."""
    point = tmp_path / "disk"
    point.mkdir()
    if os.geteuid():
        pytest.skip("mounting needs root")
    if request.param == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "flexkv-test", str(point)]
    else:
        if not shutil.which("mkfs.ext4"):
            pytest.skip("mkfs.ext4 is not installed")
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
        command = ["mount", "-o", "loop", str(image), str(point)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"the system does not mount {request.param}: {mounted.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


def fill(path: Path) -> None:
    """Until there is not a byte left for anyone."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        path.with_name("one more").write_bytes(bytes(8192))


def taken_bytes(directory: Path) -> int:
    # A log or draft of the catalogue may be gone before it is looked at.
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def test_a_disk_that_fills_costs_misses_only(disk: Path) -> None:
    directory = disk / "flexkv"
    config = settings([str(directory)], SSD_SLOTS, HOST_SLOTS, scrub_bytes_per_s=0)
    manager, device = make_manager(config)
    load = Load(manager, device, seed=1)
    highest = checked = 0

    def work(seconds: float) -> int:
        """What was written to the SSD meanwhile."""
        nonlocal highest, checked
        before, end = manager.counters().ssd_written_blocks, time.monotonic() + seconds
        checked = load.tally.blocks
        while time.monotonic() < end:
            highest = max(highest, taken_bytes(directory))
            time.sleep(0.005)
        assert load.tally.blocks > checked, "serving stopped"
        return manager.counters().ssd_written_blocks - before

    assert work(1.5) > 0
    fill(disk / "others")
    work(2)
    (disk / "others").unlink()
    (disk / "one more").unlink(missing_ok=True)
    deadline = time.monotonic() + 2 * PAUSE_MAX_S
    while work(0.5) == 0:
        assert time.monotonic() < deadline, "nothing is written although there is room again"
    tally = load.stop()  # raises what a caller was shown
    assert tally.wrong == 0
    assert leaked_slots(manager) == 0
    manager.shutdown()
    assert highest <= int(config.ssd_bytes)


def test_a_disk_that_is_full_before(disk: Path) -> None:
    fill(disk / "others")
    with pytest.raises(CapacityError, match="ssd_bytes: "):
        make_manager(settings([str(disk / "flexkv")], SSD_SLOTS, HOST_SLOTS))
    assert not (disk / "flexkv").exists()


def test_a_tier_that_was_there_starts_on_a_full_disk(disk: Path) -> None:
    config = settings([str(disk / "flexkv")], SSD_SLOTS, HOST_SLOTS, scrub_bytes_per_s=0)
    manager, device = make_manager(config)
    load = Load(manager, device, seed=2)
    time.sleep(1)
    load.stop()
    manager.shutdown()
    fill(disk / "others")
    with contextlib.suppress(
        CapacityError
    ):  # the log of the catalogue needs room; without it the start says so
        manager, device = make_manager(config)
        load = Load(manager, device, seed=3)
        time.sleep(1)
        assert load.stop().wrong == 0
        manager.shutdown()
