"""Reading an SGLang request: its tokens, and what besides tokens its KV depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flexkv_sglang.scheduler_side import RequestView

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def is_cacheable(req: Req) -> bool:
    """Whether tokens and names tell the request's KV: not with embeddings as input, nor in a session that keeps slots of its own."""
    return (
        getattr(req, "input_embeds", None) is None
        and getattr(req, "positional_embed_overrides", None) is None
        and getattr(req, "session", None) is None
        and not getattr(req, "skip_radix_cache_insert", False)
    )


def view_of(req: Req, lora_weights: Mapping[str, str]) -> RequestView:
    """The request as FlexKV sees it. SGLang's ``extra_key`` holds the LoRA adapter's id; for adapters named at start that is made of name
    and path, so what lies there (``lora_weights``, by id) counts as well. An image is told by the tokens that stand for it, which SGLang
    derives from its content."""
    parts: list[str] = []
    if req.extra_key:
        parts += ["extra", req.extra_key]
    if getattr(req, "cache_salt", None):
        parts += ["salt", req.cache_salt]
    weights = lora_weights.get(getattr(req, "lora_id", None) or "")
    if weights:
        parts += ["lora", weights]
    # Before its first round a request has no other tokens than its prompt's.
    tokens = req.full_untruncated_fill_ids if len(req.full_untruncated_fill_ids) else req.origin_input_ids
    return RequestView(req.rid, tokens, tuple(parts), getattr(req, "cache_salt", None))
