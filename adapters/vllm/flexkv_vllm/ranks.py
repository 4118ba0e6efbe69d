"""How the ranks of one engine share a slot: a shard for each part of a block's bytes that differs from rank to rank.

Tensor parallelism splits the heads, pipeline parallelism the layers, so every rank has a shard of its own; with MLA the ranks of one
stage hold the same bytes, which are stored once. All shards are as large as the largest: a stage with fewer layers fills the rest of
its shard with the bytes of one spare piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.distributed.utils import get_pp_indices
from vllm.v1.kv_cache_interface import KVCacheSpec

from flexkv_core.errors import LayoutError
from flexkv_core.layout import DeviceSegments
from flexkv_vllm.compat.specs import is_latent
from flexkv_vllm.drafts import keeps_latent_kv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Ranks:
    """The ranks that run each transfer.

    Attributes:
        tensor_parallel: ranks of a stage.
        stage_layers: layers with KV of each pipeline stage.
        is_replicated: the ranks of a stage hold the same bytes (MLA).
    """

    tensor_parallel: int
    stage_layers: tuple[int, ...]
    is_replicated: bool

    @classmethod
    def of(cls, vllm_config: VllmConfig, specs: Sequence[KVCacheSpec]) -> Ranks:
        """``specs``: of this process's layers; with one stage, of all layers."""
        parallel = vllm_config.parallel_config
        stages = parallel.pipeline_parallel_size
        layers: tuple[int, ...] = (len(specs),)
        if stages > 1:
            total = vllm_config.model_config.get_total_num_hidden_layers()
            bounds = [get_pp_indices(total, stage, stages) for stage in range(stages)]
            layers = tuple(stop - start for start, stop in bounds)
        is_replicated = all(is_latent(spec) for spec in specs) and keeps_latent_kv(vllm_config)
        return cls(parallel.tensor_parallel_size, layers, is_replicated)

    @property
    def count(self) -> int:
        """Ranks."""
        return self.tensor_parallel * len(self.stage_layers)

    @property
    def shard_count(self) -> int:
        """Shards of a slot."""
        return len(self.stage_layers) if self.is_replicated else self.count

    def shard(self, stage: int, tensor_rank: int) -> int:
        """The shard that a rank reads, and writes if it :meth:`writes`."""
        return stage if self.is_replicated else stage * self.tensor_parallel + tensor_rank

    def writes(self, tensor_rank: int) -> bool:
        """Whether a rank stores; of ranks with the same bytes the first one does."""
        return tensor_rank == 0 or not self.is_replicated


def fill_shard(
    segments: DeviceSegments, block_bytes: int, device: torch.device
) -> tuple[DeviceSegments, torch.Tensor | None]:
    """``segments`` with as many more pieces as make a block ``block_bytes`` long, all of them one spare piece on ``device``; and that
    piece's memory, which the caller keeps, or None where nothing was missing.

    Raises:
        LayoutError: blocks are longer than that, or the rest is not a whole number of pieces.
    """
    missing, odd = divmod(block_bytes - segments.block_bytes, segments.piece_bytes)
    if missing < 0 or odd:
        raise LayoutError(
            f"KV tensors: found {segments.block_bytes} bytes a block in {len(segments.addresses)} segments; expected {block_bytes} bytes"
        )
    if not missing:
        return segments, None
    spare = torch.zeros(segments.piece_bytes, dtype=torch.uint8, device=device)
    filled = DeviceSegments(
        addresses=np.append(segments.addresses, np.full(missing, spare.data_ptr(), np.int64)),
        strides=np.append(segments.strides, np.zeros(missing, np.int64)),
        piece_bytes=segments.piece_bytes,
        block_count=segments.block_count,
        layers=None
        if segments.layers is None
        else np.append(segments.layers, np.full(missing, segments.layers.max())),
    )
    return filled, spare
