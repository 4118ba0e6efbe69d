"""vLLM's KV cache in FlexKV's words: the shape of a slot, the segments of the tensors, and which models are understood.

Whole blocks are moved, never parts of one: on a CPU the bytes within a block are packed in a way that the tensor's shape does not tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.kv_cache_interface import KVCacheSpec

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import ConfigError, LayoutError
from flexkv_core.layout import DeviceSegments, KVLayout
from flexkv_core.quantised import check_quantisable, quantised_layout
from flexkv_core.verify import TOLERANCES
from flexkv_core.weights import weights_identity
from flexkv_kernels.segments import pieces_of
from flexkv_vllm.compat import specs
from flexkv_vllm.compat.hybrid import takes_groups
from flexkv_vllm.drafts import check_drafter, drafter_identity
from flexkv_vllm.groups import Groups
from flexkv_vllm.ranks import Ranks

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec


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
    model = vllm_config.model_config
    if model.is_hybrid or model.is_attention_free:
        raise ConfigError(
            f"FlexKV: {model.model} keeps a recurrent state (Mamba, linear attention or short convolutions). vLLM has it where a step"
            " ended and not for every block, so that a prefix of blocks is no place to go on from; that is not supported yet. Start"
            " vLLM without FlexKV for this model"
        )
    check_drafter(vllm_config, config)
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise ConfigError(
            "FlexKV: calculate_kv_scales takes the scales of a quantised KV cache from the first request, so that stored KV is wrong after"
            " a restart; leave it off and use a checkpoint with scales"
        )
    dtype = _kv_dtype(vllm_config)
    if config.store_dtype == "fp8":
        check_quantisable(dtype)
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
    groups = Groups.of(kv_cache_config, config.tokens_per_block)
    for name, spec in _layer_specs(kv_cache_config):
        if type(spec) not in specs.SUPPORTED:
            raise ConfigError(
                f"FlexKV: layer {name} keeps its KV as {type(spec).__name__}, which is not supported; supported are"
                f" {', '.join(sorted(kind.__name__ for kind in specs.SUPPORTED))}"
            )
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    if groups.fail_as_one and not takes_groups(transfer):
        raise ConfigError(
            f"FlexKV: the model keeps its KV in windows or in several groups. That needs vLLM 0.30 or later and the connector"
            f" FlexKVConnector; found {transfer.kv_connector}"
        )
    _check_groups(vllm_config, kv_cache_config, config)
    stages = vllm_config.parallel_config.pipeline_parallel_size
    sizes = {spec.page_size_bytes for _, spec in _layer_specs(kv_cache_config)}
    if stages > 1 and len(sizes) > 1:
        raise ConfigError(
            f"FlexKV: pipeline_parallel_size = {stages} with layers of {sorted(sizes)} bytes a block is not supported yet; it must be 1"
        )


def _check_groups(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: FlexKVConfig) -> None:
    """What cannot be done for a model with several groups."""
    groups = kv_cache_config.kv_cache_groups
    if config.store_dtype == "fp8":
        _check_quantisable_groups(kv_cache_config)
    if len(groups) == 1:
        return
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ConfigError(
            f"FlexKV: pipeline_parallel_size = {stages} with {len(groups)} KV cache groups is not supported yet; it must be 1, or start"
            " vLLM with --disable-hybrid-kv-cache-manager"
        )
    sizes = sorted({sum(spec.page_size_bytes for _, spec in _group_specs(group)) for group in groups})
    if config.verify_sample and len(sizes) > 1:
        # The rest of a smaller group's blocks are bytes that nobody wrote: they differ from one computation to the next.
        raise ConfigError(
            f"verify_sample = {config.verify_sample}: the model's KV cache groups have {sizes} bytes a block, and blocks that are not"
            " filled cannot be compared; set it to 0"
        )


def _check_quantisable_groups(kv_cache_config: KVCacheConfig) -> None:
    """What cannot be kept as fp8."""
    count = len(kv_cache_config.kv_cache_groups)
    if count > 1:
        # Blocks of the groups lie over each other, and what a group does not fill are bytes that nobody wrote: no values to be scaled.
        raise ConfigError(
            f"store_dtype = fp8: the model keeps its KV in {count} groups of layers, which is not supported yet; set it to engine, or start"
            " vLLM with --disable-hybrid-kv-cache-manager"
        )
    for _, spec in _layer_specs(kv_cache_config):
        check_quantisable(str(getattr(spec, "dtype", "unknown")).removeprefix("torch."))


def ranks_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Ranks:
    """How the engine's ranks share a slot; equal in the scheduler and all workers."""
    return Ranks.of(vllm_config, [spec for _, spec in _layer_specs(kv_cache_config)])


def slot_layout(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: FlexKVConfig) -> KVLayout:
    """The shape of a slot; equal in the scheduler and all workers.

    Raises:
        ConfigError: ``tokens_per_block`` is no multiple of the engine's block size.
    """
    layout = engine_layout(vllm_config, kv_cache_config, config)
    if config.store_dtype == "engine":
        return layout
    # The scheduler does not know whether K and V lie apart; there is room for a scale of each.
    return quantised_layout(layout, 2 * max(ranks_of(vllm_config, kv_cache_config).stage_layers))


def engine_layout(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: FlexKVConfig) -> KVLayout:
    """The shape of a slot that holds the engine's own bytes; raises as :func:`slot_layout`."""
    groups = Groups.of(kv_cache_config, config.tokens_per_block)
    ranks = ranks_of(vllm_config, kv_cache_config)
    sizes = [spec.page_size_bytes for _, spec in _layer_specs(kv_cache_config)]
    is_hybrid = len(groups.block_tokens) > 1
    return KVLayout(
        tokens_per_block=groups.slot_tokens,
        device_block_tokens=min(groups.block_tokens),
        device_block_bytes=_pool_block_bytes(kv_cache_config)
        if len(ranks.stage_layers) == 1
        else sizes[0] * max(ranks.stage_layers),
        shard_count=ranks.shard_count,
        device_blocks=groups.per_slot if is_hybrid else 0,
    )


def _pool_block_bytes(kv_cache_config: KVCacheConfig) -> int:
    """Bytes that one block id stands for, the groups lying over each other. The scheduler knows the memory of every layer, and of a
    group of unlike layers only the first one's spec."""
    tensors = kv_cache_config.kv_cache_tensors
    shared = hasattr(
        tensors[0], "layer_stride"
    )  # then every tensor is a view of one memory, before 0.30 each has its own
    size = tensors[0].size if shared else sum(tensor.size for tensor in tensors)
    return int(size // kv_cache_config.num_blocks)


def device_segments(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig) -> DeviceSegments:
    """One segment a layer, or several where its blocks are not contiguous (K and V apart); layers that share a tensor count once, as do
    layers of several groups that lie over each other.

    Raises:
        LayoutError: a tensor's blocks do not lie as expected.
    """
    block_count = kv_cache_config.num_blocks
    planes: dict[int, torch.Tensor] = {}
    layers: list[int] = []
    for name in sorted(kv_caches, key=_layer_order(kv_cache_config)):
        found = []
        for plane in _planes(name, kv_caches[name], block_count):
            known = planes.get(plane.data_ptr(), plane)
            if _extent(known) != _extent(plane):
                return _whole_blocks(kv_caches, kv_cache_config)
            if plane.data_ptr() not in planes:
                found.append(plane)
        planes |= {plane.data_ptr(): plane for plane in found}
        layers += [layers[-1] + 1 if layers else 0] * len(found)
    return pieces_of(list(planes.values()), layers=layers)


def layer_numbers(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig) -> dict[str, int]:
    """Each layer as the segments of :func:`device_segments` count them; layers that share a tensor have one number."""
    numbers: dict[int, int] = {}
    for name in sorted(kv_caches, key=_layer_order(kv_cache_config)):
        numbers.setdefault(kv_caches[name].data_ptr(), len(numbers))
    return {name: numbers[tensor.data_ptr()] for name, tensor in kv_caches.items()}


def _whole_blocks(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig) -> DeviceSegments:
    """Groups whose layers are not equally large lie over each other in no common pieces; a block of all its layers is one then."""
    size, count = _pool_block_bytes(kv_cache_config), kv_cache_config.num_blocks
    planes = [plane for name in kv_caches for plane in _planes(name, kv_caches[name], count)]
    extents = sorted({_extent(plane) for plane in planes})
    if any(stride != size for _, stride in extents):
        raise LayoutError(
            f"KV tensors: found blocks of {extents} (bytes, stride) of layers that share memory; expected equal ones, or a stride of"
            f" {size} bytes, the whole block's, in all of them"
        )
    base = min(plane.data_ptr() for plane in planes)
    return DeviceSegments(np.array([base]), np.array([size]), size, count)


def _extent(plane: torch.Tensor) -> tuple[int, int]:
    """Bytes of a block and from one to the next."""
    size = plane.element_size()
    return plane[0].numel() * size, plane.stride(0) * size


def identity(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: FlexKVConfig
) -> dict[str, object]:
    """What must agree before bytes may be shared; enters the root of every key."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    groups = kv_cache_config.kv_cache_groups
    _, spec = next(iter(_layer_specs(kv_cache_config)))
    import vllm

    # Only there where a model has several: data of models with one keep their name.
    hybrid = {"groups": [_group_identity(group) for group in groups]} if len(groups) > 1 else {}
    # The scheduler knows one layer's spec of a group of unlike layers, so what made them unlike.
    unquantised = sorted(getattr(cache, "kv_cache_dtype_skip_layers", None) or ())
    mixed = {"kv_dtype_skip_layers": unquantised} if unquantised else {}
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
        "packing": _cpu_packing() if vllm_config.device_config.device_type == "cpu" else None,
        "tensor_parallel": vllm_config.parallel_config.tensor_parallel_size,
        **hybrid,
        **mixed,
        **drafter_identity(vllm_config, config),
    }


def _cpu_packing() -> str:
    """The instruction set for which vLLM's kernels pack K on this CPU. Tiles (AMX), which change it for bfloat16, are no part of torch's
    word for the capability."""
    tiles = "+AMX" if torch.cpu._is_amx_tile_supported() else ""
    return torch.backends.cpu.get_cpu_capability() + tiles


def _group_identity(group: KVCacheGroupSpec) -> list[object]:
    """The group's layers and how each keeps its KV."""
    return [[name, repr(spec)] for name, spec in _group_specs(group)]


def _kv_dtype(vllm_config: VllmConfig) -> str:
    """Of the KV cache, in torch's words where the model's own is kept, otherwise in vLLM's."""
    kept = str(vllm_config.cache_config.cache_dtype)
    dtype = vllm_config.model_config.dtype if kept == "auto" else kept
    return str(dtype).removeprefix("torch.")


def _layer_specs(kv_cache_config: KVCacheConfig) -> list[tuple[str, KVCacheSpec]]:
    """Name and spec of every layer, group by group, in vLLM's order."""
    return [found for group in kv_cache_config.kv_cache_groups for found in _group_specs(group)]


def _group_specs(group: KVCacheGroupSpec) -> list[tuple[str, KVCacheSpec]]:
    per_layer: Mapping[str, Any] | None = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return [(name, per_layer[name] if per_layer else group.kv_cache_spec) for name in group.layer_names]


def _layer_order(kv_cache_config: KVCacheConfig) -> Any:
    names = [name for group in kv_cache_config.kv_cache_groups for name in group.layer_names]
    order = {name: index for index, name in enumerate(names)}
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
