"""Settings of vLLM that older versions call otherwise or do not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, ParallelConfig


def data_parallel_index(parallel: ParallelConfig) -> int:
    """Which replica of the engine this is; before 0.14 the rank tells it."""
    name = "data_parallel_index" if hasattr(parallel, "data_parallel_index") else "data_parallel_rank"
    index: int = getattr(parallel, name)
    return index


def recompute_failed_loads(transfer: KVTransferConfig) -> bool:
    """Have a request whose load failed computed, not answered with an error; False when that is so already. Before 0.14 there is no
    other way."""
    if getattr(transfer, "kv_load_failure_policy", "recompute") == "recompute":
        return False
    transfer.kv_load_failure_policy = "recompute"
    return True
