"""KV cache groups: which device blocks of which block table belong to one FlexKV block.

vLLM gives the layers of each kind a block table of their own, a *group*; all tables name blocks of one pool. A slot holds a FlexKV
block of every group: the device blocks of group 0, then those of group 1, and so on. A group with a window gives blocks back that
have left it; its table then holds the null block in their place. So a FlexKV block is stored in the step that computes it, while every
group still has it, and only whole; a load leaves out the parts whose table holds the null block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from flexkv_core.errors import ConfigError
from flexkv_core.types import BlockIds

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

NULL_BLOCK = 0
"""vLLM's placeholder in block tables."""

LEFT_OUT = -1
"""In a transfer: this part of the slot is not copied."""

Tables = Callable[[int, int, int], list[int]]
"""``tables(group, start, stop)``: device blocks ``start`` … ``stop`` - 1 of a request in a group."""


@dataclass(frozen=True)
class Groups:
    """The groups of a model; equal in the scheduler and all workers.

    Attributes:
        slot_tokens: of a FlexKV block; a multiple of every group's block.
        block_tokens: tokens of a device block, a group.
        windows: tokens that a layer looks back, a group; None where it looks back to the beginning.

    Raises:
        ConfigError: ``slot_tokens`` is no multiple of a group's block.
    """

    slot_tokens: int
    block_tokens: tuple[int, ...]
    windows: tuple[int | None, ...]

    def __post_init__(self) -> None:
        for size in self.block_tokens:
            if self.slot_tokens % size:
                raise ConfigError(
                    f"tokens_per_block = {self.slot_tokens}: must be a multiple of the engine's block size, {math.lcm(*self.block_tokens)}"
                )

    @classmethod
    def of(cls, kv_cache_config: KVCacheConfig, tokens_per_block: int | None) -> Groups:
        """``tokens_per_block``: as it is configured; None takes the smallest that fits all groups."""
        specs = [_spec_of(group) for group in kv_cache_config.kv_cache_groups]
        sizes = tuple(spec.block_size for spec in specs)
        windows = tuple(
            spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None for spec in specs
        )
        return cls(tokens_per_block or math.lcm(*sizes), sizes, windows)

    @property
    def per_slot(self) -> int:
        """Device blocks of one FlexKV block."""
        return sum(self.slot_tokens // size for size in self.block_tokens)

    @property
    def lose_blocks(self) -> bool:
        """Whether a request's blocks may be given back, and become another's, while it runs."""
        return any(window is not None for window in self.windows)

    @property
    def fail_as_one(self) -> bool:
        """Whether a failed load costs the request all that it was promised: with several tables vLLM takes no single blocks back,
        and behind a window there is nothing to go on from."""
        return len(self.block_tokens) > 1 or self.lose_blocks

    @property
    def store_batch_max(self) -> int | None:
        """Blocks that a generating request may gather before they are stored: the oldest is still in every window. None: any number."""
        kept = [max(1, (window - 1) // self.slot_tokens) for window in self.windows if window is not None]
        return min(kept, default=None)

    def blocks(self, tables: Tables, start: int, stop: int) -> BlockIds:
        """Device blocks of the FlexKV blocks ``start`` … ``stop`` - 1, int64 [(stop - start) * per_slot], slot by slot;
        :data:`LEFT_OUT` for the null block."""
        columns = []
        for group, size in enumerate(self.block_tokens):
            ratio = self.slot_tokens // size
            ids = np.array(tables(group, start * ratio, stop * ratio), np.int64)
            columns.append(ids.reshape(stop - start, ratio))
        blocks = np.concatenate(columns, axis=1).ravel()
        blocks[blocks == NULL_BLOCK] = LEFT_OUT
        return blocks

    def leave_out_held(self, blocks: BlockIds, start: int, held_tokens: int) -> None:
        """Mark what the first ``held_tokens`` of the sequence take in ``blocks``, which begin at FlexKV block ``start``."""
        first = 0
        by_slot = blocks.reshape(-1, self.per_slot)
        for size in self.block_tokens:
            ratio = self.slot_tokens // size
            held = held_tokens // size - start * ratio
            part = by_slot[:, first : first + ratio]
            part[np.arange(part.size).reshape(part.shape) < held] = LEFT_OUT
            first += ratio

    def first_whole(self, tables: Tables, start: int, stop: int) -> int:
        """The FlexKV block from which on, up to ``stop``, no part is missing; those before ``start`` are not looked at. 0 where none
        can be missing."""
        if not self.lose_blocks:
            return 0
        lacking = (self.blocks(tables, start, stop).reshape(-1, self.per_slot) == LEFT_OUT).any(axis=1)
        return start + (int(np.flatnonzero(lacking)[-1]) + 1 if lacking.any() else 0)

    def losable(self, blocks: BlockIds) -> frozenset[int]:
        """Those of ``blocks`` that the engine may give to another request while this one runs."""
        columns = np.repeat(
            [window is not None for window in self.windows],
            [self.slot_tokens // size for size in self.block_tokens],
        )
        return frozenset(blocks.reshape(-1, self.per_slot)[:, columns].ravel().tolist())


def _spec_of(group: KVCacheGroupSpec) -> Any:
    """The group's spec; of layers that differ in size only, which share a table, the first one's, as in vLLM's scheduler."""
    unlike = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return next(iter(unlike.values())) if unlike else group.kv_cache_spec


def of_lists(tables: Sequence[Sequence[int]]) -> Tables:
    """Block ids, a list a group."""
    return lambda group, start, stop: list(tables[group][start:stop])


def of_engine(tables: Sequence[Sequence[Any]]) -> Tables:
    """vLLM's own tables, a sequence of blocks a group; only what is asked for is looked at."""
    return lambda group, start, stop: [block.block_id for block in tables[group][start:stop]]
