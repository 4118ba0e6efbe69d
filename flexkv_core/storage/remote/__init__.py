"""Stores that several machines share. Each is imported when it is used: none of their libraries is needed otherwise."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple, cast

from flexkv_core.errors import ConfigError
from flexkv_core.storage.remote.base import Bytes, RemoteSpec, RemoteStore, StoreFactory

ENTRY_POINTS = "flexkv.remote_stores"


class _Known(NamedTuple):
    module: str  # of this package
    name: str  # of the class
    library: str  # what it imports
    distribution: str  # what brings that


_OBJECTS = _Known("objects", "ObjectsStore", "obstore", "obstore")
_VALKEY = _Known("valkey", "ValkeyStore", "valkey", "valkey[libvalkey]")
_MOONCAKE = _Known("mooncake", "MooncakeStore", "mooncake", "mooncake-transfer-engine")
STORES = {
    **dict.fromkeys(("dir", "memory", "s3", "gs", "az"), _OBJECTS),
    **dict.fromkeys(("valkey", "valkeys", "redis", "rediss"), _VALKEY),
    "mooncake": _MOONCAKE,
}
"""By the URL's scheme."""


def check_available(scheme: str) -> None:
    """Refuse a store that is not known, or whose library is missing.

    Raises:
        ConfigError: with what is known, or what to install.
    """
    known = STORES.get(scheme)
    if known is None:
        if not _entry_points(scheme):
            schemes = ", ".join([*STORES, *(point.name for point in _entry_points())])
            raise ConfigError(f"remote_url: no such store {scheme!r}; known are {schemes}")
    elif importlib.util.find_spec(known.library) is None:
        raise ConfigError(
            f"remote_url: {scheme}: needs the package {known.distribution}, which is not installed; "
            "install flexkv[remote]"
        )


def check_usable(spec: RemoteSpec) -> None:
    """Refuse what no store will make right: makes the client here, which connects to nothing, and ends it.

    Raises:
        ConfigError: as :func:`open_store`.
    """
    open_store(spec, []).close()


def client_environment(spec: RemoteSpec) -> dict[str, str]:
    """What a store's library takes from the environment alone, for the process that uses it."""
    if spec.scheme != "mooncake":
        return {}
    milliseconds = str(int(spec.timeout_s * 1000))
    return {
        "MC_TCP_BIND_ADDRESS": spec.options.get("hostname", "127.0.0.1"),
        "MC_RPC_TIMEOUT_MS": milliseconds,
        "MC_RPC_CONNECT_TIMEOUT_MS": milliseconds,
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",
    }


def open_store(spec: RemoteSpec, regions: Sequence[Bytes]) -> RemoteStore:
    """The store that ``spec`` names; see :class:`RemoteStore`.

    Raises:
        ConfigError: it is not known, its library is missing, or a setting cannot be used.
    """
    check_available(spec.scheme)
    known = STORES.get(spec.scheme)
    if known is None:
        factory = cast(StoreFactory, _entry_points(spec.scheme)[0].load())
    else:
        module = importlib.import_module(f"{__name__}.{known.module}")
        factory = cast(StoreFactory, getattr(module, known.name))
    return factory(spec, regions)


def _entry_points(scheme: str | None = None) -> list[importlib.metadata.EntryPoint]:
    """Stores of other distributions."""
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return [point for point in points if scheme is None or point.name == scheme]
