"""Fields of SGLang's KV events that not every version has."""

from __future__ import annotations

from sglang.srt.disaggregation.kv_events import BlockStored


def salt_field(salt: str | None) -> dict[str, str | None]:
    """The salt of a stored block, where its version tells it; older versions put it into nothing but the tree."""
    return {"cache_salt": salt} if "cache_salt" in BlockStored.__struct_fields__ else {}
