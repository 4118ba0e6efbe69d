"""KV events of the host tier, in vLLM's types: what was stored and what was removed, with the medium."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import MEDIUM_CPU, AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent

from flexkv_core.types import KEY_BYTES
from flexkv_vllm.compat.request import token_list

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

EVENTS_MAX = 65536
"""Events that are kept between two steps; the oldest go first."""


def publishes_events(vllm_config: VllmConfig) -> bool:
    """Whether the engine was told to publish KV events."""
    events = vllm_config.kv_events_config
    return events is not None and events.enable_kv_cache_events


class EventLog:
    """Collects events until the scheduler takes them. Blocks are named by FlexKV's keys, 16 bytes each."""

    def __init__(self, block_tokens: int, enabled: bool) -> None:
        self.enabled = enabled
        self._block_tokens = block_tokens
        self._events: deque[KVCacheEvent] = deque(maxlen=EVENTS_MAX)

    def stored(self, keys: bytes, start: int, request: Request) -> None:
        """Blocks ``start`` … of ``request`` are in host memory; ``keys`` are those of all blocks up to the last one stored."""
        if not self.enabled:
            return
        names = _split(keys)
        lora = request.lora_request
        self._events.append(
            BlockStored(
                block_hashes=list(names[start:]),
                parent_block_hash=names[start - 1] if start else None,
                token_ids=list(
                    token_list(request)[start * self._block_tokens : len(names) * self._block_tokens]
                ),
                block_size=self._block_tokens,
                lora_id=lora.lora_int_id if lora else None,
                medium=MEDIUM_CPU,
                lora_name=lora.lora_name if lora else None,
            )
        )

    def removed(self, keys: bytes) -> None:
        """Blocks left host memory."""
        if self.enabled and keys:
            self._events.append(BlockRemoved(block_hashes=list(_split(keys)), medium=MEDIUM_CPU))

    def cleared(self) -> None:
        """Everything was forgotten."""
        if self.enabled:
            self._events.append(AllBlocksCleared())

    def take(self) -> list[KVCacheEvent]:
        """The events since the last call."""
        taken = list(self._events)
        self._events.clear()
        return taken


def _split(keys: bytes) -> list[bytes]:
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
