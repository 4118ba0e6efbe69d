"""Batches of 1 MiB blocks to and from each kind of store, in turns with the store's own client used bare.

FlexKV's side is what the remote process does for a batch: headers, checksums as they are recorded and verified, and the copy between the
host tier and what the client's library wants. The bare side hands the library bytes and takes bytes, with as many calls at a time, and
looks at nothing. Servers run on loopback of this machine, on one half of its cores, and the clients on the other, as if they were two machines:
where they share them, what is measured is how the scheduler divides them. Only the ratios mean anything.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.cli.harness.cpus import started_on
from flexkv_core.cli.harness.stores import (
    mooncake_holder,
    mooncake_master,
    redis_server,
    s3_options,
    s3_server,
)
from flexkv_core.layout import KVLayout
from flexkv_core.storage.base import BlockStatus
from flexkv_core.storage.checksum import slot_checksums
from flexkv_core.storage.memory import HostSegment
from flexkv_core.storage.remote import open_store
from flexkv_core.storage.remote.base import RemoteSpec, RemoteStore
from flexkv_core.storage.remote.objects import LANES as OBJECT_LANES
from flexkv_core.storage.remote.objects import ObjectsStore
from flexkv_core.storage.remote.valkey import LANES as VALKEY_LANES
from flexkv_core.storage.remote.valkey import ValkeyStore
from flexkv_core.storage.remote.values import ValueBuffers, names_of, regions_of
from flexkv_core.transfer.child import SWITCH_S

MIB = 1 << 20
BATCH = 16
LAYOUT = KVLayout(16, 16, MIB)
ROUNDS, QUICK_ROUNDS = 25, 2
LEASE_MS = 5000  # Mooncake's own
SEGMENT_BYTES = 1024 * MIB  # all rounds of both sides have room
DEADLINE_S = 60.0
_CPUS = os.sched_getaffinity(0)

Batch = Callable[[int], None]
"""Moves one batch; the argument numbers it, so that each is written under names of its own."""


def run(quick: bool = False) -> dict[str, float | bool]:
    """MB/s of both sides and their ratio, for each store and direction; needs redis-server, localbucket and mooncake_master."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    sys.setswitchinterval(SWITCH_S)  # as in the remote process, for both sides
    results: dict[str, float | bool] = {}
    with tempfile.TemporaryDirectory(prefix="flexkv-remote-") as folder:
        for name, sides in (
            ("directory", _directory),
            ("s3", _s3),
            ("valkey", _valkey),
            ("mooncake", _mooncake),
        ):
            with sides(Path(folder)) as (ours, bare):
                results |= _compare(name, ours, bare, rounds)
    return results


class _Sides:
    """One of the two clients: ``write`` and ``read`` of a batch."""

    def __init__(self, write: Batch, read: Batch) -> None:
        self.write = write
        self.read = read

    def prepare(self, batch: int) -> None:
        """What is there before a batch is written."""


def _compare(name: str, ours: _Sides, bare: _Sides, rounds: int) -> dict[str, float | bool]:
    """Medians over rounds in which both sides took turns, the first turn alternating."""
    times: dict[str, list[float]] = {
        f"{way}_{side}": [] for way in ("write", "read") for side in ("ours", "bare")
    }
    for turn in range(-1, rounds):  # the first is a warm-up
        for way in ("write", "read"):
            sides = [("ours", getattr(ours, way)), ("bare", getattr(bare, way))]
            for side, move in sides if turn % 2 else sides[::-1]:
                ours.prepare(turn)
                started = time.perf_counter()
                move(turn)
                if turn >= 0:
                    times[f"{way}_{side}"].append(time.perf_counter() - started)
    mb_s = {key: BATCH * MIB / 1e6 / statistics.median(values) for key, values in times.items()}
    figures: dict[str, float | bool] = {}
    for way in ("read", "write"):
        pairs = zip(times[f"{way}_bare"], times[f"{way}_ours"], strict=True)
        figures[f"{name}_{way}_ratio"] = statistics.median(bare / ours for bare, ours in pairs)
        figures[f"{name}_{way}_mb_s"] = mb_s[f"{way}_ours"]
        figures[f"{name}_{way}_bare_mb_s"] = mb_s[f"{way}_bare"]
    return figures


class _Ours(_Sides):
    """What the remote process does, in this process."""

    def __init__(self, store: RemoteStore, host: HostSegment, buffers: ValueBuffers) -> None:
        super().__init__(self._write, self._read)
        self.store = store
        self._buffers = buffers
        self._from, self._to = (np.arange(BATCH, dtype=np.int32) + start for start in (0, BATCH))
        self._base = np.arange(2 * BATCH, dtype=np.uint64).reshape(BATCH, 2)
        self._host = host

    def _keys(self, batch: int) -> npt.NDArray[np.uint64]:
        keys: npt.NDArray[np.uint64] = self._base + np.uint64(1000 + batch) * np.uint64(0x10001)
        return keys

    def prepare(self, batch: int) -> None:
        """Checksums, as a store from the device leaves them."""
        keys = self._keys(batch)
        self._host.checksums[self._from] = slot_checksums(self._host.address, LAYOUT, self._from, keys)

    def _write(self, batch: int) -> None:
        keys = self._keys(batch)
        self._buffers.fill(keys, self._from, 0)
        names = names_of("bench/ours", keys, 0)
        deadline = time.monotonic() + DEADLINE_S
        statuses = self.store.write(names, self._buffers.values(self._from), deadline)
        assert (statuses == BlockStatus.OK).all(), statuses

    def _read(self, batch: int) -> None:
        keys = self._keys(batch)
        names = names_of("bench/ours", keys, 0)
        deadline = time.monotonic() + DEADLINE_S
        found = self.store.read(names, self._buffers.places(keys, self._to), deadline)
        statuses = self._buffers.verify(keys, self._to, 0, found)
        assert (statuses == BlockStatus.OK).all(), statuses


@contextmanager
def _ours(url: str, options: dict[str, str] | None = None) -> Iterator[_Ours]:
    host = HostSegment.create(2 * BATCH, LAYOUT)
    buffers = ValueBuffers(host, BATCH)
    spec = RemoteSpec(url, "bench", LAYOUT, options or {}, timeout_s=DEADLINE_S)
    store = open_store(spec, regions_of(host, [buffers]))
    host_bytes = np.random.default_rng(0).integers(0, 256, BATCH * MIB, dtype=np.uint8)
    regions_of(host, [])[0][: BATCH * MIB] = host_bytes
    yield _Ours(store, host, buffers)
    store.close()
    host.close()


def _halves() -> tuple[set[int], set[int]]:
    """CPUs for servers and for clients."""
    cpus = sorted(_CPUS)
    return set(cpus[: len(cpus) // 2]), set(cpus[len(cpus) // 2 :])


def _servers_apart() -> AbstractContextManager[None]:
    return started_on(_halves()[0])


def _clients_apart() -> AbstractContextManager[None]:
    return started_on(_halves()[1])


def _names(batch: int) -> list[str]:
    return [f"bench/bare/{batch}-{index}" for index in range(BATCH)]


def _pooled(lanes: int, put: Callable[[str, bytes], Any], get: Callable[[str], Any]) -> _Sides:
    """A client used bare, ``lanes`` calls at a time."""
    content, pool = np.random.default_rng(1).bytes(MIB), ThreadPoolExecutor(lanes)

    def write(batch: int) -> None:
        list(pool.map(lambda name: put(name, content), _names(batch)))

    def read(batch: int) -> None:
        assert all(len(found) == MIB for found in pool.map(get, _names(batch)))

    return _Sides(write, read)


def _bare_objects(ours: _Ours) -> _Sides:
    import obstore

    assert isinstance(ours.store, ObjectsStore)
    store = ours.store.client
    return _pooled(
        OBJECT_LANES,
        lambda name, content: obstore.put(store, name, content, use_multipart=False),
        lambda name: obstore.get(store, name).bytes(),
    )


@contextmanager
def _directory(folder: Path) -> Iterator[tuple[_Sides, _Sides]]:
    with _clients_apart(), _ours(f"dir:{folder}/directory") as ours:
        yield ours, _bare_objects(ours)


@contextmanager
def _s3(folder: Path) -> Iterator[tuple[_Sides, _Sides]]:
    with (
        _servers_apart(),
        s3_server(folder / "s3") as port,
        _clients_apart(),
        _ours("s3://bkt/kv", s3_options(port)) as ours,
    ):
        yield ours, _bare_objects(ours)


@contextmanager
def _valkey(folder: Path) -> Iterator[tuple[_Sides, _Sides]]:
    with (
        _servers_apart(),
        redis_server() as port,
        _clients_apart(),
        _ours(f"valkey://127.0.0.1:{port}") as ours,
    ):
        assert isinstance(ours.store, ValkeyStore)
        client = ours.store.client
        yield ours, _pooled(VALKEY_LANES, client.set, client.get)


@contextmanager
def _mooncake(folder: Path) -> Iterator[tuple[_Sides, _Sides]]:
    """The values lie in another process's memory, as on another machine."""
    with (
        _servers_apart(),
        mooncake_master(lease_ms=LEASE_MS) as port,
        mooncake_holder(port, SEGMENT_BYTES),
        _clients_apart(),
        _ours(f"mooncake://127.0.0.1:{port}") as ours,
    ):
        yield ours, _bare_mooncake(ours)


def _bare_mooncake(ours: _Ours) -> _Sides:
    client: Any = ours.store.client  # type: ignore[attr-defined]
    memory = np.zeros((2, BATCH, MIB), np.uint8)
    memory[0] = np.random.default_rng(1).integers(0, 256, (BATCH, MIB))
    assert not client.register_buffer(memory.ctypes.data, memory.nbytes)
    addresses = [[int(memory[way, i].ctypes.data) for i in range(BATCH)] for way in (0, 1)]

    def move(method: str, of: Sequence[int]) -> Batch:
        def call(batch: int) -> None:
            assert memory.size, "what is registered must stay"
            codes = getattr(client, method)(_names(batch), of, [MIB] * BATCH)
            assert all(code >= 0 for code in codes), codes

        return call

    return _Sides(move("batch_put_from", addresses[0]), move("batch_get_into", addresses[1]))
