"""FlexKV's core: prefix index, tiers and transfers. Imports no torch, no triton and no engine."""

from flexkv_core.config import FlexKVConfig, load_config
from flexkv_core.layout import DeviceSegments, KVLayout
from flexkv_core.manager import KVManager, ModelConfig
from flexkv_core.tasks import KVResponse, KVResponseStatus

__all__ = [
    "DeviceSegments",
    "FlexKVConfig",
    "KVLayout",
    "KVManager",
    "KVResponse",
    "KVResponseStatus",
    "ModelConfig",
    "load_config",
]
