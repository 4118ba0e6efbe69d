"""Preemptions: when a worker learns of them, and how a step tells them.

Recent versions call ``handle_preemptions`` with the step's metadata, older ones with the ids of requests, or have no such hook. Nothing
overwrites a block before the metadata is bound in those, so that is early enough there. Before 0.12 a step does not name the requests that
it preempted, and before 0.11.1 it has a flag, not a set, for those that come back.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
    from vllm.v1.request import Request

_hook = getattr(KVConnectorBase_V1, "handle_preemptions", None)

BRING_METADATA = _hook is not None and "kv_connector_metadata" in inspect.signature(_hook).parameters
"""Whether ``handle_preemptions`` is given the metadata, in every step."""


def preempted_ids(output: SchedulerOutput, requests: Iterable[Request]) -> Iterable[str]:
    """Those of ``requests`` that the step has preempted; with older versions all that are preempted now, whenever that was."""
    if hasattr(output, "preempted_req_ids"):
        return output.preempted_req_ids or ()
    return [request.request_id for request in requests if request.status is RequestStatus.PREEMPTED]


def resumed_ids(cached: CachedRequestData) -> Iterable[str]:
    """Requests that come back in this step, with the whole of their block tables."""
    if hasattr(cached, "resumed_req_ids"):
        return cached.resumed_req_ids
    flags = cached.resumed_from_preemption
    return {request_id for request_id, is_back in zip(cached.req_ids, flags, strict=True) if is_back}
