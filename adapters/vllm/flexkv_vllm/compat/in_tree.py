"""vLLM's own class ``FlexKVConnectorV1`` (0.18 and later): whose package is behind it, and the hooks that it does not forward.

Why: the class passes the hooks of the version that it was written for to ``flexkv.integration.vllm.vllm_v1_adapter.FlexKVConnectorV1Impl``.
``reset_cache``, ``handle_preemptions``, ``build_connector_worker_meta``, ``on_new_request``, the metrics and the hybrid interface stay with
vLLM's defaults, and the KV cache's configuration is not handed over. Without the results of the workers a block could never be published.
So our plugin registers, under the same name, a subclass that passes on all that our connector has. No upstream issue that we know of.
When it can go: as soon as the in-tree class forwards those hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkv_core.errors import ConfigError
from flexkv_core.module_owner import Owner, owner_of

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

NAME = "FlexKVConnectorV1"
"""What a user writes as ``kv_connector``."""

_DOOR = Path("integration", "vllm", "vllm_v1_adapter.py")
_OURS = "from flexkv_vllm."
_BOTH = ("bind_connector_metadata", "clear_connector_metadata")
"""Hooks for which the in-tree object keeps something itself, as vLLM's base class does."""

_handed: ContextVar[KVCacheConfig | None] = ContextVar("kv_cache_config", default=None)


def owner() -> tuple[Owner, Path | None]:
    """Whose module ``flexkv`` is, and where it lies."""
    return owner_of(_DOOR, _OURS)


def install() -> None:
    """Complete the in-tree class where it leads to us, register our connector under its name where vLLM has no such class, and leave
    another distribution's alone. A second call does nothing."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if owner()[0] is not Owner.OURS:
        return
    registry = KVConnectorFactory._registry
    load = registry.get(NAME)
    if load is None:
        KVConnectorFactory.register_connector(NAME, "flexkv_vllm.connector", "FlexKVConnector")
    elif not hasattr(load, "cache_info"):
        registry[NAME] = functools.cache(lambda: complete(load()))


def complete(in_tree: type) -> type:
    """A subclass of vLLM's class ``in_tree`` with all hooks that our connector has and ``in_tree`` does not forward."""
    from flexkv_vllm.connector import FlexKVConnector

    def __init__(self: Any, vllm_config: Any, role: Any, kv_cache_config: KVCacheConfig) -> None:
        token = _handed.set(kv_cache_config)
        try:
            in_tree.__init__(self, vllm_config, role, kv_cache_config)  # type: ignore[misc]
        finally:
            _handed.reset(token)

    members: dict[str, Any] = {"__init__": __init__, "__doc__": in_tree.__doc__, "__module__": __name__}
    members |= {name: _both(in_tree, name) for name in _BOTH}
    members |= {name: _passed_on(name, member) for name, member in missing_hooks(in_tree)}
    interfaces = [base for base in FlexKVConnector.__bases__ if not issubclass(in_tree, base)]
    return type(in_tree)(in_tree.__name__, (in_tree, *interfaces), members)


def missing_hooks(in_tree: type) -> Iterator[tuple[str, Any]]:
    """What our connector defines of vLLM's interface and ``in_tree`` does not, as it stands in the class."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    from flexkv_vllm.connector import FlexKVConnector

    bases = [base for base in FlexKVConnector.__mro__ if base not in KVConnectorBase_V1.__mro__]
    known = {name for base in (KVConnectorBase_V1, *FlexKVConnector.__bases__) for name in dir(base)}
    members = {name: member for base in reversed(bases) for name, member in vars(base).items()}
    for name, member in members.items():
        if not name.startswith("__") and name in known and name not in vars(in_tree) and name not in _BOTH:
            yield name, member


def handed_over() -> KVCacheConfig:
    """The KV cache's configuration of the connector that is being made.

    Raises:
        ConfigError: vLLM's own class is at work alone, which cannot serve.
    """
    config = _handed.get()
    if config is None:
        raise ConfigError(
            f"{NAME}: vLLM's plugin `flexkv` is not loaded, without which that class cannot pass on all hooks; add flexkv to VLLM_PLUGINS"
            ' (or unset it), or use {"kv_connector":"FlexKVConnector","kv_connector_module_path":"flexkv_vllm.connector"}'
        )
    return config


def _passed_on(name: str, member: Any) -> Any:
    """``member`` of our connector as one of the in-tree class, which keeps ours as ``_flexkv_connector``."""
    from flexkv_vllm.connector import FlexKVConnector

    if isinstance(member, classmethod):
        ours: Callable[..., Any] = getattr(FlexKVConnector, name)
        return classmethod(lambda cls, *arguments, **named: ours(*arguments, **named))
    if isinstance(member, property):
        return property(lambda self: getattr(self._flexkv_connector, name))
    if callable(member):
        return lambda self, *arguments, **named: getattr(self._flexkv_connector, name)(*arguments, **named)
    return member


def _both(in_tree: type, name: str) -> Callable[..., None]:
    def hook(self: Any, *arguments: Any) -> None:
        getattr(in_tree, name)(self, *arguments)
        getattr(self._flexkv_connector, name)(*arguments)

    return hook
