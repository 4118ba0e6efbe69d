"""Write-behind through the troubles of its storage process: what was dropped is written later, what is rotten is not written to."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flexkv_core import ssd_link
from flexkv_core.block_manager import BlockManager
from flexkv_core.cli.torture.device import BLOCK_BYTES
from flexkv_core.cli.torture.flips import flip_bit
from flexkv_core.cli.torture.load import (
    CHAIN_BLOCKS_MAX,
    Client,
    chain_keys,
    leaked_slots,
    make_manager,
    settings,
)
from flexkv_core.types import Tier

CHAINS = 6


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def on_ssd(manager: BlockManager) -> int:
    with manager._changed:
        index = manager._cache.index
        raw = [index.slots(run, Tier.SSD) for run in index.runs()]
    return sum(int((np.frombuffer(slots, np.int32) >= 0).sum()) for slots in raw if slots)


def storage_pid(manager: BlockManager) -> int:
    assert manager._ssd is not None
    return manager._ssd.pid


def test_what_a_dying_process_dropped_is_written_by_the_next(tmp_path: Path) -> None:
    manager, device = make_manager(settings([str(tmp_path)], 400, 256, scrub_bytes_per_s=0))
    client, pid = Client(manager, device, 0), storage_pid(manager)
    for chain in range(CHAINS):
        client.put(chain_keys(manager.root, chain))
        if chain == 1:
            os.kill(pid, signal.SIGSTOP)  # so that there are writes under way when it dies
        if chain == 3:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: storage_pid(manager) not in (pid, -1))
    wait_until(lambda: on_ssd(manager) == CHAINS * CHAIN_BLOCKS_MAX)
    assert leaked_slots(manager) == 0
    manager.shutdown()


def test_what_a_dying_process_dropped_needs_no_further_put(tmp_path: Path) -> None:
    manager, device = make_manager(settings([str(tmp_path)], 400, 256, scrub_bytes_per_s=0))
    client, pid = Client(manager, device, 0), storage_pid(manager)
    os.kill(pid, signal.SIGSTOP)
    for chain in range(CHAINS):
        client.put(chain_keys(manager.root, chain))
    assert on_ssd(manager) == 0
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: on_ssd(manager) == CHAINS * CHAIN_BLOCKS_MAX)
    assert leaked_slots(manager) == 0
    manager.shutdown()


def test_what_the_queue_had_no_room_for_is_written_when_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_link, "WRITE_BYTES", 8 * BLOCK_BYTES)
    config = settings([str(tmp_path)], 400, 256, scrub_bytes_per_s=0, write_queue_bytes=8 * BLOCK_BYTES)
    manager, device = make_manager(config)
    client, pid = Client(manager, device, 0), storage_pid(manager)
    os.kill(pid, signal.SIGSTOP)
    for chain in range(CHAINS):
        client.put(chain_keys(manager.root, chain))
    assert manager._cache.stats.writes_dropped > 0
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: on_ssd(manager) == CHAINS * CHAIN_BLOCKS_MAX)
    assert leaked_slots(manager) == 0
    manager.shutdown()


def let_write(pid: int, size_bytes: int) -> None:
    """The process may write to its files up to there; beyond it the kernel answers EFBIG."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, hard))


def test_what_the_disk_refused_is_written_when_it_does_not_any_more(tmp_path: Path) -> None:
    manager, device = make_manager(settings([str(tmp_path)], 400, 256, scrub_bytes_per_s=0))
    client, pid, stats = Client(manager, device, 0), storage_pid(manager), manager._cache.stats
    let_write(pid, 0)
    for chain in range(CHAINS):
        client.put(chain_keys(manager.root, chain))
    wait_until(lambda: stats.blocks_write_failed > 0)
    assert on_ssd(manager) == 0
    let_write(pid, resource.RLIM_INFINITY)
    wait_until(lambda: on_ssd(manager) == CHAINS * CHAIN_BLOCKS_MAX)
    assert storage_pid(manager) == pid
    assert leaked_slots(manager) == 0
    manager.shutdown()


def test_a_disk_that_refuses_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_link, "PAUSE_FIRST_S", 3600.0)
    manager, device = make_manager(settings([str(tmp_path)], 400, 256, scrub_bytes_per_s=0))
    client, stats = Client(manager, device, 0), manager._cache.stats
    let_write(storage_pid(manager), 0)
    client.put(chain_keys(manager.root, 0))
    wait_until(lambda: stats.blocks_write_failed > 0)
    wait_until(lambda: not manager._cache.lease_count)
    failed = stats.blocks_write_failed
    for chain in range(1, CHAINS):
        client.put(chain_keys(manager.root, chain))
        assert not manager._cache.lease_count
    assert stats.blocks_write_failed == failed
    manager.shutdown()


def test_a_slot_that_the_scrubber_found_is_used_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings([str(tmp_path)], 400, 256, scrub_bytes_per_s=0)
    manager, device = make_manager(config)
    client = Client(manager, device, 0)
    client.put(chain_keys(manager.root, 0))
    wait_until(lambda: on_ssd(manager) == CHAIN_BLOCKS_MAX)
    manager.shutdown()
    flip_bit(next(tmp_path.rglob("data")), 10 * BLOCK_BYTES + 77, 3)
    manager, device = make_manager(config.model_copy(update={"scrub_bytes_per_s": 64 << 20}))
    client = Client(manager, device, 0)
    wait_until(lambda: manager.counters().ssd_corrupt_blocks == 1)
    for chain in range(10, 40):  # more than there is room for: every slot is written
        client.put(chain_keys(manager.root, chain))
        wait_until(lambda: not manager._cache.lease_count)
    pool = manager._cache.pools[Tier.SSD]
    assert pool.quarantined_count == 1
    assert leaked_slots(manager) == 0
    assert client.tally.wrong == 0
    manager.shutdown()


def test_what_the_scrubber_found_is_not_offered_any_more(tmp_path: Path) -> None:
    """Nobody reads it: it leaves the index, or is written anew if host memory has it."""
    manager, device = make_manager(settings([str(tmp_path)], 400, 256, scrub_bytes_per_s=64 << 20))
    client, keys = Client(manager, device, 0), chain_keys(manager.root, 0)
    client.put(keys)
    wait_until(lambda: on_ssd(manager) == CHAIN_BLOCKS_MAX)
    manager.shutdown()
    flip_bit(next(tmp_path.rglob("data")), 10 * BLOCK_BYTES + 77, 3)
    manager, device = make_manager(settings([str(tmp_path)], 400, 256, scrub_bytes_per_s=64 << 20))
    wait_until(lambda: manager.match_keys(keys) == 10)
    assert manager.counters().ssd_read_blocks == 0
    Client(manager, device, 0).put(keys)
    wait_until(lambda: on_ssd(manager) == CHAIN_BLOCKS_MAX)
    assert leaked_slots(manager) == 0
    manager.shutdown()


def test_what_the_catalogue_lost_is_not_offered_twice(tmp_path: Path) -> None:
    manager, device = make_manager(settings([str(tmp_path)], 400, 256, scrub_bytes_per_s=0))
    client, keys, pid = Client(manager, device, 0), chain_keys(manager.root, 0), storage_pid(manager)
    client.put(keys)
    wait_until(lambda: on_ssd(manager) == CHAIN_BLOCKS_MAX)
    with manager._changed:
        manager._cache.evict(CHAIN_BLOCKS_MAX)
    os.kill(pid, signal.SIGSTOP)
    for path in tmp_path.rglob("catalog.sqlite*"):
        path.unlink()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: storage_pid(manager) not in (pid, -1))
    assert manager.match_keys(keys) == CHAIN_BLOCKS_MAX
    assert not client.get(keys).any()
    assert manager.match_keys(keys) == 0
    client.put(keys)
    wait_until(lambda: on_ssd(manager) == CHAIN_BLOCKS_MAX)
    manager.shutdown()
