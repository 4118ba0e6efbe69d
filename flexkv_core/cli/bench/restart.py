"""Warm start: from the start of a process to a tree that finds what the SSD tier held before.

The tier is synthetic: slots of one page that nobody reads, and a catalogue of chains of 64 blocks. The catalogue leaves the page cache
before each start. What is measured contains the start of Python, of the storage process, the catalogue and the tree.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from flexkv_core.cache.engine import GlobalCacheEngine
from flexkv_core.config import cache_dir
from flexkv_core.layout import KVLayout
from flexkv_core.storage.base import BlockBatch, SsdSpec
from flexkv_core.storage.catalog import BATCH_BLOCKS_MAX, Catalog, catalog_bytes
from flexkv_core.storage.directory import open_files
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.storage_process import StorageProcess
from flexkv_core.types import Tier

BLOCKS = 1_000_000
QUICK_BLOCKS = 20_000
CHAIN_BLOCKS = 64  # 1,024 tokens at 16 a block
ROUNDS = 3
HOST_SLOTS = 1024
_LAYOUT = KVLayout(tokens_per_block=16, device_block_tokens=16, device_block_bytes=4096)


def run(quick: bool = False, blocks: int | None = None) -> dict[str, float | bool]:
    """Median of three starts. ``blocks``: that the tier holds; each takes a page of disk."""
    count = blocks or (QUICK_BLOCKS if quick else BLOCKS)
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-restart-", dir=cache_dir()) as folder:
        spec = _spec(folder, count)
        catalog = _fill(spec, count)
        starts = [_start(folder, count, catalog) for _ in range(1 if quick else ROUNDS)]
        return {
            "blocks": float(count),
            "seconds": _median(starts, "seconds"),
            "seconds_per_million_blocks": _median(starts, "seconds") / count * 1e6,
            "tier_seconds": _median(starts, "tier_seconds"),
            "tree_seconds": _median(starts, "tree_seconds"),
            "tree_with_events_seconds": _median(starts, "tree_with_events_seconds"),
            "catalog_bytes_per_block": catalog.stat().st_size / count,
        }


def _median(starts: list[dict[str, float]], name: str) -> float:
    return statistics.median(start[name] for start in starts)


def _spec(folder: str, count: int) -> SsdSpec:
    # A little more than enough: how many slots a size holds is found from above, in steps that may end a few short.
    size = count * _LAYOUT.slot_bytes + catalog_bytes(count, _LAYOUT.shard_count) * 17 // 16 + (1 << 20)
    return SsdSpec((folder,), size, {"benchmark": "restart"}, _LAYOUT)


def _fill(spec: SsdSpec, count: int) -> Path:
    """Make the tier as a run before would have left it; the catalogue's path."""
    files = open_files(spec)
    catalog = Catalog(files.catalog_path, files.slot_count, _LAYOUT.shard_count)
    rng = np.random.default_rng(0)
    for start in range(0, count, BATCH_BLOCKS_MAX):
        slots = np.arange(start, min(start + BATCH_BLOCKS_MAX, count), dtype=np.int32)
        keys = rng.integers(1, 1 << 63, (len(slots), 2), np.uint64)
        parents = np.zeros_like(keys)
        parents[1:] = keys[:-1]
        parents[slots % CHAIN_BLOCKS == 0] = 0
        catalog.put(BlockBatch(keys, parents, slots, slots), np.ones((len(slots), 1), np.uint32))
    catalog.close()
    files.close()
    return files.catalog_path


def _start(folder: str, count: int, catalog: Path) -> dict[str, float]:
    fd = os.open(catalog, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    started = time.monotonic()
    command = [sys.executable, "-m", "flexkv_core.cli.bench.restart", folder, str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.monotonic() - started
        with_events = child.stdout.readline()
    assert child.returncode == 0, "the measured process failed"
    return {"seconds": seconds, **json.loads(line), **json.loads(with_events)}


def _measured(folder: str, count: int) -> None:
    """The measured process: what a manager does at its start."""
    spec = _spec(folder, count)
    host = HostSegment.create(HOST_SLOTS, _LAYOUT)
    process = StorageProcess(spec, host, lambda progress: None)
    began = time.monotonic()
    records = process.start()
    loaded = time.monotonic()
    capacities = {Tier.HOST: HOST_SLOTS, Tier.SSD: process.slot_count}
    content = (records.slots, records.keys, records.parents, records.generations.astype(np.int64))
    cache = GlobalCacheEngine(capacities)
    dropped = cache.load(*content)
    warm = time.monotonic()
    assert len(records) == count
    assert not len(dropped), f"{len(dropped)} blocks found no place in the tree"
    assert cache.match(records.keys[: 16 * CHAIN_BLOCKS]) == CHAIN_BLOCKS
    print(json.dumps({"tier_seconds": loaded - began, "tree_seconds": warm - loaded}), flush=True)
    began = time.monotonic()
    cache = GlobalCacheEngine(capacities, track_events=True)
    cache.load(*content)
    print(json.dumps({"tree_with_events_seconds": time.monotonic() - began}), flush=True)
    assert sum(len(event.keys) for event in cache.take_events()) == len(records.keys)
    process.close()
    host.close()


if __name__ == "__main__":
    _measured(sys.argv[1], int(sys.argv[2]))
