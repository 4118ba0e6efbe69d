"""Tiny random models with the demo's tokenizer, made on the spot: what a layout needs, at a size that starts in seconds.

``python -m tests.e2e.tiny_models KIND TOKENIZER_DIR CACHE_DIR`` prints the checkpoint's directory as its last line; ``all`` makes
every kind that is missing. The weights are drawn at the scale of a trained model (unit-variance activations, logits several units
apart): a fresh initialisation of transformers gives near-uniform log-probabilities, with which every test of equality passes for
nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from tests.e2e.tiny_checkpoints import REWRITE

FORMAT = 3
_VOCABULARY = 49152
_LOGIT_SCALE = 3.0
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _llama() -> PreTrainedModel:
    """Two layers of grouped-query attention: 8 heads share 2 heads of keys and values."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _mla() -> PreTrainedModel:
    """Two dense layers of multi-head latent attention; vLLM never ties its head, so neither does the checkpoint, and SGLang asks how often
    a layer has experts even where none has."""
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(
            vocab_size=_VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            moe_intermediate_size=128,
            num_hidden_layers=2,
            first_k_dense_replace=2,
            moe_layer_freq=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=64,
            qk_rope_head_dim=64,
            v_head_dim=64,
            n_routed_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _hybrid() -> PreTrainedModel:
    """Two layers of sliding window and two of full attention, in turns."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=_VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            sliding_window=256,
            layer_types=["sliding_attention", "full_attention"] * 2,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _sinks() -> PreTrainedModel:
    """gpt-oss: sliding windows and full attention in turns, attention sinks, experts."""
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=_VOCABULARY,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=128,
            layer_types=["sliding_attention", "full_attention"] * 2,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )


def _window() -> PreTrainedModel:
    """Two layers of sliding window and none of full attention."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=_VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            sliding_window=256,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _drafter() -> PreTrainedModel:
    """One layer as large as one of ``llama``'s: what its drafters are made from."""
    config = _llama().config
    config.num_hidden_layers = 1
    return LlamaForCausalLM(config)


def _mtp() -> PreTrainedModel:
    """ERNIE, without experts: two layers, to which one is added that predicts a token more."""
    return Ernie4_5_MoeForCausalLM(
        Ernie4_5_MoeConfig(
            vocab_size=_VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            moe_layer_start_index=2,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "mla": _mla,
    "hybrid": _hybrid,
    "window": _window,
    "gpt-oss": _sinks,
    "eagle": _drafter,
    "eagle3": _drafter,
    "mtp": _mtp,
}


def tiny_model_directory(kind: str, cache_dir: Path) -> Path:
    """Where the tiny model ``kind`` (a key of KINDS) lies, or will lie."""
    return cache_dir / f"tiny-{kind}-{FORMAT}"


def ensure_tiny_model(kind: str, tokenizer: Path, cache_dir: Path) -> Path:
    """The directory of the tiny model ``kind`` under ``cache_dir``; the first rename wins a race."""
    target = tiny_model_directory(kind, cache_dir)
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".tiny-{kind}-", dir=cache_dir))
    try:
        torch.manual_seed(0)
        model = KINDS[kind]().to(torch.float32)
        _draw_weights(model)
        model.save_pretrained(str(work))
        if kind in REWRITE:
            REWRITE[kind](model, work)
        for name in _TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, work / name)
        try:
            os.rename(work, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _draw_weights(model: PreTrainedModel) -> None:
    """Variance 1/fan-in for every matrix, 1 for the embedding, and a head that spreads the logits."""
    is_gemma = model.config.model_type.startswith(
        "gemma"
    )  # multiplies its embedding by the root of its width
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                continue
            scale = 1.0 if "embed_tokens" in name and not is_gemma else weight.shape[1] ** -0.5
            weight.normal_(0.0, scale * (_LOGIT_SCALE if "lm_head" in name else 1.0))


if __name__ == "__main__":
    for name in KINDS if sys.argv[1] == "all" else sys.argv[1:2]:
        print(ensure_tiny_model(name, Path(sys.argv[2]), Path(sys.argv[3])))
