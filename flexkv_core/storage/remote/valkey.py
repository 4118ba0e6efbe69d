"""Valkey and Redis, through valkey-py with libvalkey's parser.

One value is one string. It is written in one SET, and read with GETRANGE up to one byte beyond its length, so that no value makes this
process take more memory than it should have. Values of a mebibyte go one by one over a few connections: a pipeline keeps all of a batch
in memory twice and was half as fast on loopback (0.5 against 1.1 GB/s, 16 values). They go between the socket and where they lie, see
``valkey_wire.py``; in a cluster, whose nodes may send one elsewhere, by way of valkey-py.

``remote_options``: ``cluster`` ("true": the URL names one node of a cluster), ``expire_s`` (values live this long; without it the server's
``maxmemory-policy`` decides what leaves). Passwords come from ``remote_password_file`` only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import valkey
from valkey.backoff import NoBackoff
from valkey.cluster import ValkeyCluster
from valkey.credentials import CredentialProvider
from valkey.exceptions import ValkeyError
from valkey.retry import Retry

from flexkv_core.errors import ConfigError
from flexkv_core.storage.base import BlockStatus, Statuses
from flexkv_core.storage.remote.base import Bytes, RemoteSpec, RemoteStore, Value, statuses_of
from flexkv_core.storage.remote.lanes import Lanes
from flexkv_core.storage.remote.report import Reporter
from flexkv_core.storage.remote.valkey_wire import read_in_place, write_in_place
from flexkv_core.storage.remote.values import Joiner, split_into

LANES = 4
"""Connections that move values: two fill a loopback, four hide a millisecond of network."""
_OPTIONS = ("cluster", "expire_s", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


class _Password(CredentialProvider):
    """Reads the file at each connection, so that a password can change."""

    def __init__(self, username: str | None, file: str) -> None:
        self._username = username
        self._file = Path(file)

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        password = self._file.read_text(encoding="utf-8").strip()
        return (password,) if self._username is None else (self._username, password)


class ValkeyStore(RemoteStore):
    """See the contract."""

    probes_max: ClassVar[int] = 64

    def __init__(self, spec: RemoteSpec, regions: Sequence[Bytes]) -> None:
        self._make_client = _client_of(spec)
        self._is_cluster = _is_cluster(spec)
        self._expire_s = _positive_int(spec.options, "expire_s")
        self._lanes = Lanes(LANES, "flexkv-valkey")
        self._joiner = Joiner()
        self._report = Reporter(spec.url)
        self._client: Any = None

    def exists(self, names: Sequence[str], deadline: float) -> Statuses:
        """See the contract."""
        try:
            pipeline = self.client.pipeline(transaction=False)
            for name in names:
                pipeline.exists(name)
            there = pipeline.execute()
        except (ValkeyError, OSError) as error:
            self._report.failed(error)
            return statuses_of(len(names), BlockStatus.IO_ERROR)
        statuses = statuses_of(len(names), BlockStatus.DROPPED)
        statuses[[bool(found) for found in there]] = BlockStatus.OK
        return statuses

    def read(self, names: Sequence[str], values: Sequence[Value], deadline: float) -> Statuses:
        """See the contract."""

        def get(index: int) -> BlockStatus:
            name, value = names[index], values[index]
            if not self._is_cluster:
                return read_in_place(self.client.connection_pool, name, value, deadline)
            found = self.client.getrange(name, 0, value.size)  # a node may say that another one has it
            return split_into(found, value) if found else BlockStatus.DROPPED

        return self._each(get, len(names), deadline)

    def write(self, names: Sequence[str], values: Sequence[Value], deadline: float) -> Statuses:
        """See the contract."""

        def put(index: int) -> BlockStatus:
            name, value = names[index], values[index]
            if not self._is_cluster:
                return write_in_place(self.client.connection_pool, name, value, self._expire_s)
            done = self.client.set(name, self._joiner.joined(value), ex=self._expire_s)
            return BlockStatus.OK if done else BlockStatus.IO_ERROR

        return self._each(put, len(names), deadline)

    def delete(self, names: Sequence[str], deadline: float) -> None:
        """See the contract."""

        def delete(index: int) -> BlockStatus:
            self.client.delete(names[index])
            return BlockStatus.OK

        self._each(delete, len(names), deadline)

    def close(self) -> None:
        """See the contract."""
        self._lanes.close()
        if self._client is not None:
            self._client.close()

    @property
    def client(self) -> Any:
        """valkey-py's; a cluster's asks for its nodes when it is made, which fails while none answers."""
        if self._client is None:
            self._client = self._make_client()
        return self._client

    def _each(self, call: Callable[[int], BlockStatus], count: int, deadline: float) -> Statuses:
        def guarded(index: int) -> BlockStatus:
            try:
                return call(index)
            except (ValkeyError, OSError) as error:
                self._report.failed(error)
                return BlockStatus.IO_ERROR

        return self._lanes.each(guarded, count, deadline)


def _client_of(spec: RemoteSpec) -> Callable[[], Any]:
    """Makes a client that never retries: that is the breaker's business."""
    unknown = spec.options.keys() - set(_OPTIONS)
    if unknown:
        raise ConfigError(
            f"remote_options: {sorted(unknown)}: no such options of a Valkey store; known are {', '.join(_OPTIONS)}"
        )
    url = urlsplit(spec.url)
    try:
        host, port, database = url.hostname or "localhost", url.port or 6379, int(url.path.strip("/") or 0)
    except ValueError as error:
        raise ConfigError(f"remote_url = {spec.url!r}: {error}") from error
    settings: dict[str, Any] = {
        "host": host,
        "port": port,
        "socket_timeout": spec.timeout_s,
        "socket_connect_timeout": spec.timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "ssl": url.scheme in ("valkeys", "rediss"),
        **{key: value for key, value in spec.options.items() if key.startswith("ssl_")},
    }
    if spec.password_file is not None:
        settings["credential_provider"] = _Password(spec.username, spec.password_file)
    if _is_cluster(spec):
        return lambda: ValkeyCluster(**settings, cluster_error_retry_attempts=0)
    return lambda: valkey.Valkey(**settings, db=database)


def _is_cluster(spec: RemoteSpec) -> bool:
    return spec.options.get("cluster", "false") == "true"


def _positive_int(options: dict[str, str], key: str) -> int | None:
    text = options.get(key)
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"remote_options: {key} = {text!r}; an integer ≥ 1 is needed")
    return int(text)
