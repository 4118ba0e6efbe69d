"""How a caller describes its KV tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class KVCacheLayoutType(Enum):
    """The order of an engine's KV tensors."""

    LAYERFIRST = "layer_first"  # one tensor a layer (and one for K, one for V), blocks within
    BLOCKFIRST = "block_first"


@dataclass(frozen=True)
class KVCacheLayout:
    """One rank's tensors, in blocks of ``tokens_per_block`` tokens."""

    type: KVCacheLayoutType
    num_layer: int
    num_block: int
    tokens_per_block: int
    num_head: int
    head_size: int
    is_mla: bool = False
