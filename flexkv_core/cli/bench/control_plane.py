"""Hash, match, plan and evict, on an index of a million blocks; all on one thread, in memory only.

Method: each figure is the median of many single calls, timed one by one. Sequences are visited in a scattered order, so that a call
does not find the lines of the call before in the nearest caches. Keys are random: the index cannot tell.

``index_bytes_per_block`` is what the process grew by (resident set) while 1 M blocks were stored through the engine, or what malloc
says the index holds, whichever is more; runs of 32 blocks (512 tokens), slots in one tier, eviction order and pool included. It is
measured first, in a heap that nothing has been freed in.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np

from flexkv_core import native
from flexkv_core.cache import GlobalCacheEngine
from flexkv_core.cache.radix_tree import PyRunIndex, RunIndex
from flexkv_core.cli.bench.host_copy import hash_block_ns
from flexkv_core.config import FlexKVConfig
from flexkv_core.layout import KVLayout
from flexkv_core.manager import KVManager, ModelConfig
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import OpResult, OpStatus, TransferOp
from flexkv_core.types import KEY_BYTES, Tier

_Item = TypeVar("_Item")

_SEQUENCE_BLOCKS = 8192
_TOKENS_PER_BLOCK = 16
_RUNS = 16
_MEMORY_RUN_BLOCKS = 32


def run(quick: bool = False) -> dict[str, float | bool]:
    """All figures; ``quick``: an eighth of the size, one in ten of the calls."""
    blocks, calls = (1 << 17, 100) if quick else (1 << 20, 1000)
    figures: dict[str, float | bool] = {"index_bytes_per_block": _index_bytes_per_block(blocks)}
    figures["index_bytes_per_block_two_tiers"] = _index_bytes_per_block(blocks, written=True)
    figures["load_seconds_per_million"] = _load_seconds(blocks) * 1e6 / blocks
    figures["match_8192_us"] = _match_us(RunIndex, blocks, calls)
    figures["match_8192_python_us"] = _match_us(PyRunIndex, blocks, calls)
    figures["hash_block_ns"] = hash_block_ns()
    figures.update(_plan_us(calls))
    figures["evict_8_of_100k_us"] = _evict_us(10_000 if quick else 100_000, calls)
    figures.update(_manager_us(calls // 5))
    figures["native"] = native.NATIVE
    return figures


# ---- the index ---------------------------------------------------------------------------------------------------------------


def _index_bytes_per_block(blocks: int, written: bool = False) -> float:
    """``written``: every block is on the SSD as well, and the SSD's pool and eviction order count too."""
    gc.collect()
    before = _resident_bytes()
    engine = GlobalCacheEngine({Tier.HOST: blocks, Tier.SSD: blocks} if written else {Tier.HOST: blocks})
    for _ in range(blocks // _MEMORY_RUN_BLOCKS):
        engine.commit_put(engine.plan_put(os.urandom(KEY_BYTES * _MEMORY_RUN_BLOCKS)))
        plan = engine.plan_write(_MEMORY_RUN_BLOCKS)
        if plan is not None:
            engine.finish_write(plan, np.ones(plan.count, np.bool_))
    assert engine.index.blocks == blocks
    gc.collect()
    return max(_resident_bytes() - before, engine.index.memory_bytes()) / blocks


def _resident_bytes() -> int:
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


def _load_seconds(blocks: int) -> float:
    """A warm start's tree of sequences of 32 blocks, the slots of each side by side, from arrays in memory; median of 5."""
    keys = np.frombuffer(os.urandom(KEY_BYTES * blocks), np.uint8).reshape(blocks, KEY_BYTES)
    parents = np.roll(keys, 1, axis=0)
    parents[::_MEMORY_RUN_BLOCKS] = 0
    slots = np.arange(blocks, dtype=np.int32)
    raw = keys.tobytes(), parents.tobytes()
    seconds = []
    for _ in range(5):
        engine = GlobalCacheEngine({Tier.HOST: 1024, Tier.SSD: blocks})
        started = time.perf_counter()
        engine.load(slots, *raw)
        seconds.append(time.perf_counter() - started)
        assert engine.index.blocks == blocks
    return median(seconds)


def _match_us(index_class: type[PyRunIndex], blocks: int, calls: int) -> float:
    index = index_class(False)
    sequences = [_insert_sequence(index, i) for i in range(blocks // _SEQUENCE_BLOCKS)]
    visits = _scattered(sequences)
    out = np.empty(_SEQUENCE_BLOCKS, np.int32)
    assert index.match(sequences[-1], 0, out, Tier.HOST, False)[0] == _SEQUENCE_BLOCKS
    return _median_us(lambda keys: index.match(keys, 0, out, Tier.HOST, False), visits, calls)


def _insert_sequence(index: PyRunIndex, number: int) -> bytes:
    keys = os.urandom(KEY_BYTES * _SEQUENCE_BLOCKS)
    length = _SEQUENCE_BLOCKS // _RUNS
    parent = -1
    for i in range(_RUNS):
        first_slot = number * _SEQUENCE_BLOCKS + i * length
        slots = np.arange(first_slot, first_slot + length, dtype=np.int32)
        parent = index.insert(
            parent, keys[KEY_BYTES * length * i : KEY_BYTES * length * (i + 1)], Tier.HOST, slots
        )
        index.publish(parent)
        index.release(parent)
    return keys


# ---- the engine --------------------------------------------------------------------------------------------------------------


def _plan_us(calls: int) -> dict[str, float]:
    """A get of 8,192 blocks in 16 runs; a put of 8,192 new ones into a pool with room, and into a full one."""
    engine = GlobalCacheEngine({Tier.HOST: 64 * _SEQUENCE_BLOCKS})
    for _ in range(64):
        keys = os.urandom(KEY_BYTES * _SEQUENCE_BLOCKS)
        for i in range(1, _RUNS + 1):
            engine.commit_put(engine.plan_put(keys[: KEY_BYTES * (_SEQUENCE_BLOCKS // _RUNS) * i]))
    get_us = _median_us(engine.plan_get, cycle([keys]), calls, engine.finish_get)
    fresh = _endless(lambda: os.urandom(KEY_BYTES * _SEQUENCE_BLOCKS))
    full_us = _median_us(engine.plan_put, fresh, calls, engine.commit_put)
    engine.reset()
    room_us = _median_us(engine.plan_put, fresh, calls, engine.abort_put)
    return {"plan_get_8192_us": get_us, "plan_put_8192_us": room_us, "plan_put_8192_full_us": full_us}


def _evict_us(leaves: int, calls: int) -> float:
    """8 blocks, each the only one of its run, so that 8 runs go; ``leaves`` are left after the last call."""
    engine = GlobalCacheEngine({Tier.HOST: leaves + 8 * calls})
    _fill(engine)
    assert len(engine.index) == leaves + 8 * calls
    return _median_us(engine.evict, cycle([8]), calls)


def _fill(engine: GlobalCacheEngine) -> None:
    while engine.used() < engine.capacity():
        engine.commit_put(engine.plan_put(os.urandom(KEY_BYTES)))


# ---- the manager -------------------------------------------------------------------------------------------------------------


class _InstantExecutor:
    """Reports each op as done and moves nothing: what is left is the manager."""

    def start(self, host: HostSegment, on_result: Callable[[OpResult], None]) -> None:
        self._on_result = on_result

    def submit(self, op: TransferOp) -> None:
        self._on_result(OpResult(op.op_id, OpStatus.DONE, np.ones(len(op.slots), np.bool_)))

    def cancel(self, op_id: int) -> None:
        pass

    def close(self) -> None:
        pass


def _manager_us(calls: int) -> dict[str, float]:
    """``get_match`` and ``put_match`` of 131,072 int64 tokens: hash, match, plan, mask; the pool has room for the put.

    ``get_match_over_hash_us`` is what ``get_match`` takes beyond the hash of the same tokens, measured in turns: the chained hash is most
    of it, no faster than the processor's latency, and swings with the clock of a shared machine.
    """
    layout = KVLayout(_TOKENS_PER_BLOCK, _TOKENS_PER_BLOCK, device_block_bytes=4096)
    config = FlexKVConfig(host_bytes=(4 * _SEQUENCE_BLOCKS + 64) * (layout.slot_bytes + 4))
    manager = KVManager(ModelConfig({"model": "bench"}, layout), config, _InstantExecutor())
    manager.start()

    def give_back(match: tuple[int, object]) -> None:
        manager.cancel(match[0])
        manager.wait(match[0])  # forgets the task

    try:
        rng = np.random.default_rng(0)
        count = _SEQUENCE_BLOCKS * _TOKENS_PER_BLOCK
        cached = rng.integers(0, 150_000, count)
        manager.wait(manager.put_async(cached, np.arange(count)))
        found = manager.get_match(cached)
        assert found[1].all()
        give_back(found)
        fresh = _endless(lambda: rng.integers(0, 150_000, count))
        hash_us, get_us = _in_turns_us(
            lambda: native.hash_blocks(bytes(KEY_BYTES), cached, _TOKENS_PER_BLOCK),
            lambda: manager.get_match(cached),
            calls,
            give_back,
        )
        return {
            "get_match_131072_us": median(get_us),
            "get_match_over_hash_us": median(a - b for a, b in zip(get_us, hash_us, strict=True)),
            "hash_131072_int64_us": median(hash_us),
            "put_match_131072_us": _median_us(manager.put_match, fresh, calls, give_back),
        }
    finally:
        manager.shutdown()


# ---- measuring ---------------------------------------------------------------------------------------------------------------


def _endless(make: Callable[[], _Item]) -> Iterator[_Item]:
    while True:
        yield make()


def _scattered(items: list[bytes]) -> Iterator[bytes]:
    order = np.random.default_rng(0).permutation(len(items))
    return cycle([items[i] for i in order])


def _median_us(
    call: Callable[..., object],
    arguments: Iterator[object],
    calls: int,
    after: Callable[..., object] = lambda result: None,
) -> float:
    """Median µs of ``call(next(arguments))``; ``after``, which takes the result, is not timed."""
    times = []
    for argument in islice(arguments, calls):
        started = time.perf_counter_ns()
        result = call(argument)
        times.append(time.perf_counter_ns() - started)
        after(result)
        del result  # not within the next call's time
    return median(times) / 1000


def _in_turns_us(
    first: Callable[[], object], second: Callable[[], object], calls: int, after_second: Callable[..., object]
) -> tuple[list[float], list[float]]:
    """µs of each call of two things that alternate, so that a slow moment of the machine falls on both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(calls):
        for side, call in enumerate((first, second)):
            started = time.perf_counter_ns()
            result = call()
            times[side].append((time.perf_counter_ns() - started) / 1000)
            if side:
                after_second(result)
            del result  # not within the next call's time
    return times
