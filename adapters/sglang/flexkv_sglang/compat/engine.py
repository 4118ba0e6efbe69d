"""What FlexKV needs to know of a running SGLang, read from the objects of its version."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sglang
import torch

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.server_args import ServerArgs


@dataclass(frozen=True)
class Engine:
    """One scheduler's process. ``pool`` is its KV pool, ``components`` the parts of the model's KV in SGLang's words, sorted;
    ``lora_paths`` maps the ids of adapters that are named at start to their folders."""

    server_args: ServerArgs
    page_size: int
    tp_size: int
    tp_rank: int
    dp_rank: int
    has_draft_kv: bool
    components: tuple[str, ...]
    pool: Any
    lora_paths: tuple[tuple[str, str], ...]


def engine_of(
    server_args: ServerArgs, params: CacheInitParams, components: Collection[str], worker: Any = None
) -> Engine:
    """Read from what SGLang hands to a cache when it makes it; ``components`` are the parts of the model's KV, see :class:`Engine`;
    ``worker`` is SGLang's, where it hands that over too."""
    group = params.attn_tp_cache_group or params.tp_cache_group
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    loras = [ref for ref in getattr(server_args, "lora_paths", None) or () if hasattr(ref, "lora_id")]
    return Engine(
        server_args=server_args,
        page_size=params.page_size,
        tp_size=torch.distributed.get_world_size(group=group) if is_distributed else 1,
        tp_rank=torch.distributed.get_rank(group=group) if is_distributed else 0,
        dp_rank=_dp_rank(worker),
        has_draft_kv=bool(
            params.is_eagle
            or getattr(params, "mtp_draft_device_pools", ())
            or getattr(params, "sidecar_draft_device_pools", ())
        ),
        components=tuple(sorted(components)),
        pool=params.token_to_kv_pool_allocator.get_kvcache(),
        lora_paths=tuple((ref.lora_id, ref.lora_path) for ref in loras),
    )


def engine_version() -> str:
    """SGLang's version."""
    return str(sglang.__version__)


def _dp_rank(worker: Any) -> int:
    """Which of several engines side by side this is; 0 for a single one."""
    for rank_of in _dp_ranks(worker):
        try:
            rank = rank_of()
        except (AssertionError, AttributeError, RuntimeError, ValueError):  # not in this process or version
            continue
        if rank:
            return int(rank)
    return 0


def _dp_ranks(worker: Any) -> Iterator[Callable[[], int | None]]:
    """Where versions have it: as one of several copies of the engine, and as one of those that share what lies behind the attention."""
    try:
        from sglang.srt.runtime_context import get_parallel
    except ImportError:  # before 0.5.14
        from sglang.srt.layers.dp_attention import get_attention_dp_rank

        yield get_attention_dp_rank
    else:
        yield lambda: get_parallel().attn_dp_rank
        yield lambda: get_parallel().dp_rank  # 0.5.22 and later
    yield lambda: worker.ps.dp_rank  # 0.5.20
    yield lambda: worker.dp_rank  # 0.5.13
