"""Object stores through obstore: S3 and what speaks its protocol, Google's, Azure's, a local directory, memory.

One value is one object. Packing several into one would save requests (measured: sixteen values of 256 KiB took 3-5 times as long as one
of 4 MiB on a local server) and would need an index that all machines keep up to date; a larger ``tokens_per_block`` has the same effect
without one. obstore was chosen over opendal on the same servers: equal on S3 within the noise, 2-3 times as fast on a local
directory, and it takes any buffer, so that writing copies nothing in Python.

Credentials come from obstore's own chain (environment, instance metadata, profiles), never from FlexKV's configuration. Objects that nobody
reads any more are the bucket's lifecycle rules' to remove.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from flexkv_core.errors import ConfigError
from flexkv_core.storage.base import BlockStatus, Statuses
from flexkv_core.storage.remote.base import Bytes, RemoteSpec, RemoteStore, Value
from flexkv_core.storage.remote.lanes import Lanes
from flexkv_core.storage.remote.report import Reporter
from flexkv_core.storage.remote.values import split_into

LANES = 16
"""Requests under way at a time: enough for 1 GB/s at 20 ms a request of 1 MiB."""
_CLIENT_OPTIONS = ("allow_http", "allow_invalid_certificates", "http1_only", "http2_only", "proxy_url")
_SECRET_WORDS = ("secret", "token", "password", "access_key", "account_key", "service_account_key")


class ObjectsStore(RemoteStore):
    """See the contract."""

    probes_max: ClassVar[int] = LANES

    def __init__(self, spec: RemoteSpec, regions: Sequence[Bytes]) -> None:
        self.client = _open(spec)
        self._lanes = Lanes(LANES, "flexkv-objects")
        self._report = Reporter(spec.url)

    def exists(self, names: Sequence[str], deadline: float) -> Statuses:
        """See the contract."""

        def head(index: int) -> BlockStatus:
            found = obstore.head(self.client, names[index])
            return BlockStatus.OK if found["size"] else BlockStatus.DROPPED

        return self._each(head, len(names), deadline)

    def read(self, names: Sequence[str], values: Sequence[Value], deadline: float) -> Statuses:
        """See the contract."""

        def get(index: int) -> BlockStatus:
            found = obstore.get(self.client, names[index])
            # Before the body is read: what the store calls this value may be of any size.
            size = found.meta["size"]
            if size != values[index].size:
                return BlockStatus.CORRUPT if size else BlockStatus.DROPPED
            return split_into(memoryview(found.bytes()), values[index])

        return self._each(get, len(names), deadline)

    def write(self, names: Sequence[str], values: Sequence[Value], deadline: float) -> Statuses:
        """See the contract."""

        def put(index: int) -> BlockStatus:
            parts = [values[index].header.data, values[index].payload.data]
            obstore.put(self.client, names[index], parts, use_multipart=False)
            return BlockStatus.OK

        return self._each(put, len(names), deadline)

    def delete(self, names: Sequence[str], deadline: float) -> None:
        """See the contract. S3's bulk request is what obstore has; a server without it is given an empty object, which counts as none."""

        def delete(index: int) -> BlockStatus:
            try:
                obstore.delete(self.client, names[index])
            except FileNotFoundError:
                pass
            except BaseError:
                obstore.put(self.client, names[index], b"", use_multipart=False)
            return BlockStatus.OK

        self._each(delete, len(names), deadline)

    def close(self) -> None:
        """See the contract."""
        self._lanes.close()

    def _each(self, call: Any, count: int, deadline: float) -> Statuses:
        def guarded(index: int) -> BlockStatus:
            try:
                return BlockStatus(call(index))
            except FileNotFoundError:  # obstore's NotFoundError is one
                return BlockStatus.DROPPED
            except (BaseError, OSError, ValueError) as error:
                self._report.failed(error)
                return BlockStatus.IO_ERROR

        return self._lanes.each(guarded, count, deadline)


def _open(spec: RemoteSpec) -> ObjectStore:
    scheme, _, rest = spec.url.partition(":")
    if scheme == "memory":
        return MemoryStore()
    if scheme == "dir":
        path = Path(rest)
        if not path.is_absolute():
            raise ConfigError(f"remote_url = {spec.url!r}: dir: is followed by an absolute path")
        try:
            return LocalStore(path, mkdir=True)
        except (BaseError, OSError) as error:
            raise ConfigError(f"remote_url = {spec.url!r}: the directory cannot be used: {error}") from error
    return _open_cloud(spec)


def _open_cloud(spec: RemoteSpec) -> ObjectStore:
    for key in spec.options:
        if any(word in key.lower() for word in _SECRET_WORDS):
            raise ConfigError(
                f"remote_options: {key!r} is a credential; give it through the environment or the library's own chain"
            )
    client: dict[str, Any] = {k: v for k, v in spec.options.items() if k in _CLIENT_OPTIONS}
    timeout = timedelta(seconds=spec.timeout_s)
    client |= {"timeout": timeout, "connect_timeout": timeout}
    config = {key: value for key, value in spec.options.items() if key not in _CLIENT_OPTIONS}
    try:
        # Retries are the breaker's business: a library that retries for minutes hides what is wrong.
        retry: Any = {"max_retries": 0, "retry_timeout": timeout}
        return from_url(spec.url, client_options=client, retry_config=retry, **config)  # type: ignore[call-overload,no-any-return]
    except (BaseError, ValueError) as error:
        raise ConfigError(f"remote_url = {spec.url!r}, remote_options: {error}") from error
