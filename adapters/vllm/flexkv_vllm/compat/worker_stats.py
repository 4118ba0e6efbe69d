"""Statistics: before 0.11.1 vLLM does not take a connector's into its metrics, and before 0.11 it has none of their classes. Until 0.27 the
scheduler's side is only asked after a worker has sent some."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
else:
    try:
        from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    except ImportError:

        @dataclass
        class KVConnectorStats:
            """Nobody asks for it."""

            data: dict[str, Any] = field(default_factory=dict)

    try:
        from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
    except ImportError:
        KVConnectorPromMetrics = object

__all__ = ["WORKERS_MUST_SEND", "KVConnectorPromMetrics", "KVConnectorStats"]

WORKERS_MUST_SEND = not hasattr(KVConnectorBase_V1, "on_new_request") and KVConnectorPromMetrics is not object
"""Whether a worker must send statistics, empty ones, in each step. True for more versions than need it, which costs them a small object."""
