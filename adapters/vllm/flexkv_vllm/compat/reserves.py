"""Whether vLLM keeps blocks free for requests that wait with loaded ones: 0.28 does (https://github.com/vllm-project/vllm/pull/44560), 0.17.1
does not."""

from __future__ import annotations

import inspect

from vllm.v1.core.kv_cache_manager import KVCacheManager

RESERVES_BLOCKS = "reserved_blocks" in inspect.signature(KVCacheManager.allocate_slots).parameters
"""Otherwise requests that wait with loaded blocks can take the whole device, so that none of them, and nobody else, can ever run."""
