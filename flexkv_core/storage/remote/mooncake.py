"""Mooncake Store: the memory of many machines as one, over TCP or RDMA, with a master that knows what lies where.

The client reads straight into the host tier and writes straight from it: both are registered with it. A machine that only uses the store
lends it no memory; with ``segment_bytes`` it lends so much, and other machines' values live in its remote process and are lost with it.

``remote_url``: ``mooncake://<master's host>:<port>``. ``remote_options``: ``protocol`` (tcp, rdma), ``devices`` (of RDMA), ``hostname`` (this machine's
address as others see it; the default, 127.0.0.1, serves one machine), ``segment_bytes``, ``replicas``, ``metadata`` (default
P2PHANDSHAKE, which needs no further server). Data ports listen on ``hostname`` alone. The library's own handshake port listens on all
addresses, and has no setting for it: keep it behind a firewall.

A master that is away makes the client's set-up take 90 s, so its port is tried first.

Over TCP a caller of the library turns in a circle until all bytes are there, while one thread of the library moves them. Where the two share a
core, half of it is lost to the waiting: 16 values of 1 MiB took 17.9 ms so, and 12.5 ms with callers of less weight. So calls that move
bytes are made on threads of their own, which give way.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np

from flexkv_core.errors import ConfigError, StorageError
from flexkv_core.storage.base import BlockStatus, Statuses
from flexkv_core.storage.remote.base import Bytes, RemoteSpec, RemoteStore, Value, statuses_of
from flexkv_core.storage.remote.report import Reporter

_OPTIONS = ("protocol", "devices", "hostname", "segment_bytes", "replicas", "metadata")
_BUFFER_BYTES = 16 << 20  # the client's own, for calls that are not used here
_NOT_FOUND = -704
_OTHER_LENGTH = (
    -600,
    -800,
)  # longer and shorter than the memory that was given; -800 is also a holder that has died
_MOVING = ("batch_get_into_multi_buffers", "batch_put_from_multi_buffers")
_MOVERS_MAX = 8  # calls that move bytes at a time
_MOVERS_NICE = 10  # a tenth of the weight of the thread that they wait for; enough to be served on a machine that is busy
_FORCED = True  # removes what somebody reads just now, too: what is removed is wrong


class MooncakeStore(RemoteStore):
    """See the contract."""

    probes_max: ClassVar[int] = 1024  # 1 to 4 us a name in one call

    def __init__(self, spec: RemoteSpec, regions: Sequence[Bytes]) -> None:
        unknown = spec.options.keys() - set(_OPTIONS)
        if unknown:
            raise ConfigError(
                f"remote_options: {sorted(unknown)}: no such options of Mooncake; known are {', '.join(_OPTIONS)}"
            )
        url = urlsplit(spec.url)
        if not url.hostname or not url.port:
            raise ConfigError(f"remote_url = {spec.url!r}: mooncake://<master's host>:<port> is needed")
        self._master = (url.hostname, url.port)
        self._spec = spec
        self._regions = list(regions)
        self._replicas = _integer(spec.options, "replicas", 1)
        self._segment_bytes = _integer(spec.options, "segment_bytes", 0)
        self._report = Reporter(spec.url)
        self._connecting = threading.Lock()
        self._client: Any = None
        self._movers = ThreadPoolExecutor(_MOVERS_MAX, "flexkv-mooncake", initializer=_give_way)

    def exists(self, names: Sequence[str], deadline: float) -> Statuses:
        """See the contract."""
        codes = self._call("batch_is_exist", names)
        if codes is None:
            return statuses_of(len(names), BlockStatus.IO_ERROR)
        found = np.array(codes)
        statuses = np.where(found == 0, BlockStatus.DROPPED, BlockStatus.IO_ERROR)
        return np.where(found == 1, BlockStatus.OK, statuses).astype(np.uint32)

    def read(self, names: Sequence[str], values: Sequence[Value], deadline: float) -> Statuses:
        """See the contract."""
        codes = self._call("batch_get_into_multi_buffers", names, *_places(values))
        if codes is None:
            return statuses_of(len(names), BlockStatus.IO_ERROR)
        sizes = [value.size for value in values]
        return np.array([_read_status(*pair) for pair in zip(codes, sizes, strict=True)], np.uint32)

    def write(self, names: Sequence[str], values: Sequence[Value], deadline: float) -> Statuses:
        """See the contract. A value that is there already is left as it is, as Mooncake does: names are of contents."""
        codes = self._call("batch_put_from_multi_buffers", names, *_places(values))
        if codes is None:
            return statuses_of(len(names), BlockStatus.IO_ERROR)
        failed = [code for code in codes if code < 0]
        if failed:
            self._report.failed(f"{len(failed)} values were not written (code {failed[0]})")
        return np.array([BlockStatus.IO_ERROR if code < 0 else BlockStatus.OK for code in codes], np.uint32)

    def delete(self, names: Sequence[str], deadline: float) -> None:
        """See the contract."""
        self._call("batch_remove", names, _FORCED)

    def close(self) -> None:
        """See the contract."""
        self._movers.shutdown()
        if self._client is not None:
            self._client.close()

    def _call(self, method: str, names: Sequence[str], *more: Any) -> list[int] | None:
        """What the client answers, a number a name; None when there is no client, or its master is away."""
        try:
            client = self.client  # made on this thread: threads that the library starts inherit its weight
        except (OSError, StorageError) as error:
            self._report.failed(error)
            return None
        if method == "batch_put_from_multi_buffers":
            more = (*more, self._placement)
        call = partial(getattr(client, method), list(names), *more)
        # Waits for the bytes as long as it takes: until then the library uses the memory.
        codes = list(self._movers.submit(call).result() if method in _MOVING else call())
        if codes and all(code == _MASTER_AWAY for code in codes):
            self._report.failed(f"{method}: the master does not answer")
        return codes

    @property
    def client(self) -> Any:
        """Mooncake's. Raises OSError or StorageError when there is none to be had."""
        with self._connecting:
            if self._client is None:
                socket.create_connection(self._master, self._spec.timeout_s).close()
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        # Imported when it is used: the library starts threads, and reads its settings from the environment.
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig

        options, client = self._spec.options, MooncakeDistributedStore()
        code = client.setup(
            options.get("hostname", "127.0.0.1"),
            options.get("metadata", "P2PHANDSHAKE"),
            self._segment_bytes,
            _BUFFER_BYTES,
            options.get("protocol", "tcp"),
            options.get("devices", ""),
            f"{self._master[0]}:{self._master[1]}",
        )
        if code:
            raise StorageError(f"the client cannot be set up (code {code})")
        for region in self._regions:
            if code := client.register_buffer(region.ctypes.data, region.nbytes):
                raise StorageError(f"{region.nbytes} bytes cannot be registered (code {code})")
        self._placement = ReplicateConfig()
        self._placement.replica_num = self._replicas
        return client


_MASTER_AWAY = -900


def _give_way() -> None:
    """On Linux this is of the calling thread alone."""
    os.nice(_MOVERS_NICE)


def _places(values: Sequence[Value]) -> tuple[list[list[int]], list[list[int]]]:
    """Addresses and sizes of the two parts of each value."""
    addresses = [[value.header.ctypes.data, value.payload.ctypes.data] for value in values]
    return addresses, [[len(value.header), len(value.payload)] for value in values]


def _read_status(code: int, size: int) -> BlockStatus:
    if code == size:
        return BlockStatus.OK
    if code == _NOT_FOUND:
        return BlockStatus.DROPPED
    return BlockStatus.CORRUPT if code in _OTHER_LENGTH or code >= 0 else BlockStatus.IO_ERROR


def _integer(options: dict[str, str], key: str, default: int) -> int:
    text = options.get(key, str(default))
    if not text.isdigit():
        raise ConfigError(f"remote_options: {key} = {text!r}; an integer is needed")
    return int(text)
