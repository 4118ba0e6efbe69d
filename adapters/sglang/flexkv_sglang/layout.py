"""SGLang's KV pool in FlexKV's words: the shape of a slot, the segments of the tensors, and which models are understood.

A device block is one page of SGLang's pool, with ``page_size`` 1 a token's slot. FlexKV's block is a multiple of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import ConfigError, LayoutError
from flexkv_core.layout import DeviceSegments, KVLayout
from flexkv_core.quantised import check_quantisable, quantised_layout
from flexkv_core.weights import weights_identity
from flexkv_kernels.segments import pieces_of
from flexkv_sglang.compat.engine import Engine, engine_version

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sglang.srt.server_args import ServerArgs

BLOCK_TOKENS = 16
"""Tokens of a block unless configured: what a page must have at least, so that keys and copies are counted in blocks, not in tokens."""

_MHA, _MLA = "MHATokenToKVPool", "MLATokenToKVPool"
DRAFTS_WITHOUT_KV = ("NGRAM",)


def check_engine(server_args: ServerArgs, config: FlexKVConfig) -> None:
    """Refuse options under which requests would not be served right; known before the engine loads anything.

    Raises:
        ConfigError: with the reason and what to change.
    """
    for name, value, wanted in (
        ("--pp-size", server_args.pp_size, 1),
        ("--attn-cp-size", getattr(server_args, "attn_cp_size", 1), 1),
        ("--dcp-size", getattr(server_args, "dcp_size", 1), 1),
        ("--disaggregation-mode", server_args.disaggregation_mode, "null"),
    ):
        if value not in (wanted, None):
            raise ConfigError(
                f"FlexKV: {name} {value} is not supported yet under SGLang; it must be {wanted}"
            )
    draft = server_args.speculative_algorithm
    if draft is not None and draft not in DRAFTS_WITHOUT_KV:
        raise ConfigError(
            f"FlexKV: speculative decoding with {draft} keeps KV of a draft model, which is not supported yet; allowed:"
            f" {', '.join(DRAFTS_WITHOUT_KV)}"
        )
    if config.verify_sample:
        raise ConfigError(
            f"verify_sample = {config.verify_sample}: not supported under SGLang yet; it must be 0"
        )


def check_supported(engine: Engine, config: FlexKVConfig) -> None:
    """:func:`check_engine`, and what the KV pool of the model tells.

    Raises:
        ConfigError: with the reason and what to change.
    """
    check_engine(engine.server_args, config)
    if engine.has_draft_kv:
        raise ConfigError(
            "FlexKV: SGLang keeps KV of a draft model beside the model's, which is not supported yet"
        )
    if engine.components != ("FULL",):
        raise ConfigError(
            f"FlexKV: the model's KV has the parts {', '.join(engine.components)}; only models with full attention or MLA in every layer"
            " are supported yet, because sliding windows and Mamba states do not keep every block"
        )
    pool = type(engine.pool).__name__
    if pool not in (_MHA, _MLA):
        raise ConfigError(f"FlexKV: the model's KV lies in a {pool}; supported are {_MHA} and {_MLA}")
    if config.store_dtype == "fp8":
        check_quantisable(str(_tensors(engine.pool)[0].dtype).removeprefix("torch."))
    if any(getattr(engine.pool, name, None) is not None for name in ("k_scale_buffer", "kv_scale_buffer")):
        raise ConfigError(
            f"FlexKV: --kv-cache-dtype {engine.server_args.kv_cache_dtype} keeps scales apart from the KV, which is not supported yet;"
            " use auto"
        )


def slot_layout(engine: Engine, config: FlexKVConfig) -> KVLayout:
    """The shape of a slot of this rank.

    Raises:
        ConfigError: ``tokens_per_block`` is no multiple of the page.
    """
    return layout_for(device_segments(engine), engine.page_size, config)


def layout_for(segments: DeviceSegments, page: int, config: FlexKVConfig) -> KVLayout:
    """The shape of a slot of pages of ``page`` tokens, which ``segments`` hold; raises as :func:`slot_layout`."""
    layout = KVLayout(
        tokens_per_block=config.tokens_per_block or -(-BLOCK_TOKENS // page) * page,
        device_block_tokens=page,
        device_block_bytes=segments.block_bytes,
    )
    return layout if config.store_dtype == "engine" else quantised_layout(layout, len(segments.addresses))


def device_segments(engine: Engine) -> DeviceSegments:
    """One segment for K and one for V of a layer, one a layer with MLA; more where a page's bytes do not lie side by side.

    Raises:
        LayoutError: the pool's tensors do not lie as expected.
    """
    return pieces_of([_pages(tensor, engine) for tensor in _tensors(engine.pool)])


def identity(engine: Engine, config: FlexKVConfig) -> Mapping[str, object]:
    """What must agree before bytes may be shared; enters the root of every key."""
    pool = engine.pool
    first = _tensors(pool)[0]
    return {
        **server_identity(engine.server_args, config),
        "kv_dtype": str(pool.dtype),
        "kv_pool": type(pool).__name__,
        "kv_layout": str(getattr(pool, "kv_cache_layout", None)),
        "kv_shape": list(first.shape[1:]),
        "layers": pool.layer_num,
        "device": first.device.type,
        "tensor_parallel": engine.tp_size,
        "tensor_rank": engine.tp_rank,
    }


def server_identity(server_args: ServerArgs, config: FlexKVConfig) -> dict[str, object]:
    """The part that follows from how SGLang was started."""
    model, revision = server_args.model_path, server_args.revision
    return {
        "engine": "sglang",
        "engine_version": engine_version(),
        "model": config.model_id or model,
        "revision": config.model_revision or revision,
        # A name of the user's own stands for the weights too; otherwise they are looked at.
        "weights": None if config.model_id else weights_identity(model, revision),
        "model_overrides": str(server_args.json_model_override_args),
        "quantization": server_args.quantization,
        "weights_dtype": str(server_args.dtype),
        "attention_backend": server_args.attention_backend,
        # On a CPU, kernels are chosen by the instruction set.
        "instructions": torch.backends.cpu.get_cpu_capability() if server_args.device == "cpu" else None,
    }


def _tensors(pool: Any) -> list[torch.Tensor]:
    return list(pool.kv_buffer) if type(pool).__name__ == _MLA else [*pool.k_buffer, *pool.v_buffer]


def _pages(tensor: torch.Tensor, engine: Engine) -> torch.Tensor:
    """A view of ``tensor`` whose first dimension counts pages."""
    page = engine.page_size
    slots = engine.pool.size + page
    rows = tensor.shape[0]
    if rows == slots // page:  # a row is a page
        return tensor
    if rows < slots:
        raise LayoutError(
            f"KV pool: found a tensor of shape {tuple(tensor.shape)}; expected {slots} slots, or {slots // page} pages"
        )
    pages = slots // page
    return tensor[: pages * page].unflatten(0, (pages, page))
