"""Ranks that share slots: shards of tensor and pipeline parallelism, uneven stages, and MLA, which is stored once."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from flexkv_core.errors import LayoutError
from flexkv_core.layout import KVLayout
from flexkv_core.storage.checksum import slot_checksums
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import TransferOp
from flexkv_core.types import KEY_BYTES, Direction
from flexkv_kernels import CpuCopier, pieces_of
from flexkv_vllm.ranks import Ranks, fill_shard

BLOCKS = 12
PIECE_BYTES = 1024
SPEC = FullAttentionSpec(block_size=64, num_kv_heads=2, head_size=64, dtype=torch.float32)
LATENT = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32)


def ranks_of(tensor: int, pipeline: int, layers: int, spec: object = SPEC) -> Ranks:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: layers),
        speculative_config=None,
    )
    return Ranks.of(config, [spec] * (layers // pipeline))


class Rank:
    """One rank's tensors and its copier over the common segment."""

    def __init__(self, ranks: Ranks, stage: int, tensor_rank: int, host: HostSegment) -> None:
        self.writes = ranks.writes(tensor_rank)
        layers = ranks.stage_layers[stage]
        self.storage = torch.randint(0, 256, (layers, BLOCKS, PIECE_BYTES), dtype=torch.uint8)
        found = pieces_of(list(self.storage))
        segments, self._spare = fill_shard(found, host.layout.device_block_bytes, self.storage.device)
        self.copier = CpuCopier(segments)
        self.copier.bind(host, ranks.shard(stage, tensor_rank))


def make_ranks(ranks: Ranks) -> tuple[HostSegment, list[Rank]]:
    layout = KVLayout(64, 64, PIECE_BYTES * max(ranks.stage_layers), ranks.shard_count)
    host = HostSegment.create(8, layout)
    stages = range(len(ranks.stage_layers))
    made = [Rank(ranks, stage, rank, host) for stage in stages for rank in range(ranks.tensor_parallel)]
    if ranks.is_replicated:
        for rank in made:
            first = made[made.index(rank) // ranks.tensor_parallel * ranks.tensor_parallel]
            rank.storage.copy_(first.storage)
    return host, made


@pytest.mark.parametrize(
    ("tensor", "pipeline", "layers", "spec"),
    [
        (1, 1, 4, SPEC),
        (4, 1, 2, SPEC),
        (8, 1, 2, SPEC),
        (1, 2, 4, SPEC),
        (2, 2, 5, SPEC),
        (1, 3, 8, SPEC),
        (4, 1, 2, LATENT),
        (2, 2, 5, LATENT),
    ],
)
def test_round_trip_through_one_slot(tensor: int, pipeline: int, layers: int, spec: object) -> None:
    """Every rank gets back what it had; the checksums are those of whole shards, as the storage side sums them."""
    ranks = ranks_of(tensor, pipeline, layers, spec)
    assert sum(ranks.stage_layers) == layers
    host, members = make_ranks(ranks)
    keys = os.urandom(3 * KEY_BYTES)
    slots = np.array([5, 0, 7], np.int32)
    blocks = np.array([1, 11, 4], np.int64)
    stored = [rank.storage.clone() for rank in members]
    for rank in members:
        if rank.writes:
            rank.copier.gather(TransferOp(1, Direction.STORE, keys, slots, blocks), None)
    assert sum(rank.writes for rank in members) == ranks.shard_count
    found = slot_checksums(host.address, host.layout, slots, np.frombuffer(keys, np.uint64).reshape(-1, 2))
    assert (found == host.checksums[slots]).all()
    moved = np.array([9, 2, 3], np.int64)
    for rank, before in zip(members, stored, strict=True):
        rank.storage.zero_()
        assert rank.copier.scatter(TransferOp(2, Direction.LOAD, keys, slots, moved), None, verify=True).all()
        assert torch.equal(rank.storage[:, moved], before[:, blocks])
        rank.storage[:, moved] = 0
        assert not rank.storage.any(), "nothing else was written"
    host.close()


def test_no_two_ranks_write_one_shard() -> None:
    for ranks in (ranks_of(8, 1, 2), ranks_of(2, 4, 9), ranks_of(4, 2, 6, LATENT)):
        places = [
            ranks.shard(stage, rank)
            for stage in range(len(ranks.stage_layers))
            for rank in range(ranks.tensor_parallel)
            if ranks.writes(rank)
        ]
        assert sorted(places) == list(range(ranks.shard_count))


@pytest.mark.parametrize("block_bytes", [PIECE_BYTES, 2 * PIECE_BYTES + 512])
def test_blocks_that_do_not_fill_the_shard_evenly_are_refused(block_bytes: int) -> None:
    segments = pieces_of(list(torch.zeros(2, BLOCKS, PIECE_BYTES, dtype=torch.uint8)))
    with pytest.raises(LayoutError, match=f"expected {block_bytes} bytes"):
        fill_shard(segments, block_bytes, torch.device("cpu"))
