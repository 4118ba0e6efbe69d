"""Speculative decoding: which drafters keep KV of their own, and what of it may be stored and loaded.

vLLM lays a drafter's layers out with the model's, in the same block tables, so a slot holds both. The model verifies every draft:
what a drafter reads may cost time, never an answer. All the same it gets back what it had written, where that can be known:

- EAGLE and MTP make the KV of a position from the token after it. So the end of a block depends on a token that is not in its key, and
  the last block of a hit is computed anew, as vLLM does with hits of its own. Of a block in the middle, the position at its end may
  be that of another continuation.
- Modules that read further ahead write the last positions once more, with the tokens that come; those are not stored before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import ConfigError
from flexkv_core.weights import weights_identity
from flexkv_vllm.compat.drafting import STORES_AFTER_DRAFTS, drops_last_block

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig

WITHOUT_KV = ("ngram", "suffix")
WITH_KV = ("draft_model", "eagle", "eagle3", "mtp")


def check_drafter(vllm_config: VllmConfig, config: FlexKVConfig) -> None:
    """Refuse drafters that cannot be served.

    Raises:
        ConfigError: with the reason and what to change.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method in WITHOUT_KV:
        return
    found = f"speculative decoding with method {speculative.method!r}"
    instead = f"allowed: {', '.join(WITHOUT_KV)}"
    if speculative.method not in WITH_KV:
        raise ConfigError(f"FlexKV: {found} is not supported; allowed: {', '.join((*WITHOUT_KV, *WITH_KV))}")
    if not STORES_AFTER_DRAFTS:
        raise ConfigError(
            f"FlexKV: {found} needs a vLLM that saves KV after the drafter has run, such as 0.32; with this one, {instead}"
        )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ConfigError(
            f"FlexKV: pipeline_parallel_size = {stages}: {found} adds the drafter's layers to one stage, which is not supported; it must"
            f" be 1, or the method another one; {instead}"
        )
    if config.verify_sample and speculative.use_eagle():
        raise ConfigError(
            f"verify_sample = {config.verify_sample}: with {found} the end of a block depends on the token after it, so that right blocks"
            " differ from one computation to the next; set it to 0"
        )


def unsettled_tokens(vllm_config: VllmConfig) -> int:
    """Computed tokens at the end of a request whose KV the drafter writes once more."""
    if _with_kv(vllm_config) is None:
        return 0
    return max(0, int(getattr(vllm_config, "num_prefill_lookahead_tokens", 0)) - 1)


def withheld_blocks(vllm_config: VllmConfig) -> int:
    """FlexKV blocks at the end of a hit that are computed all the same."""
    speculative = _with_kv(vllm_config)
    return int(speculative is not None and drops_last_block(speculative))


def keeps_latent_kv(vllm_config: VllmConfig) -> bool:
    """Whether what the drafter keeps, if anything, is latent KV (MLA), which is the same on every tensor-parallel rank. The scheduler
    cannot tell from the layers: of a group of unlike ones it knows the first."""
    speculative = _with_kv(vllm_config)
    return speculative is None or bool(speculative.draft_model_config.use_mla)


def keeps_kv(vllm_config: VllmConfig) -> bool:
    """Whether there is a drafter with layers of its own in the engine's block tables."""
    return _with_kv(vllm_config) is not None


def drafter_identity(vllm_config: VllmConfig, config: FlexKVConfig) -> dict[str, object]:
    """What a slot's bytes depend on besides the model; empty without a drafter that keeps KV."""
    speculative = _with_kv(vllm_config)
    if speculative is None:
        return {}
    draft, model = speculative.draft_model_config, vllm_config.model_config
    is_within = draft.model == model.model  # MTP: the model's own name stands for it
    return {
        "drafter": {
            "method": speculative.method,
            "model": None if is_within else draft.model,
            "revision": None if is_within else draft.revision,
            "weights": None
            if is_within and config.model_id
            else weights_identity(draft.model, draft.revision),
            "quantization": draft.quantization,
        }
    }


def _with_kv(vllm_config: VllmConfig) -> SpeculativeConfig | None:
    speculative = vllm_config.speculative_config
    return speculative if speculative is not None and speculative.method in WITH_KV else None
