"""The object to which vLLM's in-tree ``FlexKVConnectorV1`` passes its hooks; Dynamo's ``--connector flexkv`` selects the same class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexkv_vllm.compat.in_tree import handed_over
from flexkv_vllm.connector import FlexKVConnector

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole


class FlexKVConnectorV1Impl(FlexKVConnector):
    """The native connector, made by two arguments: the in-tree class forwards each hook to the method of the same name.

    What it does not forward (resets, preemptions, results of workers, new requests, metrics) and does not hand over (the KV cache's layout)
    comes through the class that vLLM's plugin ``flexkv`` puts in its place, see ``flexkv_vllm/compat/in_tree.py``.

    Raises:
        ConfigError: that plugin is switched off; also what the native connector raises.
        CapacityError: the machine cannot give the host tier's memory.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole) -> None:
        super().__init__(vllm_config, role, handed_over())
