"""What vLLM says of a layer's KV: before 0.11 latent KV (MLA) is a flag, not a class of its own."""

from __future__ import annotations

from vllm.v1 import kv_cache_interface
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

_LATENT: type | None = getattr(kv_cache_interface, "MLAAttentionSpec", None)

SUPPORTED = (FullAttentionSpec, SlidingWindowSpec, *([_LATENT] if _LATENT is not None else ()))
"""Kinds of layers whose KV is held in blocks that FlexKV can keep."""


def is_latent(spec: KVCacheSpec) -> bool:
    """Whether the layer keeps latent KV, which is the same on every tensor-parallel rank."""
    return getattr(spec, "use_mla", False) if _LATENT is None else isinstance(spec, _LATENT)
