"""SGLang's plugin entry point: makes FlexKV known as a radix-cache backend in every process, and has its settings checked early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

BACKEND = "flexkv-tiered"
"""What ``--radix-cache-backend`` must be to have SGLang use FlexKV."""


def register() -> None:
    """Register the backend; a second call does nothing."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if BACKEND in registered_radix_cache_backends():
        return
    register_radix_cache_backend(BACKEND, _make_cache)
    # SGLang asks a cache nothing about its settings before the weights are loaded; goes when it does.
    HookRegistry.register("sglang.srt.server_args.ServerArgs.check_server_args", _check, HookType.AFTER)


def _make_cache(context: TreeCacheBuildContext) -> Any:
    # Imported when the backend is chosen: every process of every engine loads this module.
    from flexkv_sglang.backend import make_cache

    return make_cache(context)


def _check(result: None, server_args: Any) -> None:
    from flexkv_sglang.preflight import check_before_weights

    check_before_weights(server_args)
