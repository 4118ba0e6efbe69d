"""KV events of FlexKV's tiers, in SGLang's types: what was stored and what was removed, with the medium."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored, KVCacheEvent, StorageMedium

from flexkv_core.cache import ROOT, EventKind, TierEvent
from flexkv_core.types import KEY_BYTES, Tier
from flexkv_sglang.compat.kv_events import salt_field

DESCRIBED_MAX = 65536
"""Stores whose tokens are remembered until they are reported; the oldest go first."""

_MEDIA = {Tier.HOST: StorageMedium.CPU.value, Tier.SSD: StorageMedium.DISK.value}


@dataclass(frozen=True)
class _Tokens:
    tokens: list[int]
    salt: str | None


class EventLog:
    """Turns what came to the tiers and left them into SGLang's events. Blocks are named by the first 8 bytes of FlexKV's keys."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._described: OrderedDict[bytes, _Tokens] = OrderedDict()  # by the first block's key

    def storing(self, keys: bytes, tokens: list[int], salt: str | None) -> None:
        """Blocks ``keys`` with these ``tokens`` are about to be stored; describes what is reported of them later."""
        self._described[keys[:KEY_BYTES]] = _Tokens(tokens, salt)
        while len(self._described) > DESCRIBED_MAX:
            self._described.popitem(last=False)

    def of(self, happened: Iterable[TierEvent]) -> list[KVCacheEvent]:
        """SGLang's events for what happened; tiers that SGLang has no medium for are left out."""
        return [self._event(event) for event in happened if event.tier in _MEDIA]

    def _event(self, event: TierEvent) -> KVCacheEvent:
        names, medium = _names(event.keys), _MEDIA[event.tier]
        if event.kind is EventKind.REMOVED:
            return BlockRemoved(block_hashes=names, medium=medium)
        known = self._described.pop(event.keys[:KEY_BYTES], None) if event.tier is Tier.HOST else None
        # What came from or to the SSD is named by keys only, like a store of which only a part arrived.
        is_whole = known is not None and len(known.tokens) == len(names) * self._block_tokens
        return BlockStored(
            block_hashes=names,
            parent_block_hash=None if event.parent == ROOT else _names(event.parent)[0],
            token_ids=known.tokens if known is not None and is_whole else [],
            block_size=self._block_tokens,
            lora_id=None,
            medium=medium,
            **salt_field(known.salt if known is not None else None),
        )


def _names(keys: bytes) -> list[int]:
    """SGLang's events name a block by a signed number of 64 bits."""
    return [int.from_bytes(keys[i : i + 8], "little", signed=True) for i in range(0, len(keys), KEY_BYTES)]
