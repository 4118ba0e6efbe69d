"""``FlexKVRadixCache``: SGLang's own radix cache with FlexKV behind it, for the versions that have no linker to plug into.

SGLang asks it as it asks its own hierarchical cache: a match tells how many tokens more could be loaded, an admitted request has them
loaded into slots that it gets, and what was computed is handed to the tree. Matching on the device, eviction and locks stay SGLang's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixCache

from flexkv_core.config import load_config
from flexkv_core.weights import weights_identity
from flexkv_sglang.compat import hooks
from flexkv_sglang.compat.engine import engine_of
from flexkv_sglang.compat.request import is_cacheable
from flexkv_sglang.compat.tree import (
    components_of,
    key_of,
    matched_slots,
    matched_tokens,
    prefix_tokens,
    request_id,
    slots_in_tree,
    told_as_loaded,
)
from flexkv_sglang.driver import Driver, open_side
from flexkv_sglang.layout import check_supported
from flexkv_sglang.scheduler_side import Held
from flexkv_sglang.shares import config_of_rank

if TYPE_CHECKING:
    from sglang.srt.disaggregation.kv_events import KVCacheEvent
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

hooks.install_for_radix_cache()


class FlexKVRadixCache(Driver, RadixCache):
    """Made once in each scheduler's process; see SGLang's base classes for what they ask. All methods run on the scheduler's thread.

    Raises:
        ConfigError: a setting, or a model that cannot be served right; SGLang's start fails with its message.
        CapacityError: the machine cannot give the host tier's memory.
    """

    _is_open = False  # SGLang's constructor resets the tree

    def __init__(self, context: TreeCacheBuildContext) -> None:
        params = context.params
        engine = engine_of(context.server_args, params, components_of(context), context.tp_worker)
        path = getattr(context.server_args, "flexkv_config_file", None)
        config = config_of_rank(load_config(path=path), engine)
        check_supported(engine, config)
        super().__init__(params)
        self._tp_size = engine.tp_size
        self._group = params.attn_tp_cache_group or params.tp_cache_group
        self._lora_weights = {
            lora_id: weights_identity(path, None) or "" for lora_id, path in engine.lora_paths
        }
        stream = getattr(context.tp_worker.model_runner, "forward_stream", None)
        self._side, self._metrics = open_side(engine, config, params, self.agree, stream)
        self._is_open = True

    def smallest(self, values: torch.Tensor) -> None:
        """See :class:`Driver`."""
        if self._tp_size > 1:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN, group=self._group)

    # A request's way in

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """SGLang's match; with a request also what FlexKV could add, as ``host_hit_length``."""
        found = super().match_prefix(params)
        req, device_tokens = params.req, matched_tokens(found)
        if self.disable or req is None or device_tokens >= len(params.key) or not is_cacheable(req):
            return found
        gain = self._side.matched_tokens(self.view(req), len(params.key), device_tokens)
        return found._replace(host_hit_length=gain) if gain else found

    def init_load_back(self, params: InitLoadBackParams) -> tuple[torch.Tensor | int, Any]:
        """Load all that the match promised, and hand it to the tree; nothing where it does not arrive whole.

        Returns what was loaded in the version's terms, and the node where it ends.
        """
        node = params.best_match_node
        self.inc_lock_ref(node)  # an eviction for the new slots must not take what they follow
        try:
            slots, end = self._load(params.req, params.host_hit_length, node)
        finally:
            self.dec_lock_ref(node)
        return told_as_loaded(slots), end

    def _load(self, req: Req, gain: int, node: Any) -> tuple[torch.Tensor, Any]:
        """The slots of ``gain`` tokens behind ``node``, int64, filled, and the node where they end; else none and ``node``."""
        tokens = req.full_untruncated_fill_ids
        device = matched_slots(self, self._on_device(req, tokens))
        first, nothing = prefix_tokens(req), device[:0]
        if not gain or len(device) != first:  # the tree has changed since the match
            return nothing, node
        slots = self._allocate(gain)
        if slots is None:
            return nothing, node
        if not self._side.load(req.rid, slots.cpu().numpy()):
            self.token_to_kv_pool_allocator.free(slots)
            return nothing, node
        key = key_of(req, tokens[: first + gain])
        self.insert(InsertParams(key=key, value=torch.cat([device, slots])))
        return slots, super().match_prefix(MatchPrefixParams(key=key)).last_device_node

    def _allocate(self, tokens: int) -> torch.Tensor | None:
        allocator = self.token_to_kv_pool_allocator
        missing = tokens - allocator.available_size()
        if missing > 0:
            self.evict(EvictParams(num_tokens=missing))
        slots = allocator.alloc(tokens)
        return None if slots is None else slots.to(torch.int64)

    # A request's way out

    def cache_unfinished_req(self, req: Req, *arguments: Any, **options: Any) -> None:
        """SGLang's, then a store of what the tree now holds of the request. Until 0.5.21."""
        super().cache_unfinished_req(req, *arguments, **options)
        self._store_unfinished(req)

    def cache_finished_req(self, req: Req, is_insert: bool = True, **options: Any) -> None:
        """The same for a request that has ended, whose state ends here. Until 0.5.20."""
        super().cache_finished_req(req, is_insert=is_insert, **options)
        if is_insert:
            self._store_finished(req)
        self._side.forget(req.rid)

    def insert_req(self, req: Req, *, up_to: int) -> None:
        """The first half of that in 0.5.21."""
        super().insert_req(req, up_to=up_to)
        self._store_finished(req)

    def checkpoint(self, req: Req, *, up_to: int) -> None:
        """Both in 0.5.22."""
        super().checkpoint(req, up_to=up_to)
        self._store_unfinished(req)

    def on_release(self, req: Req, **how: Any) -> None:
        """The second half since 0.5.21: the request has ended, or gives up its place."""
        super().on_release(req, **how)
        self._side.forget(req.rid)

    def _store_unfinished(self, req: Req) -> None:
        """Store what the request holds a lock on."""
        if not self.disable and is_cacheable(req):
            self._store(req, req.full_untruncated_fill_ids, slots_in_tree(self, req), req.last_node)

    def _store_finished(self, req: Req) -> None:
        """Store what the tree holds of it; a lock there is none any more."""
        if not self.disable and is_cacheable(req):
            tokens = req.origin_input_ids + req.output_ids
            found = self._on_device(req, tokens)
            self._store(req, tokens, matched_slots(self, found), found.last_device_node)

    def _on_device(self, req: Req, tokens: Sequence[int]) -> MatchResult:
        return super().match_prefix(MatchPrefixParams(key=key_of(req, tokens)))

    def _store(self, req: Req, tokens: Sequence[int], slots: torch.Tensor, node: Any) -> None:
        """Store the request's tokens of which the tree holds ``slots``, int64 [tokens], up to ``node``."""

        def hold() -> Held:
            self.inc_lock_ref(node)
            return Held(slots.cpu().numpy(), lambda: self.dec_lock_ref(node))

        view = replace(self.view(req), tokens=tokens)
        self._side.store(view, min(len(slots), len(tokens)), len(req.origin_input_ids), hold)

    def release_aborted_request(self, handle: Any) -> None:
        """The request will not run."""
        self._side.forget(request_id(handle))

    # Life

    def round_begins(self) -> None:
        """See :class:`Driver`: unlock what has been stored on every rank."""
        self._side.release_stores(self.agree(self._side.ended_stores()))
        if self._metrics is not None:
            self._metrics.update()

    def evict(self, params: EvictParams) -> EvictResult:
        """SGLang's; where that is too little, again without the locks of stores, which are waited for."""
        result = super().evict(params)
        missing = params.num_tokens - result.num_tokens_evicted
        if self.disable or missing <= 0 or not self.make_room():
            return result
        more = super().evict(replace(params, num_tokens=missing))
        return replace(result, num_tokens_evicted=result.num_tokens_evicted + more.num_tokens_evicted)

    def take_events(self) -> list[KVCacheEvent]:
        """SGLang's KV events and those of FlexKV's tiers."""
        return [*super().take_events(), *self._side.take_events()]

    def reset(self) -> None:
        """Empty the tree; what is cached behind it stays."""
        if self._is_open:
            self._side.reset()
        super().reset()

    def shutdown(self) -> None:
        """Give the memory back."""
        self._side.close()
