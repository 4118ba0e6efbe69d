"""``KVManager`` as SGLang's own code drives it; users of the library take :class:`flexkv_core.KVManager`."""

from flexkv_sglang.in_tree import InTreeManager as KVManager

__all__ = ["KVManager"]
