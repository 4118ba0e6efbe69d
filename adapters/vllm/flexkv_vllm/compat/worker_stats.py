"""Who is asked for statistics: versions before 0.27 ask the scheduler's side only after a worker has sent some."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

WORKERS_MUST_SEND = not hasattr(KVConnectorBase_V1, "on_new_request")
"""Whether a worker must send statistics, empty ones, in each step. True for more versions than need it, which costs them a small object."""
