"""A load on a manager: threads that put and get chains, and compare every byte of what they get."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from flexkv_core import native
from flexkv_core.block_manager import BlockManager, ModelConfig
from flexkv_core.cli.torture.device import BLOCK_TOKENS, LAYOUT, NumpyDevice, wrong_bytes
from flexkv_core.config import FlexKVConfig
from flexkv_core.storage.catalog import catalog_bytes
from flexkv_core.storage.memory import HUGE_PAGE_BYTES
from flexkv_core.tasks import TaskDone
from flexkv_core.types import KEY_BYTES, Tier

CHAIN_BLOCKS_MAX = 24
SHARED_BLOCKS = 4  # the beginning of a chain, which its family has in common
FAMILIES = 10
CHAINS = 250
"""The chains have about 5,000 blocks: several times what a tier of :func:`settings` holds, so that slots are always used anew."""
THREADS = 2
_TASK_S = 60.0  # longer than any deadline below; a task without an end is an error
_SMALL_FILES_BYTES = 64 << 10  # what the tier sets aside for them
_IDENTITY = {"model": "torture"}


def settings(directories: list[str], ssd_slots: int, host_slots: int, **more: object) -> FlexKVConfig:
    """Of a manager with so many slots in all directories together."""
    data = -(-ssd_slots // len(directories)) * LAYOUT.slot_bytes
    return FlexKVConfig(
        ssd_dirs=directories,
        ssd_bytes=data + catalog_bytes(ssd_slots, 1) + _SMALL_FILES_BYTES,
        host_bytes=HUGE_PAGE_BYTES + host_slots * (LAYOUT.slot_bytes + 12),
        **more,  # type: ignore[arg-type]
    )


@cache
def chain_keys(root: bytes, chain: int) -> bytes:
    """Keys of one of the CHAINS chains, CHAIN_BLOCKS_MAX of them."""
    shared = np.random.default_rng([0, chain % FAMILIES]).integers(0, 50_000, SHARED_BLOCKS * BLOCK_TOKENS)
    own = np.random.default_rng([1, chain]).integers(
        0, 50_000, (CHAIN_BLOCKS_MAX - SHARED_BLOCKS) * BLOCK_TOKENS
    )
    return native.hash_blocks(root, np.concatenate([shared, own]), BLOCK_TOKENS)


@dataclass
class Tally:
    """What was compared."""

    blocks: int = 0
    wrong: int = 0  # bytes


class Client:
    """Puts and gets by keys, one task at a time, with device blocks of its own: number ``first`` to ``first + CHAIN_BLOCKS_MAX - 1``."""

    def __init__(self, manager: BlockManager, device: NumpyDevice, first: int) -> None:
        self.tally = Tally()
        self._manager = manager
        self._device = device
        self._blocks = np.arange(first, first + CHAIN_BLOCKS_MAX)
        self._ended = threading.Event()
        self._done: TaskDone | None = None

    def put(self, keys: bytes) -> None:
        """Store what is new of a chain."""
        task, start, count = self._manager.put_keys(keys, self._on_done)
        if count:
            blocks = self._blocks[:count]
            self._device.fill(blocks, keys[KEY_BYTES * start : KEY_BYTES * (start + count)])
            self._run(task, blocks)

    def get(self, keys: bytes, start: int = 0) -> npt.NDArray[np.bool_]:
        """Load what there is of a chain from block ``start`` on and compare it; bool [blocks - start], what came."""
        came = np.zeros(len(keys) // KEY_BYTES - start, np.bool_)
        task, count = self._manager.get_keys(keys, start, self._on_done)
        if count:
            blocks = self._blocks[:count]
            self._device.wipe(blocks)
            came[:count] = self._run(task, blocks).ok
            loaded = np.flatnonzero(came)
            own = np.frombuffer(keys, "V16")[start + loaded].tobytes()
            self.tally.blocks += len(loaded)
            self.tally.wrong += wrong_bytes(self._device.read(self._blocks[loaded]), own) if own else 0
        return came

    def _run(self, task: int, blocks: npt.NDArray[np.int64]) -> TaskDone:
        self._ended.clear()
        self._manager.launch_blocks(task, blocks)
        if not self._ended.wait(_TASK_S):
            raise RuntimeError(f"task {task} has no end")
        assert self._done is not None
        return self._done

    def _on_done(self, done: TaskDone) -> None:
        self._done = done
        self._ended.set()


class Load:
    """THREADS threads without a pause. An error in one of them ends it and is raised by :meth:`stop`."""

    def __init__(self, manager: BlockManager, device: NumpyDevice, seed: int, chains: int = CHAINS) -> None:
        self._manager = manager
        self._chains = chains
        self._stop = threading.Event()
        self._errors: list[Exception] = []
        self._clients = [Client(manager, device, i * CHAIN_BLOCKS_MAX) for i in range(THREADS)]
        self._threads = [
            threading.Thread(target=self._work, args=(client, random.Random(f"{seed} {i}")), daemon=True)
            for i, client in enumerate(self._clients)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def tally(self) -> Tally:
        """So far."""
        tallies = [client.tally for client in self._clients]
        return Tally(sum(tally.blocks for tally in tallies), sum(tally.wrong for tally in tallies))

    def stop(self) -> Tally:
        """End after the tasks that run. What was compared."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return self.tally

    def _work(self, client: Client, rng: random.Random) -> None:
        try:
            while not self._stop.is_set():
                keys = chain_keys(self._manager.root, rng.randrange(self._chains))
                keys = keys[: KEY_BYTES * rng.randint(1, CHAIN_BLOCKS_MAX)]
                if rng.random() < 0.6:
                    client.put(keys)
                else:
                    client.get(keys)
        except (RuntimeError, ValueError, OSError, AssertionError) as error:  # what a caller must never see
            self._errors.append(error)


def make_manager(config: FlexKVConfig, replica: int = 0) -> tuple[BlockManager, NumpyDevice]:
    """A manager that has been started, and the device that it copies from and to."""
    device = NumpyDevice((THREADS + 1) * CHAIN_BLOCKS_MAX)
    manager = BlockManager(ModelConfig(_IDENTITY, LAYOUT, replica), config, device)
    manager.start()
    return manager, device


def leaked_slots(manager: BlockManager, timeout_s: float = 20.0) -> int:
    """Slots of all tiers that are taken and that no block in the index has, once no task runs and nothing is written; nobody may start
    a task. (Write-behind starts by itself, so this is looked at under the lock.)

    Raises:
        AssertionError: the index and its pools differ in another way.
    """
    leaked, deadline = 0, time.monotonic() + timeout_s
    with manager._changed:
        cache = manager._cache
        while cache.lease_count and time.monotonic() < deadline:
            manager._changed.wait(0.005)
        for tier, pool in cache.pools.items():
            raw = [cache.index.slots(run, Tier(tier)) for run in cache.index.runs()]
            leaked += pool.used_count - sum(int((np.frombuffer(s, np.int32) >= 0).sum()) for s in raw if s)
        cache.check_integrity()
    return leaked
