"""What can be refused before SGLang loads weights. The cache checks again, and more, when the KV pool is known."""

from __future__ import annotations

from typing import Any

from flexkv_core.config import load_config
from flexkv_sglang.layout import check_engine
from flexkv_sglang.plugin import BACKEND


def check_before_weights(server_args: Any) -> None:
    """Refuse settings and options that cannot be served; does nothing for an engine without FlexKV.

    Raises:
        ConfigError: with the reason and what to change.
    """
    linker = getattr(server_args, "unified_cache_external_linker_config", None) or {}
    path = getattr(server_args, "flexkv_config_file", None)
    if server_args.radix_cache_backend == BACKEND or getattr(server_args, "enable_flexkv", False):
        check_engine(server_args, load_config(path=path))
    elif str(linker.get("linker_module_path", "")).startswith("flexkv_sglang."):
        check_engine(server_args, load_config(linker.get("linker_extra_config"), path))
