"""Where a manager's processes run: the storage process where the engine may, the remote process where it computes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexkv_core.block_manager import BlockManager, ModelConfig
from flexkv_core.config import FlexKVConfig
from flexkv_core.transfer.cpus import EngineCpus
from tests.stores.sharing import wait_until
from tests.unit.core.device import Device

CPUS = frozenset(os.sched_getaffinity(0))


def affinities(pid: int) -> set[frozenset[int]]:
    """Of its threads."""
    threads = os.listdir(f"/proc/{pid}/task")
    return {frozenset(os.sched_getaffinity(int(thread))) for thread in threads}


@pytest.mark.skipif(len(CPUS) < 2, reason="one CPU leaves none")
def test_each_process_keeps_to_its_cpus_and_its_successor_too(tmp_path: Path) -> None:
    (tmp_path / "ssd").mkdir()
    config = FlexKVConfig(
        host_bytes=4 << 20,
        ssd_dirs=[str(tmp_path / "ssd")],
        ssd_bytes=16 << 20,
        remote_url=f"dir:{tmp_path}/store",
    )
    device = Device(4)
    spare = frozenset([max(CPUS)])
    manager = BlockManager(
        ModelConfig({"model": "test"}, device.layout()), config, device.copier, cpus=EngineCpus(CPUS, spare)
    )
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(CPUS)])  # as an engine may do with the thread that starts the manager
    try:
        manager.start()
    finally:
        os.sched_setaffinity(0, pinned)
    try:
        remote, ssd = manager._remote, manager._ssd
        wait_until(lambda: remote.pid > 0)
        assert affinities(remote.pid) == {spare}
        assert affinities(ssd.pid) == {CPUS}
        first = remote.pid
        remote._process.kill()
        wait_until(lambda: remote.pid not in (-1, first))
        assert affinities(remote.pid) == {spare}
    finally:
        manager.shutdown()
