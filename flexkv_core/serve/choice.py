"""Whose tiers an engine uses: its own, or those of a server."""

from __future__ import annotations

from flexkv_core.block_manager import BlockManager, ModelConfig
from flexkv_core.config import FlexKVConfig
from flexkv_core.serve.client import SharedBlocks
from flexkv_core.transfer.cpus import EngineCpus
from flexkv_core.transfer.plan import DeviceCopier, Executor


def open_blocks(
    model_config: ModelConfig,
    cache_config: FlexKVConfig,
    device: DeviceCopier | Executor,
    track_events: bool = False,
    cpus: EngineCpus | None = None,
) -> BlockManager | SharedBlocks:
    """What an adapter uses: a client where ``cache_config.server`` names a socket, otherwise a manager of its own. The arguments are those of
    :class:`~flexkv_core.block_manager.BlockManager`; neither is started."""
    if cache_config.server is not None:
        return SharedBlocks(model_config, cache_config, device, track_events)
    return BlockManager(model_config, cache_config, device, track_events, cpus=cpus)
