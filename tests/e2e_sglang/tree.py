"""SGLang's real pools, allocator and tree with FlexKV behind them, in one process and without a model: requests "compute" random KV."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

from flexkv_sglang.linker import FlexKVLinker

LAYERS, HEADS, HEAD_DIM = 2, 2, 8
CONFIG = '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'
"""All of a model that is read: the content of its config.json."""


def rounded(values: torch.Tensor) -> torch.Tensor:
    """What comes back of float32 ``values`` [..., n] where KV is kept as fp8, by torch's own casts: bfloat16, a scale for each row of n."""
    scale = values.abs().amax(-1, keepdim=True) / 448
    return ((values / scale).to(torch.float8_e4m3fn).float() * scale).to(torch.bfloat16)


class Pools:
    """A scheduler's pools, and what its tree is made of."""

    def __init__(
        self,
        model: str,
        page_size: int,
        tokens: int,
        is_mla: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        name = str(dtype).removeprefix("torch.")
        self.server_args = ServerArgs(model_path=model, device="cpu", page_size=page_size, dtype=name)
        publish(self.server_args, role="test")
        make_pool = _mla_pool if is_mla else _mha_pool
        self.kv = make_pool(page_size, tokens, dtype)
        common = (dtype, "cpu", self.kv, False)
        self.allocator: Any = (
            TokenToKVPoolAllocator(tokens, *common)
            if page_size == 1
            else PagedTokenToKVPoolAllocator(tokens, page_size, *common)
        )
        self.rows = ReqToTokenPool(64, tokens, "cpu", False)
        self.params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            tree_components=(ComponentType.FULL,),
            enable_kv_cache_events=True,
        )


def _mha_pool(page_size: int, tokens: int, dtype: torch.dtype) -> MHATokenToKVPool:
    return MHATokenToKVPool(
        size=tokens,
        page_size=page_size,
        dtype=dtype,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )


def _mla_pool(page_size: int, tokens: int, dtype: torch.dtype) -> MLATokenToKVPool:
    """One tensor a layer, of a token's latent and its rotated part."""
    return MLATokenToKVPool(
        size=tokens,
        page_size=page_size,
        dtype=dtype,
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )


class Tree(ABC):
    """Drives a tree as SGLang's scheduler does. ``cache`` is made over ``pools``."""

    def __init__(self, pools: Pools, cache: Any) -> None:
        self.page_size = pools.params.page_size
        self.pool, self.allocator, self.rows, self.cache = pools.kv, pools.allocator, pools.rows, cache

    def request(self, rid: str, tokens: Sequence[int], salt: str | None = None) -> Req:
        """A request that has just been queued."""
        req = Req(rid, "", array("q", tokens), SamplingParams(max_new_tokens=4), vocab_size=50_000)
        req.cache_salt = salt
        return req

    def match(self, req: Req) -> int:
        """What SGLang's scheduler asks before each prefill; tokens that FlexKV would load."""
        req.init_next_round_input(self.cache)
        return int(req.host_hit_length)

    def load(self, req: Req) -> int:
        """What it does when it admits the request; tokens that were loaded."""
        if not req.host_hit_length:
            return 0
        lock = self.cache.lock(req.best_match_node)
        loaded, req.last_node = self.cache.init_load_back(
            InitLoadBackParams(
                best_match_node=req.best_match_node, host_hit_length=req.host_hit_length, req=req
            )
        )
        self.cache.unlock(lock)
        req.prefix_len += loaded
        if self.cache.load_back_is_cache_owned():
            req.kv.cache_protected_len = req.prefix_len
        return int(loaded)

    def prefill(self, req: Req) -> int:
        """Match, load, compute the rest and checkpoint it; tokens that were loaded."""
        self.match(req)
        loaded = self.load(req)
        req.lock = self.cache.lock(req.last_node)
        total = len(req.full_untruncated_fill_ids)
        prefix = self.cache.prefix_device_indices(req)
        self.rows.alloc([req])
        new_tokens = -(-total // self.page_size) * self.page_size - req.prefix_len
        self.cache.token_to_kv_pool_allocator.evict_to_free_tokens(self.cache, new_tokens)
        new = self.allocator.alloc(new_tokens)
        assert new is not None, "the pool is full"
        row = torch.cat([prefix, new])[:total]
        self.rows.write((req.kv.req_pool_idx, slice(0, total)), row.to(torch.int32))
        for position in range(req.prefix_len, total):
            self._write(int(row[position]), req, position)
        req.kv.kv_allocated_len = req.kv.kv_committed_len = total
        req.extend_end = total
        if getattr(self.cache, "linker", None) is not None:
            assert not self.cache.linker.finish_loads()
        checkpoint_kv_cache(req, self.cache)
        return loaded

    def finish(self, req: Req) -> None:
        """The request has its answer (of no token)."""
        req.finished_reason = FINISH_LENGTH(0)
        release_kv_cache(req, self.cache, checkpoint=True)

    def retract(self, req: Req) -> None:
        """The request makes room for others; it waits to be prefilled again."""
        release_kv_cache(req, self.cache, checkpoint=False)
        req.reset_for_retract()

    def step(self) -> None:
        """A round of the scheduler's loop."""
        self.cache.check_hicache_events()

    def settle(self) -> None:
        """Rounds until no store is under way."""
        deadline = time.monotonic() + 10
        while self.pending_stores() and time.monotonic() < deadline:
            self.step()
            time.sleep(0.001)
        assert not self.pending_stores()

    @abstractmethod
    def pending_stores(self) -> int:
        """Stores under way."""

    @abstractmethod
    def close(self) -> None:
        """Give the host tier back."""

    def store(self, tokens: list[int], salt: str | None = None) -> None:
        """A request comes, is answered and goes; its KV is in the host tier."""
        req = self.request(f"store-{tokens[0]}-{len(tokens)}-{salt}", tokens, salt)
        self.prefill(req)
        self.finish(req)
        self.settle()

    def flush(self) -> None:
        """``/flush_cache``."""
        self.cache.reset()
        self.rows.clear()
        self.allocator.clear()

    def values(self, req: Req, positions: int) -> torch.Tensor:
        """[tensors, positions, values]: what the pool holds of the first positions of a prefilled request."""
        slots = self.rows.req_to_token[req.kv.req_pool_idx, :positions].long()
        return torch.stack([tensor[slots].flatten(1) for tensor in self._tensors()])

    def wrong_positions(self, req: Req) -> list[int]:
        """Positions of a prefilled request whose KV is not what computing gives."""
        row = self.rows.req_to_token[req.kv.req_pool_idx, : len(req.full_untruncated_fill_ids)].tolist()
        tensors = self._tensors()
        return [
            position
            for position, slot in enumerate(row)
            for index, tensor in enumerate(tensors)
            if not torch.equal(tensor[slot], _value(req, position, index, tensor))
        ]

    def _write(self, slot: int, req: Req, position: int) -> None:
        for index, tensor in enumerate(self._tensors()):
            tensor[slot] = _value(req, position, index, tensor)

    def _tensors(self) -> list[torch.Tensor]:
        """All layers' KV, ``[slots, heads, size]`` each."""
        return getattr(self.pool, "kv_buffer", None) or [*self.pool.k_buffer, *self.pool.v_buffer]


class NativeTree(Tree):
    """With FlexKV's linker. ``settings`` are FlexKV's; with ``is_mla`` the KV is that of multi-head latent attention."""

    def __init__(
        self,
        model: str,
        page_size: int,
        tokens: int,
        is_mla: bool = False,
        dtype: torch.dtype = torch.float32,
        **settings: object,
    ) -> None:
        pools = Pools(model, page_size, tokens, is_mla, dtype)
        cache = UnifiedRadixCache(pools.params)
        super().__init__(pools, cache)
        components = set(cache.components)
        self.linker = FlexKVLinker(
            pools.server_args, pools.params, components=components, extra_config=settings
        )
        cache.init_cache_linker(self.linker)

    def pending_stores(self) -> int:
        """See :class:`Tree`."""
        assert self.linker.side is not None
        return self.linker.side.pending_stores

    def close(self) -> None:
        """See :class:`Tree`."""
        self.linker.close()


def _value(req: Req, position: int, index: int, tensor: torch.Tensor) -> torch.Tensor:
    """The KV of one token: a function of the tokens up to it, of its tensor's number, and of the salt; with that tensor's shape."""
    seed = hash((tuple(req.full_untruncated_fill_ids[: position + 1]), index, req.cache_salt or ""))
    generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF)
    return torch.rand(*tensor.shape[1:], generator=generator)
