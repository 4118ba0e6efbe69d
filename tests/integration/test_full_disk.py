"""A file system that fills up under the SSD tier: the caller sees misses, never errors, and the tier keeps to its bound."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_core.block_manager import BlockManager
from flexkv_core.cli.torture.device import NumpyDevice
from flexkv_core.cli.torture.load import (
    CHAIN_BLOCKS_MAX,
    Client,
    Load,
    chain_keys,
    leaked_slots,
    make_manager,
    settings,
)
from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import CapacityError, StorageError
from flexkv_core.ssd_link import PAUSE_MAX_S
from flexkv_core.types import Tier
from tests.integration.test_write_behind import wait_until

DISK_BYTES = 48 << 20
SSD_SLOTS = 768
HOST_SLOTS = 256
CHAINS = 8


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
    blocks = {}
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            blocks[found.st_ino] = found.st_blocks  # the catalogue's log has two names
    return 512 * sum(blocks.values())


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


@pytest.mark.parametrize("is_killed", [False, True], ids=["stopped", "killed"])
def test_a_tier_that_was_there_starts_on_a_full_disk(disk: Path, is_killed: bool) -> None:
    """And serves all that it held, and writes."""
    config = settings([str(disk / "flexkv")], SSD_SLOTS, HOST_SLOTS, scrub_bytes_per_s=0)
    if is_killed:
        held = serve_and_die(config)
    else:
        manager, device = make_manager(config)
        held = put_chains(manager, device)
        manager.shutdown()
    fill(disk / "others")
    for start in range(3):
        manager, device = make_manager(config)
        client = Client(manager, device, 0)
        assert sum(int(client.get(chain_keys(manager.root, chain)).sum()) for chain in range(CHAINS)) == held
        assert client.tally.wrong == 0
        before = manager.counters().ssd_written_blocks
        client.put(chain_keys(manager.root, CHAINS + start))
        wait_until(lambda: manager.counters().ssd_written_blocks > before)  # noqa: B023
        assert leaked_slots(manager) == 0
        assert taken_bytes(disk / "flexkv") <= int(config.ssd_bytes)
        manager.shutdown()


def test_a_start_that_finds_no_room_at_all_keeps_what_there_is(disk: Path) -> None:
    config = settings([str(disk / "flexkv")], SSD_SLOTS, HOST_SLOTS, scrub_bytes_per_s=0)
    manager, device = make_manager(config)
    held = put_chains(manager, device)
    manager.shutdown()
    next((disk / "flexkv").rglob("*-spare")).unlink()  # as if others had been quicker than the start
    fill(disk / "others")
    with pytest.raises(StorageError, match="the disk is full"):
        make_manager(config)
    (disk / "others").unlink()
    manager, _ = make_manager(config)
    assert manager._cache.used(Tier.SSD) == held
    manager.shutdown()


def put_chains(manager: BlockManager, device: NumpyDevice) -> int:
    """How many blocks are on the SSD."""
    client = Client(manager, device, 0)
    for chain in range(CHAINS):
        client.put(chain_keys(manager.root, chain))
    wait_until(lambda: manager._cache.used(Tier.SSD) == CHAINS * CHAIN_BLOCKS_MAX)
    wait_until(lambda: not manager._cache.lease_count)
    return CHAINS * CHAIN_BLOCKS_MAX


def serve_and_die(config: FlexKVConfig) -> int:
    """As :func:`put_chains`, in a process that is killed with its storage process."""
    child = subprocess.Popen(
        [sys.executable, "-c", _DYING, config.model_dump_json()],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    storage, held = map(int, child.stdout.readline().split())
    os.kill(storage, signal.SIGKILL)
    child.kill()
    child.wait()
    return held


_DYING = """
import sys, time
from flexkv_core.cli.torture.load import make_manager
from flexkv_core.config import FlexKVConfig
from tests.integration.test_full_disk import put_chains
manager, device = make_manager(FlexKVConfig.model_validate_json(sys.argv[1]))
held = put_chains(manager, device)
print(manager._ssd.pid, held, flush=True)
time.sleep(60)
"""
