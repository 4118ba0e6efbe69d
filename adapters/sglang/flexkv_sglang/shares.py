"""A rank's share of what the user gave to the engine: each rank keeps its own part of the KV, in memory and in files of its own."""

from __future__ import annotations

from flexkv_core.block_manager import ModelConfig
from flexkv_core.config import FlexKVConfig
from flexkv_sglang.compat.engine import Engine
from flexkv_sglang.layout import identity, slot_layout


def config_of_rank(config: FlexKVConfig, engine: Engine) -> FlexKVConfig:
    """``config`` with this rank's part of the sizes, which the user gives for the whole engine."""
    if engine.tp_size == 1:
        return config
    sizes = ("host_bytes", "ssd_bytes", "write_queue_bytes", "scrub_bytes_per_s")
    return config.model_copy(
        update={name: type(getattr(config, name))(getattr(config, name) // engine.tp_size) for name in sizes}
    )


def model_config(engine: Engine, config: FlexKVConfig) -> ModelConfig:
    """What this rank's bytes are."""
    return ModelConfig(identity(engine, config), slot_layout(engine, config), replica=engine.dp_rank)
