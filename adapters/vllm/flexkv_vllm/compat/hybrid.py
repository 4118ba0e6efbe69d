"""Loads of models with several KV cache groups: from 0.30 vLLM takes back a load that failed as a whole, and shows its block tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager

try:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorTransferResults,
        SupportsHMA,
        supports_hma,
    )
except ImportError:
    HYBRID = False
    HybridConnector: type = object
else:
    HYBRID = True
    HybridConnector = SupportsHMA


def takes_groups(transfer: KVTransferConfig) -> bool:
    """Whether the connector that ``transfer`` names forwards what models with windows or several groups need; vLLM's in-tree one does
    where ``in_tree.py`` has completed it."""
    return HYBRID and supports_hma(KVConnectorFactory.get_connector_class(transfer))


def transfer_results(sent: set[str], received: set[str], failed: set[str]) -> Any:
    """vLLM's record of requests whose blocks may be freed, whose load has ended, and which of these loads failed. Only where HYBRID."""
    return KVConnectorTransferResults(sent, received, failed)


def block_tables(kv_cache_manager: KVCacheManager, request_id: str) -> Any:
    """A sequence of vLLM's blocks for each group, as they are now; not a copy."""
    return kv_cache_manager.get_blocks(request_id).blocks
