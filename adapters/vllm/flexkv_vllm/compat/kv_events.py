"""vLLM's KV events where they differ: media came with 0.10.2, their names with 0.27, the name of a LoRA adapter with 0.14."""

from __future__ import annotations

from typing import Any

from vllm.distributed import kv_events

MEDIUM_CPU: str = getattr(kv_events, "MEDIUM_CPU", "CPU")
MEDIUM_STORAGE: str = getattr(kv_events, "MEDIUM_STORAGE", "STORAGE")

_FIELDS = frozenset(kv_events.BlockStored.__struct_fields__)

NAME_MEDIA = "medium" in _FIELDS
"""Whether events tell where a block is. Before 0.10.2 they do not, and ours would be taken for the device's."""


def block_stored(**fields: Any) -> kv_events.BlockStored:
    """The event, without the fields that this version does not know."""
    return kv_events.BlockStored(**{name: value for name, value in fields.items() if name in _FIELDS})
