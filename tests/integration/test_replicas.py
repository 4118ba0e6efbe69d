"""Engines of one model side by side (data parallelism): one setting of ``ssd_dirs``, files of their own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flexkv_core.block_manager import BlockManager
from flexkv_core.cli.torture.load import CHAIN_BLOCKS_MAX, Client, chain_keys, make_manager, settings
from flexkv_core.errors import FlexKVError


def written(manager: BlockManager) -> int:
    return int(manager.counters().ssd_written_blocks)


def test_replicas_share_a_directory_and_no_file(tmp_path: Path) -> None:
    config = settings([str(tmp_path)], 400, 256, scrub_bytes_per_s=0)
    managers = [make_manager(config, replica) for replica in (0, 1)]
    for replica, (manager, device) in enumerate(managers):
        Client(manager, device, 0).put(chain_keys(manager.root, replica))
    deadline = time.monotonic() + 20
    while any(written(manager) < CHAIN_BLOCKS_MAX for manager, _ in managers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(list(tmp_path.glob("flexkv-*/lock"))) == 2
    with pytest.raises(FlexKVError, match="is in use by process"):
        make_manager(config, 1)
    for manager, _ in managers:
        manager.shutdown()
    for replica in (0, 1):
        manager, _ = make_manager(config, replica)
        found = [manager.match_keys(chain_keys(manager.root, chain)) for chain in (0, 1)]
        assert found == [CHAIN_BLOCKS_MAX * (chain == replica) for chain in (0, 1)]
        manager.shutdown()
