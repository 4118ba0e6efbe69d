"""vLLM's KV cache in FlexKV's words: the shape of a slot, the segments of the tensors, and which models are understood.

Whole blocks are moved, never parts of one: on a CPU the bytes within a block are packed in a way that the tensor's shape does not tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import ConfigError, LayoutError
from flexkv_core.layout import DeviceSegments, KVLayout
from flexkv_core.verify import TOLERANCES
from flexkv_core.weights import weights_identity
from flexkv_kernels.segments import pieces_of
from flexkv_vllm.ranks import Ranks

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_SUPPORTED_SPECS = (FullAttentionSpec, MLAAttentionSpec)
_DRAFTS_WITHOUT_KV = ("ngram", "suffix")


def check_engine(vllm_config: VllmConfig, config: FlexKVConfig) -> None:
    """Refuse options of the engine under which requests would not be served right; known before it loads anything.

    Raises:
        ConfigError: with the reason and what to change.
    """
    parallel = vllm_config.parallel_config
    for name, value in (
        ("decode_context_parallel_size", getattr(parallel, "decode_context_parallel_size", 1)),
        ("prefill_context_parallel_size", getattr(parallel, "prefill_context_parallel_size", 1)),
    ):
        if value != 1:
            raise ConfigError(f"FlexKV: {name} = {value} is not supported yet; it must be 1")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTS_WITHOUT_KV:
        raise ConfigError(
            f"FlexKV: speculative decoding with method {speculative.method!r} keeps KV of a draft model, which is not supported yet;"
            f" allowed: {', '.join(_DRAFTS_WITHOUT_KV)}"
        )
    dtype = _kv_dtype(vllm_config)
    if config.verify_sample and dtype not in TOLERANCES:
        raise ConfigError(
            f"verify_sample = {config.verify_sample}: the KV cache has dtype {dtype}, which cannot be compared; set it to 0. Dtypes that"
            f" can: {', '.join(TOLERANCES)}"
        )


def check_supported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: FlexKVConfig) -> None:
    """:func:`check_engine`, and what the KV cache of the model tells.

    Raises:
        ConfigError: with the reason and what to change.
    """
    check_engine(vllm_config, config)
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups}))
        raise ConfigError(
            f"FlexKV: the model has {len(groups)} KV cache groups ({kinds}); only models with one group of full attention or MLA are"
            " supported yet"
        )
    for name, spec in _layer_specs(kv_cache_config):
        if type(spec) not in _SUPPORTED_SPECS:
            raise ConfigError(
                f"FlexKV: layer {name} keeps its KV as {type(spec).__name__}; only full attention and MLA are supported yet,"
                " because other layers do not keep every block"
            )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    sizes = {spec.page_size_bytes for _, spec in _layer_specs(kv_cache_config)}
    if stages > 1 and len(sizes) > 1:
        raise ConfigError(
            f"FlexKV: pipeline_parallel_size = {stages} with layers of {sorted(sizes)} bytes a block is not supported yet; it must be 1"
        )


def ranks_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Ranks:
    """How the engine's ranks share a slot; equal in the scheduler and all workers."""
    return Ranks.of(vllm_config, [spec for _, spec in _layer_specs(kv_cache_config)])


def slot_layout(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: FlexKVConfig) -> KVLayout:
    """The shape of a slot; equal in the scheduler and all workers.

    Raises:
        ConfigError: ``tokens_per_block`` is no multiple of the engine's block size.
    """
    block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    ranks = ranks_of(vllm_config, kv_cache_config)
    sizes = [spec.page_size_bytes for _, spec in _layer_specs(kv_cache_config)]
    return KVLayout(
        tokens_per_block=config.tokens_per_block or block_size,
        device_block_tokens=block_size,
        device_block_bytes=sum(sizes) if len(ranks.stage_layers) == 1 else sizes[0] * max(ranks.stage_layers),
        shard_count=ranks.shard_count,
    )


def device_segments(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig) -> DeviceSegments:
    """One segment a layer, or several where its blocks are not contiguous (K and V apart); layers that share a tensor count once.

    Raises:
        LayoutError: a tensor's blocks do not lie as expected.
    """
    block_count = kv_cache_config.num_blocks
    planes: dict[int, torch.Tensor] = {}
    layers: list[int] = []
    for name in sorted(kv_caches, key=_layer_order(kv_cache_config)):
        found = [
            plane for plane in _planes(name, kv_caches[name], block_count) if plane.data_ptr() not in planes
        ]
        planes |= {plane.data_ptr(): plane for plane in found}
        layers += [layers[-1] + 1 if layers else 0] * len(found)
    return pieces_of(list(planes.values()), layers=layers)


def layer_numbers(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig) -> dict[str, int]:
    """Each layer as the segments of :func:`device_segments` count them; layers that share a tensor have one number."""
    numbers: dict[int, int] = {}
    for name in sorted(kv_caches, key=_layer_order(kv_cache_config)):
        numbers.setdefault(kv_caches[name].data_ptr(), len(numbers))
    return {name: numbers[tensor.data_ptr()] for name, tensor in kv_caches.items()}


def identity(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: FlexKVConfig
) -> dict[str, object]:
    """What must agree before bytes may be shared; enters the root of every key."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    _, spec = next(iter(_layer_specs(kv_cache_config)))
    import vllm

    return {
        "engine": "vllm",
        "engine_version": vllm.__version__,
        "model": config.model_id or model.model,
        "revision": config.model_revision or model.revision,
        # A name of the user's own stands for the weights too; otherwise they are looked at.
        "weights": None if config.model_id else weights_identity(model.model, model.revision),
        "quantization": model.quantization,
        "weights_dtype": str(model.dtype),
        "kv_dtype": str(cache.cache_dtype),
        "kv_spec": repr(spec),
        "kv_layout": getattr(kv_cache_config, "kv_cache_layout", None),
        "stage_layers": list(ranks_of(vllm_config, kv_cache_config).stage_layers),
        "device": vllm_config.device_config.device_type,
        # On a CPU, K is packed for the instruction set that the kernels chose.
        "packing": torch.backends.cpu.get_cpu_capability()
        if vllm_config.device_config.device_type == "cpu"
        else None,
        "tensor_parallel": vllm_config.parallel_config.tensor_parallel_size,
    }


def _kv_dtype(vllm_config: VllmConfig) -> str:
    """Of the KV cache, in torch's words where the model's own is kept, otherwise in vLLM's."""
    kept = str(vllm_config.cache_config.cache_dtype)
    dtype = vllm_config.model_config.dtype if kept == "auto" else kept
    return str(dtype).removeprefix("torch.")


def _layer_specs(kv_cache_config: KVCacheConfig) -> Iterable[tuple[str, KVCacheSpec]]:
    """Name and spec of every layer of the one group, in vLLM's order."""
    group = kv_cache_config.kv_cache_groups[0]
    per_layer: Mapping[str, Any] | None = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return [(name, per_layer[name] if per_layer else group.kv_cache_spec) for name in group.layer_names]


def _layer_order(kv_cache_config: KVCacheConfig) -> Any:
    order = {name: index for index, name in enumerate(kv_cache_config.kv_cache_groups[0].layer_names)}
    return lambda name: (order.get(name, len(order)), name)


def _planes(name: str, tensor: torch.Tensor, block_count: int) -> list[torch.Tensor]:
    """Views of ``tensor`` whose first dimension counts the engine's blocks."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
        raise LayoutError(
            f"KV cache of {name}: found {type(tensor).__name__}; expected one tensor of at least two dimensions"
        )
    if tensor.shape[0] == 2 and tensor.shape[0] != block_count and tensor.shape[1] % block_count == 0:
        return [plane for half in tensor for plane in _planes(name, half, block_count)]
    if tensor.shape[0] % block_count:
        raise LayoutError(
            f"KV cache of {name}: found shape {tuple(tensor.shape)}; expected the first dimension to be a multiple of the"
            f" {block_count} blocks of the engine"
        )
    split = tensor.shape[0] // block_count  # kernels may divide an engine's block into several of their own
    return [tensor if split == 1 else tensor.unflatten(0, (block_count, split))]
