"""vLLM's plugin entry point: makes the connector known by its names in every process of the engine, and has its settings checked early."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Register ``FlexKVConnector`` with vLLM's connector factory, and stand behind its ``FlexKVConnectorV1``; a second call does nothing."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from flexkv_vllm.compat import early_check, in_tree

    if "FlexKVConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("FlexKVConnector", "flexkv_vllm.connector", "FlexKVConnector")
    in_tree.install()
    early_check.install(_prepare, _check)


def _prepare(fields: dict[str, Any]) -> None:
    from flexkv_vllm.preflight import choose_block_tables

    choose_block_tables(fields)


def _check(vllm_config: object, memory: bool) -> None:
    # Imported when an engine has a connector at all: every process of every engine loads this module.
    from flexkv_vllm.preflight import check_before_weights

    check_before_weights(vllm_config, memory)
