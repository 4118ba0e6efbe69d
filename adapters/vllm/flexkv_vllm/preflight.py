"""What can be refused before the engine loads its weights: settings, sizes and directories that no later step could make right.

The connector checks again, and more, when the engine's KV layout is known; these checks only spare the user the wait. So they refuse
nothing that the later ones would accept.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexkv_core.config import FlexKVConfig, load_config
from flexkv_core.errors import CapacityError, ConfigError
from flexkv_core.module_owner import Owner
from flexkv_core.storage.directory import FOLDER_PREFIX
from flexkv_core.storage.memory import check_capacity
from flexkv_core.storage.remote import check_available
from flexkv_vllm.compat import in_tree
from flexkv_vllm.layout import check_engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

CONNECTORS = ("FlexKVConnector", in_tree.NAME)


def choose_block_tables(fields: dict[str, Any]) -> None:
    """With pipeline parallelism one block table for all layers, unless the user chose: no stage knows which layers of the others share
    a table, and so how large a slot is. ``fields``: what vLLM's configuration is about to be made of."""
    transfer, parallel, scheduler = (
        fields.get(f"{name}_config") for name in ("kv_transfer", "parallel", "scheduler")
    )
    if transfer is None or parallel is None or scheduler is None or transfer.kv_connector not in CONNECTORS:
        return
    is_open = getattr(scheduler, "disable_hybrid_kv_cache_manager", False) is None
    if is_open and parallel.pipeline_parallel_size > 1:
        logger.info("pipeline parallelism: vLLM's hybrid KV cache manager is turned off")
        scheduler.disable_hybrid_kv_cache_manager = True


def check_before_weights(vllm_config: VllmConfig, memory: bool) -> None:
    """Refuse what is wrong already; does nothing for an engine without FlexKV.

    ``memory``: whether the host tier must fit into what is free now; not where an engine of this process may have taken it.

    Raises:
        ConfigError: a setting, or a model or engine option that cannot be served.
        CapacityError: more memory or disk than there is.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector not in CONNECTORS:
        return
    if transfer.kv_connector == in_tree.NAME and not _is_ours():
        return
    import flexkv_vllm.compat.worker_results  # noqa: F401 - refuses a vLLM without the hook

    config = load_config(transfer.kv_connector_extra_config)
    check_engine(vllm_config, config)
    cache = vllm_config.cache_config
    # Another block size than a user's own may still be changed by the attention that is chosen for the model.
    if getattr(cache, "user_specified_block_size", False):
        check_block_size(config, cache.block_size)
    if memory:
        check_capacity(int(config.host_bytes), config.huge_pages)
    if config.remote_url is not None:
        check_available(config.remote_url.partition(":")[0])
    for directory in config.ssd_dirs:
        check_directory(Path(directory), int(config.ssd_bytes))


def _is_ours() -> bool:
    """Whether vLLM's in-tree class leads to this project; says so when it leads to another."""
    owner, folder = in_tree.owner()
    if owner is Owner.OTHERS:
        logger.warning(
            "%s will use the module flexkv in %s, which is not of this project; for this project's connector use"
            ' {"kv_connector":"FlexKVConnector","kv_role":"kv_both"}',
            in_tree.NAME,
            folder,
        )
    return owner is Owner.OURS


def check_block_size(config: FlexKVConfig, block_size: int) -> None:
    """Raises ConfigError when ``tokens_per_block`` is no multiple of the engine's ``block_size``, in tokens."""
    if config.tokens_per_block is not None and config.tokens_per_block % block_size:
        raise ConfigError(
            f"tokens_per_block = {config.tokens_per_block}: must be a multiple of the engine's block size, {block_size}"
        )


def check_directory(directory: Path, asked_bytes: int) -> None:
    """A folder of the SSD tier can be made there, and has room. Creates nothing.

    Raises:
        ConfigError: it is no folder, cannot be written, or its parent is not there.
        CapacityError: the disk has less than ``asked_bytes`` free (not checked where a tier's files lie already).
    """
    place = directory if directory.exists() else directory.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "is no directory" if not place.is_dir() else "cannot be written"
        raise ConfigError(f"ssd_dirs: {directory} cannot be used: {place} {reason}")
    system = os.statvfs(place)
    if system.f_flag & os.ST_RDONLY:
        raise ConfigError(f"ssd_dirs: {directory} cannot be used: {place} is on a read-only file system")
    available = system.f_bavail * system.f_frsize
    if asked_bytes > available and not any(place.glob(f"{FOLDER_PREFIX}*")):
        raise CapacityError(
            f"ssd_bytes: {asked_bytes} bytes asked for in {directory}, {available} bytes are available; lower ssd_bytes or name"
            " another directory in ssd_dirs"
        )
