"""``--radix-cache-backend flexkv-tiered``: SGLang's own tree with FlexKV behind it, chosen by one flag."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexkv_sglang.compat.tree import has_linker

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext


def make_cache(context: TreeCacheBuildContext) -> Any:
    """SGLang's tree for the model with FlexKV behind it, in the way that its version has.

    Raises:
        ConfigError: a setting, or a model that cannot be served right.
        CapacityError: the machine cannot give the host tier's memory.
    """
    if has_linker():
        return _linked_tree(context)
    from flexkv_sglang.radix import FlexKVRadixCache

    return FlexKVRadixCache(context)


def _linked_tree(context: TreeCacheBuildContext) -> Any:
    """SGLang's tree, linked to FlexKV as ``--enable-unified-cache-external-linker`` would link it."""
    from sglang.srt.mem_cache.registry import create_unified_radix_cache

    from flexkv_sglang.linker import FlexKVLinker

    cache = create_unified_radix_cache(context)
    runner = context.tp_worker.model_runner
    cache.init_cache_linker(
        FlexKVLinker(
            context.server_args,
            context.params,
            components=set(cache.components),
            forward_stream=runner.forward_stream,
        )
    )
    counter = cache.linker.layer_done_counter
    context.params.token_to_kv_pool_allocator.get_kvcache().register_layer_transfer_counter(counter)
    context.tp_worker.register_hicache_layer_transfer_counter(counter)
    return cache
