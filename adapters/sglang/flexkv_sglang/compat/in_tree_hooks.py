"""Hooks on SGLang's in-tree ``FlexKVRadixCache``, which hands FlexKV tokens and nothing else of a request.

Without them two tenants with the same tokens would share blocks. Upstream ignores salts here in all versions up to 0.5.23; the hooks go
when it passes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

from flexkv_core.keys import namespace_root

_CACHE = "sglang.srt.mem_cache.storage.flexkv.flexkv_radix_cache.FlexKVRadixCache"
_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_STORES_IN = ("checkpoint", "insert_req", "cache_finished_req")
"""Where SGLang's class stores a request: since 0.5.22, in 0.5.21, and before."""
_namespace: ContextVar[tuple[str, ...] | None] = ContextVar("flexkv_namespace", default=None)
_is_paused: ContextVar[bool] = ContextVar("flexkv_is_paused", default=False)


def current_namespace() -> tuple[str, ...] | None:
    """What separates the request that the cache works on from others with its tokens; None where that is not known."""
    return None if _is_paused.get() else _namespace.get()


def install(managers: Callable[[], Iterable[Any]]) -> None:
    """Put the hooks in; a second call does nothing. ``managers`` gives those whose roots change with the weights."""
    from sglang.srt.mem_cache.radix_cache import RadixCache
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if hasattr(install, "done"):
        return
    install.done = True  # type: ignore[attr-defined]

    def reset(result: None, cache: Any) -> None:
        if _is_paused.get():
            for manager in managers():
                manager.root = namespace_root(manager.root, ("weights", uuid4().hex))
            _is_paused.set(False)

    stores_in = next(name for name in _STORES_IN if hasattr(RadixCache, name))
    for target, hook, kind in (
        (f"{_CACHE}.match_prefix", _match_prefix, HookType.AROUND),
        (f"{_CACHE}.{stores_in}", _store, HookType.AROUND),
        (f"{_CACHE}.reset", reset, HookType.AFTER),
        (f"{_WEIGHTS}._observe_weight_load", _observe_weight_load, HookType.BEFORE),
    ):
        HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()


def _match_prefix(original: Callable[..., Any], cache: Any, params: Any) -> Any:
    key = params.key
    return _within(_parts(key), lambda: original(cache, params))


def _store(original: Callable[..., Any], cache: Any, req: Any, *arguments: Any, **options: Any) -> Any:
    return _within(_parts(req), lambda: original(cache, req, *arguments, **options))


def _observe_weight_load(updater: Any, source: str) -> None:
    _is_paused.set(True)


def _parts(named: Any) -> tuple[str, ...]:
    """What a request or its key in the tree says; older versions put the salt into ``extra_key``."""
    extra_key, salt = named.extra_key, getattr(named, "cache_salt", None)
    return (*(("extra", extra_key) if extra_key else ()), *(("salt", salt) if salt else ()))


def _within(namespace: tuple[str, ...], call: Callable[[], Any]) -> Any:
    token = _namespace.set(namespace)
    try:
        return call()
    finally:
        _namespace.reset(token)
