"""Where SGLang's radix trees differ between versions: which way in a version has, and how a request and its row are read there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchResult
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from flexkv_sglang.compat.engine import engine_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.managers.schedule_batch import Req

FIRST_LINKER = (0, 5, 23)
"""From here on SGLang's own tree takes a linker that a module brings along."""


def has_linker() -> bool:
    """Whether FlexKV comes in as a linker; else as a radix cache."""
    numbers = tuple(int(part) for part in engine_version().split(".")[:3] if part.isdigit())
    return numbers >= FIRST_LINKER


def components_of(context: Any) -> tuple[str, ...]:
    """The parts of the model's KV, in SGLang's words, from a TreeCacheBuildContext."""
    return (
        "FULL",
        *(("SWA",) if context.is_hybrid_swa else ()),
        *(("MAMBA",) if context.is_hybrid_ssm else ()),
    )


def key_of(req: Req, tokens: Sequence[int]) -> RadixKey:
    """What the tree knows ``tokens`` of the request by. Before 0.5.18 or so a salt is part of ``extra_key``."""
    salt = getattr(req, "cache_salt", None)
    return RadixKey(tokens, req.extra_key, **({"cache_salt": salt} if salt else {}))


def matched_tokens(found: MatchResult) -> int:
    """Tokens that the device holds of what was matched. Since 0.5.22 a match counts them only."""
    count = getattr(found, "device_prefix_len", None)
    return len(found.device_indices) if count is None else int(count)


def matched_slots(cache: RadixCache, found: MatchResult) -> torch.Tensor:
    """Their slots, int64 [tokens], on the device."""
    slots = getattr(found, "device_indices", None)
    return cache.path_device_indices(found.last_device_node) if slots is None else slots


def prefix_tokens(req: Req) -> int:
    """What :func:`matched_tokens` was when SGLang matched the request."""
    count = getattr(req, "prefix_len", None)
    return len(req.prefix_indices) if count is None else int(count)


def told_as_loaded(slots: torch.Tensor) -> torch.Tensor | int:
    """What ``init_load_back`` says of the slots that it filled: themselves, since 0.5.22 how many."""
    return len(slots) if "device_prefix_len" in MatchResult._fields else slots


def slots_in_tree(cache: RadixCache, req: Req) -> torch.Tensor:
    """int64 [tokens], on the device: the slots of the request's row that the tree holds, after a checkpoint."""
    kv = getattr(req, "kv", None)
    state: Any = kv if hasattr(kv, "cache_protected_len") else req  # it moved
    row = cache.req_to_token_pool.req_to_token[state.req_pool_idx]
    return row[: state.cache_protected_len].to(torch.int64, copy=True)


def request_id(handle: Any) -> str:
    """Older versions name a request by its id, newer ones by a handle that has it."""
    return str(getattr(handle, "rid", handle))
