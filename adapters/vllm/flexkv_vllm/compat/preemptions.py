"""When a worker learns of preemptions: recent versions call ``handle_preemptions`` with the step's metadata, older ones with the ids of
requests, or have no such hook. Nothing overwrites a block before the metadata is bound in those, so that is early enough there."""

from __future__ import annotations

import inspect

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

_hook = getattr(KVConnectorBase_V1, "handle_preemptions", None)

BRING_METADATA = _hook is not None and "kv_connector_metadata" in inspect.signature(_hook).parameters
"""Whether ``handle_preemptions`` is given the metadata, in every step."""
