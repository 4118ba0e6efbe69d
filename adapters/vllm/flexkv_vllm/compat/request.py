"""Reading a vLLM request: its tokens, and what besides tokens its KV depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.sched.output import CachedRequestData

from flexkv_core.keys import Salt

if TYPE_CHECKING:
    from vllm.v1.request import Request


_MANY_AFTER_THE_PROMPT = "resumed_from_preemption" not in CachedRequestData.__annotations__
"""From 0.11.1 on, which also changed how a step names those that come back."""


def token_list(request: Request) -> Sequence[int]:
    """All tokens that are known, prompt and output. The list itself where the version shows it: slicing 100,000 tokens takes 1 ms."""
    return getattr(request.all_token_ids, "_x", request.all_token_ids)


def is_cacheable(request: Request) -> bool:
    """Whether tokens and salts tell the request's KV: not with prompt embeddings, nor where input may still be replaced, nor with
    multimodal inputs of unknown content, which 0.10.1 may have."""
    if getattr(request, "prompt_embeds", None) is not None or getattr(request, "resumable", False):
        return False
    return hasattr(request, "mm_features") or len(request.mm_hashes) == len(request.mm_positions)


def loadable_tokens(request: Request) -> int:
    """Tokens that a load may bring. One is left to compute, as with the engine's own hits: its logits are what the request wants.

    Before 0.11.1 none of those that were generated: there the CPU's attention takes a request whose prompt is computed for one with a
    single token to compute, and one that comes back from a preemption may have more.
    """
    return (request.num_tokens if _MANY_AFTER_THE_PROMPT else request.num_prompt_tokens) - 1


def namespace_of(request: Request) -> tuple[str, ...]:
    """What separates the request's blocks from those of equal tokens: its LoRA adapter and its cache salt."""
    parts: list[str] = []
    lora = request.lora_request
    if lora is not None:
        parts += ["lora", lora.lora_name, lora.lora_path]
    if request.cache_salt:
        parts += ["salt", request.cache_salt]
    return tuple(parts)


def salts_of(request: Request) -> list[Salt]:
    """The request's multimodal inputs by content and place; 0.10.1 keeps these apart."""
    if not hasattr(request, "mm_features"):
        inputs = zip(request.mm_positions, request.mm_hashes, request.mm_kwargs, strict=True)
        return [Salt(position.offset, f"{item.modality}:{content}") for position, content, item in inputs]
    return [
        Salt(feature.mm_position.offset, f"{feature.modality}:{feature.identifier}")
        for feature in request.mm_features or ()
    ]
