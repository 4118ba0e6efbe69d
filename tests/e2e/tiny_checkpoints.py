"""Drafters for the tiny models, as vLLM loads them: transformers writes none of these checkpoints, so each is made from a plain one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

Weights = dict[str, torch.Tensor]


def save_as_eagle(model: PreTrainedModel, directory: Path) -> None:
    """One layer, without the ``model.`` in its names, and what joins the model's hidden state to the next token's embedding."""
    size = model.config.hidden_size
    weights = {f"layers.0.{name}": weight for name, weight in _layer(model).items()}
    del weights["layers.0.input_layernorm.weight"]  # the first layer of such a drafter has none
    weights["fc.weight"] = _drawn(size, 2 * size)
    _save(weights, {}, directory)


def save_as_eagle3(model: PreTrainedModel, directory: Path) -> None:
    """One layer that reads the hidden states after three places of the model, each beside the next token's embedding; its own head."""
    size = model.config.hidden_size
    weights = {f"midlayer.{name}": weight for name, weight in _layer(model).items()}
    for part in "qkv":
        name = f"midlayer.self_attn.{part}_proj.weight"
        weights[name] = _drawn(weights[name].shape[0], 2 * size)
    weights |= {"midlayer.hidden_norm.weight": torch.ones(size), "norm.weight": torch.ones(size)}
    weights |= {"fc.weight": _drawn(size, 3 * size), "lm_head.weight": model.lm_head.weight.detach().clone()}
    changes = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": model.config.vocab_size,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
    }
    _save(weights, changes, directory)


def save_with_mtp(model: PreTrainedModel, directory: Path) -> None:
    """The whole model, and a copy of its last layer that predicts a token more."""
    size = model.config.hidden_size
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    weights |= {f"model.mtp_block.0.{name}": weight for name, weight in _layer(model).items()}
    weights |= {f"model.mtp_{part}_norm.0.weight": torch.ones(size) for part in ("emb", "hidden")}
    weights["model.mtp_linear_proj.0.weight"] = _drawn(size, 2 * size)
    _save(weights, {"num_nextn_predict_layers": 1}, directory)


def _layer(model: PreTrainedModel) -> Weights:
    first = f"model.layers.{model.config.num_hidden_layers - 1}."
    return {
        name.removeprefix(first): weight.detach().clone()
        for name, weight in model.state_dict().items()
        if name.startswith(first)
    }


def _drawn(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) * columns**-0.5


def _save(weights: Weights, changes: dict[str, object], directory: Path) -> None:
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


REWRITE: dict[str, Callable[[PreTrainedModel, Path], None]] = {
    "eagle": save_as_eagle,
    "eagle3": save_as_eagle3,
    "mtp": save_with_mtp,
}
