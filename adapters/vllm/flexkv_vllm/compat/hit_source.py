"""The label of our hits in ``vllm:prompt_tokens_by_source``; versions before 0.32 have none."""

from __future__ import annotations

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:
    HOST_HITS = None
else:
    HOST_HITS = CacheHitSource.HOST
