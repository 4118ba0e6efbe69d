"""How a task stands, as SGLang's own code reads it."""

from flexkv_core.tasks import KVResponse, KVResponseStatus

__all__ = ["KVResponse", "KVResponseStatus"]
