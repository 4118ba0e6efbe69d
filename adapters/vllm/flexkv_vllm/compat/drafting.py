"""What versions of vLLM do differently under speculative decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig

STORES_AFTER_DRAFTS = hasattr(KVConnectorModelRunnerMixin, "finalize_kv_connector")
"""Whether ``wait_for_save`` is called after the drafter has run; otherwise it comes when the drafter's layers lack the step's KV."""


def drops_last_block(speculative: SpeculativeConfig) -> bool:
    """Whether vLLM computes the last block of its own hits anew; recent versions let the user choose."""
    drop = getattr(speculative, "use_eagle_block_drop", speculative.use_eagle)
    return bool(drop())
