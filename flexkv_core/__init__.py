"""FlexKV's core: prefix index, tiers and transfers. Imports no torch, no triton and no engine.

What is named here is loaded when it is first used: the storage process imports parts of this package only, and starts in half the time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_MODULES = {
    "DeviceSegments": "layout",
    "FlexKVConfig": "config",
    "KVLayout": "layout",
    "KVManager": "manager",
    "KVResponse": "tasks",
    "KVResponseStatus": "tasks",
    "ModelConfig": "manager",
    "load_config": "config",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
