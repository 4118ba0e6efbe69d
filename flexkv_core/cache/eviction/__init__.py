"""Eviction policies by name. A new one is one file, one line here and one parameter of its contract suite."""

from __future__ import annotations

from collections.abc import Callable

from flexkv_core.cache.eviction.base import EvictionPolicy
from flexkv_core.cache.eviction.lru import LRUPolicy
from flexkv_core.errors import ConfigError

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRUPolicy}


def make_policy(name: str) -> EvictionPolicy:
    """A new, empty policy. ConfigError names what is allowed."""
    try:
        return POLICIES[name]()
    except KeyError:
        raise ConfigError(f"eviction={name!r} is unknown; allowed: {', '.join(sorted(POLICIES))}") from None


__all__ = ["POLICIES", "EvictionPolicy", "make_policy"]
