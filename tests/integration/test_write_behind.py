"""Write-behind through the troubles of its storage process: what was dropped is written later, what is rotten is not written to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

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
from flexkv_core.manager import KVManager
from flexkv_core.types import Tier

CHAINS = 6


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def on_ssd(manager: KVManager) -> int:
    with manager._changed:
        index = manager._cache.index
        raw = [index.slots(run, Tier.SSD) for run in index.runs()]
    return sum(int((np.frombuffer(slots, np.int32) >= 0).sum()) for slots in raw if slots)


def storage_pid(manager: KVManager) -> int:
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
