"""Where SGLang's radix trees differ between versions: which way in a version has, and how a request and its row are read there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from flexkv_core.errors import ConfigError
from flexkv_sglang.compat.engine import engine_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.managers.schedule_batch import Req

FIRST_LINKER = (0, 5, 23)
"""From here on SGLang's own tree takes a linker that a module brings along."""


def has_linker() -> bool:
    """Whether FlexKV comes in as a linker; else as a radix cache.

    Raises:
        ConfigError: this version has neither in a form that FlexKV knows.
    """
    numbers = tuple(int(part) for part in engine_version().split(".")[:3] if part.isdigit())
    if numbers >= FIRST_LINKER:
        return True
    if not hasattr(RadixCache, "cache_unfinished_req"):
        raise ConfigError(
            f"FlexKV: SGLang {engine_version()} has neither the radix cache of the versions before it nor the linker of those after it;"
            " use 0.5.21 or older, or 0.5.23 or newer"
        )
    return False


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


def slots_in_tree(cache: RadixCache, req: Req) -> torch.Tensor:
    """int64 [tokens], on the device: the slots of the request's row that the tree holds, after ``cache_unfinished_req``."""
    kv = getattr(req, "kv", None)
    state: Any = kv if hasattr(kv, "cache_protected_len") else req  # it moved
    row = cache.req_to_token_pool.req_to_token[state.req_pool_idx]
    return row[: state.cache_protected_len].to(torch.int64, copy=True)


def request_id(handle: Any) -> str:
    """Older versions name a request by its id, newer ones by a handle that has it."""
    return str(getattr(handle, "rid", handle))
