"""``FlexKVLinker``: SGLang's interface to an outside KV store, and the part of its tree that drives it.

SGLang's own driver names a store's pages by hashes of a request's tail. FlexKV finds the longest prefix by the request's tokens, so
:class:`FlexKVLinkerWrapper` passes the request itself on; matching on the device, allocation, eviction and the rest stay SGLang's.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    ExternalCacheHitMarker,
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
    UnifiedCacheLinkerWrapper,
)

from flexkv_core.config import load_config
from flexkv_core.weights import weights_identity
from flexkv_sglang.compat import hooks
from flexkv_sglang.compat.engine import engine_of
from flexkv_sglang.compat.request import is_cacheable
from flexkv_sglang.driver import Driver, open_side
from flexkv_sglang.layout import check_supported
from flexkv_sglang.scheduler_side import Held, SchedulerSide
from flexkv_sglang.shares import config_of_rank
from flexkv_sglang.stats import PromMetrics

if TYPE_CHECKING:
    from sglang.srt.disaggregation.kv_events import KVCacheEvent
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.base_prefix_cache import MatchResult
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.hicache_storage import PoolTransfer
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

hooks.install_for_linker()


class FlexKVLinker(UnifiedCacheLinker):
    """Made once in each scheduler's process; see SGLang's base class for the methods.

    Raises:
        ConfigError: a setting, or a model that cannot be served right; SGLang's start fails with its message.
        CapacityError: the machine cannot give the host tier's memory.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        params: CacheInitParams,
        *,
        components: Collection[Any],
        extra_config: dict[str, object] | None = None,
        forward_stream: Any = None,
    ) -> None:
        self._engine = engine_of(server_args, params, [component.name for component in components])
        path = getattr(server_args, "flexkv_config_file", None)
        config = config_of_rank(load_config(extra_config, path), self._engine)
        check_supported(self._engine, config)
        self.forward_stream = forward_stream
        self.pools: dict[Any, object] = {}  # SGLang need not know how FlexKV reads them
        self.lora_weights = {
            lora_id: weights_identity(path, None) or "" for lora_id, path in self._engine.lora_paths
        }
        self.layer_done_counter = LayerWiseLoadCounter(self._engine.pool.layer_num)
        self._config = config
        self.side: SchedulerSide | None = None
        self.metrics: PromMetrics | None = None
        self._params = params

    def attach(self, wrapper: FlexKVLinkerWrapper) -> SchedulerSide:
        """Take the host tier, now that the ranks can be asked."""
        self.side, self.metrics = open_side(
            self._engine, self._config, self._params, wrapper.agree, self.forward_stream
        )
        return self.side

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        return []  # asked by the wrapper, with the request

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        assert self.side is not None
        (transfer,) = transfers
        return self.side.load(rid, transfer.device_indices.cpu().numpy())

    def start_layer_wise_loading(self) -> int:
        return -1  # what was loaded is there

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        return True  # none is under way

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        return False  # stores begin when a request is checkpointed

    def num_completed_offloads(self) -> int:
        return 0 if self.side is None else self.side.ended_stores()

    def pop_completed_offload(self) -> bool:
        raise AssertionError("stores are released by the wrapper")

    def reset(self) -> None:
        if self.side is not None:
            self.side.reset()

    def close(self) -> None:
        if self.side is not None:
            self.side.close()


class FlexKVLinkerWrapper(Driver, UnifiedCacheLinkerWrapper):
    """SGLang's driver of a linker, with FlexKV's ways to match and to store. All methods run on the scheduler's thread."""

    def __init__(self, cache: UnifiedRadixCache, linker: FlexKVLinker) -> None:
        super().__init__(cache, linker)
        # SGLang need not hash its nodes, nor choose what to offload.
        cache.tree_core.enable_external_cache_linker = False
        self._linker = linker
        self._lora_weights = linker.lora_weights
        self._side = linker.attach(self)

    def smallest(self, values: torch.Tensor) -> None:
        """See :class:`Driver`."""
        self.cache._all_reduce_attn_groups(values, torch.distributed.ReduceOp.MIN)

    def match(self, key: RadixKey, req: Req, result: MatchResult) -> MatchResult:
        self.hit_markers.pop(req.rid, None)
        device_tokens = result.device_prefix_len
        if device_tokens >= len(key) or not is_cacheable(req):
            return result
        gain = self._side.matched_tokens(self.view(req), len(key), device_tokens)
        if not gain:
            return result
        pages = gain // self.cache.page_size
        self.hit_markers[req.rid] = ExternalCacheHitMarker([""] * pages, device_tokens)
        return result._replace(last_host_node=result.best_match_node, host_hit_length=gain)

    def offload_nodes(self, node_ids: Any) -> None:
        """Nothing: see :meth:`checkpointed`."""

    def take_completed_offloads(self, finish_count: int) -> list[bool]:
        self._side.release_stores(finish_count)
        return []

    def num_completed_offloads(self) -> int:
        if self._linker.metrics is not None:
            self._linker.metrics.update()
        return self._side.ended_stores()

    def release_request(self, rid: str) -> None:
        super().release_request(rid)
        self._side.forget(rid)

    # Called by flexkv_sglang/hooks.py

    def checkpointed(self, req: Req) -> None:
        """The tree holds what the request has computed: store it, under a lock of its own."""
        if not is_cacheable(req):
            return
        cache = self.cache

        def hold() -> Held:
            lock = cache.lock(req.last_node)
            slots = cache.path_device_indices(req.last_node).cpu().numpy()
            return Held(slots, lambda: cache.unlock(lock))

        tokens = min(req.kv.cache_protected_len, len(req.full_untruncated_fill_ids))
        self._side.store(self.view(req), tokens, len(req.origin_input_ids), hold)

    def released(self, req: Req) -> None:
        """The request has given up its slots: it has ended, or was retracted."""
        self._side.forget(req.rid)

    def take_events(self) -> list[KVCacheEvent]:
        """KV events of FlexKV's tiers."""
        return self._side.take_events()
