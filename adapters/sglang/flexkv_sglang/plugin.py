"""SGLang's plugin entry point: makes FlexKV known as a radix-cache backend in every process of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

BACKEND = "flexkv-tiered"
"""What ``--radix-cache-backend`` must be to have SGLang use FlexKV."""


def register() -> None:
    """Register the backend; a second call does nothing."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends

    if BACKEND not in registered_radix_cache_backends():
        register_radix_cache_backend(BACKEND, _make_cache)


def _make_cache(context: TreeCacheBuildContext) -> Any:
    # Imported when the backend is chosen: every process of every engine loads this module.
    from flexkv_sglang.backend import make_cache

    return make_cache(context)
