"""vLLM's plugin entry point: makes the connector known by name in every process of the engine."""

from __future__ import annotations


def register() -> None:
    """Register ``FlexKVConnector`` with vLLM's connector factory; a second call does nothing."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "FlexKVConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("FlexKVConnector", "flexkv_vllm.connector", "FlexKVConnector")
