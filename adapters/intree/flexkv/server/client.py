"""``KVTPClient``: a rank reports its KV tensors."""

from flexkv_sglang.in_tree import DeviceClient as KVTPClient

__all__ = ["KVTPClient"]
