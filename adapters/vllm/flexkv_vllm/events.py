"""KV events of FlexKV's tiers, in vLLM's types: what was stored and what was removed, with the medium."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent

from flexkv_core.cache import ROOT, EventKind, TierEvent
from flexkv_core.types import KEY_BYTES, Tier
from flexkv_vllm.compat.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, NAME_MEDIA, block_stored
from flexkv_vllm.compat.request import token_list

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

EVENTS_MAX = 65536
"""Events that are kept between two steps; the oldest go first."""
_MEDIA = {Tier.HOST: MEDIUM_CPU, Tier.SSD: MEDIUM_STORAGE}


def publishes_events(vllm_config: VllmConfig) -> bool:
    """Whether the engine was told to publish KV events, and ours can be told from its own."""
    events = vllm_config.kv_events_config
    return NAME_MEDIA and events is not None and events.enable_kv_cache_events


class EventLog:
    """Collects events until the scheduler takes them. Blocks are named by FlexKV's keys, 16 bytes each."""

    def __init__(self, block_tokens: int, enabled: bool) -> None:
        self.enabled = enabled
        self._block_tokens = block_tokens
        self._events: deque[KVCacheEvent] = deque(maxlen=EVENTS_MAX)
        self._described: OrderedDict[bytes, BlockStored] = OrderedDict()  # by the first block's key

    def stored(self, keys: bytes, start: int, request: Request) -> None:
        """Blocks ``start`` … of ``request`` are in host memory; ``keys`` are those of all blocks up to the last one stored. Describes what
        :meth:`happened` reports in its turn."""
        if not self.enabled:
            return
        names = _split(keys)
        lora = request.lora_request
        self._described[names[start]] = block_stored(
            block_hashes=list(names[start:]),
            parent_block_hash=names[start - 1] if start else None,
            token_ids=list(token_list(request)[start * self._block_tokens : len(names) * self._block_tokens]),
            block_size=self._block_tokens,
            lora_id=lora.lora_int_id if lora else None,
            medium=MEDIUM_CPU,
            lora_name=lora.lora_name if lora else None,
        )
        while len(self._described) > EVENTS_MAX:
            self._described.popitem(last=False)

    def happened(self, events: Iterable[TierEvent]) -> None:
        """What came to the tiers and left them, in order."""
        for event in events:
            self._events.append(self._stored(event) if event.kind is EventKind.STORED else _removed(event))

    def _stored(self, event: TierEvent) -> BlockStored:
        """With its tokens if a request of now has stored it. What came from or to the SSD, the content of a warm start included,
        is named by keys only: the tokens of a key do not change, and who knows them has them from the block's first event."""
        names = _split(event.keys)
        described = self._described.pop(names[0], None) if event.tier is Tier.HOST else None
        if described is not None and len(described.block_hashes) == len(names):
            return described
        return block_stored(
            block_hashes=list(names),
            parent_block_hash=None if event.parent == ROOT else event.parent,
            token_ids=[],
            block_size=self._block_tokens,
            lora_id=None,
            medium=_MEDIA[event.tier],
            lora_name=None,
        )

    def cleared(self) -> None:
        """Everything was forgotten."""
        if self.enabled:
            self._events.append(AllBlocksCleared())

    def take(self) -> list[KVCacheEvent]:
        """The events since the last call."""
        taken = list(self._events)
        self._events.clear()
        return taken


def _removed(event: TierEvent) -> BlockRemoved:
    return BlockRemoved(block_hashes=list(_split(event.keys)), medium=_MEDIA[event.tier])


def _split(keys: bytes) -> list[bytes]:
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
