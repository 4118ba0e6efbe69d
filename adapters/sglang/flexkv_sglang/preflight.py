"""What can be refused before SGLang loads weights. The cache checks again, and more, when the KV pool is known."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from flexkv_core.config import load_config
from flexkv_core.module_owner import Owner, owner_of
from flexkv_sglang.layout import check_engine
from flexkv_sglang.plugin import BACKEND

logger = logging.getLogger(__name__)

_DOOR = Path("integration", "config.py")
_OURS = "from flexkv_sglang."


def check_before_weights(server_args: Any) -> None:
    """Refuse settings and options that cannot be served; does nothing for an engine without FlexKV, or with that of another project.

    Raises:
        ConfigError: with the reason and what to change.
    """
    linker = getattr(server_args, "unified_cache_external_linker_config", None) or {}
    path = getattr(server_args, "flexkv_config_file", None)
    is_in_tree = getattr(server_args, "enable_flexkv", False) and _is_ours()
    if server_args.radix_cache_backend == BACKEND or is_in_tree:
        check_engine(server_args, load_config(path=path))
    elif str(linker.get("linker_module_path", "")).startswith("flexkv_sglang."):
        check_engine(server_args, load_config(linker.get("linker_extra_config"), path))


def _is_ours() -> bool:
    """Whether ``--enable-flexkv`` leads to this project; says so when it leads to another."""
    owner, folder = owner_of(_DOOR, _OURS)
    if owner is Owner.OTHERS:
        logger.warning(
            "--enable-flexkv will use the module flexkv in %s, which is not of this project; for this project's cache use"
            " --radix-cache-backend %s",
            folder,
            BACKEND,
        )
    return owner is Owner.OURS
