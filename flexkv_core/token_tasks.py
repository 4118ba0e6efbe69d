"""Tasks of a KVManager: sequences of tokens that a task by keys stands for, and the checks of what callers pass in."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flexkv_core.tasks import KVResponse, KVResponseStatus, TaskDone, prefix_length
from flexkv_core.types import BlockIds, Direction, TokenIds


@dataclass
class TokenTask:
    """A get, put or prefetch of a sequence of ``tokens`` tokens. The blocks that move are ``start_block`` … ``start_block + block_count - 1``.

    ``ok`` is bool [blocks that move], empty until the end.
    """

    tokens: int
    start_block: int = 0
    block_count: int = 0
    task_id: int = -1
    launched: bool = False
    direction: Direction = Direction.LOAD
    status: KVResponseStatus = KVResponseStatus.UNREADY
    ok: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))

    @property
    def ended(self) -> bool:
        """Whether the outcome is known."""
        return self.status is not KVResponseStatus.UNREADY

    def end(self, done: TaskDone) -> None:
        """Take over the outcome of the task by keys."""
        self.status, self.ok = done.status, done.ok

    def response(self, tokens_per_block: int) -> KVResponse:
        """Of a task that has ended."""
        return KVResponse(self.status, self.task_id, self.mask(prefix_length(self.ok), tokens_per_block))

    def mask(self, blocks: int, tokens_per_block: int) -> npt.NDArray[np.bool_]:
        """bool [tokens], True for the first ``blocks`` of the blocks that move."""
        mask = np.zeros(self.tokens, np.bool_)
        if self.status is not KVResponseStatus.CANCELLED:
            mask[self.start_block * tokens_per_block : (self.start_block + blocks) * tokens_per_block] = True
        return mask

    def device_blocks(
        self, slot_mapping: npt.NDArray[np.int64], tokens_per_block: int, device_block_tokens: int
    ) -> BlockIds:
        """int64 [blocks]: device blocks of the tokens that move, from the places of all tokens or of just these.

        Raises:
            ValueError: another length, or places that do not follow device blocks.
        """
        wanted = self.block_count * tokens_per_block
        if len(slot_mapping) != wanted:
            if len(slot_mapping) != self.tokens:
                raise ValueError(
                    f"slot_mapping of task {self.task_id} has {len(slot_mapping)} entries; expected {wanted} (the mask's tokens)"
                    f" or {self.tokens} (all tokens)"
                )
            start = self.start_block * tokens_per_block
            slot_mapping = slot_mapping[start : start + wanted]
        first, last = (
            slot_mapping[::device_block_tokens],
            slot_mapping[device_block_tokens - 1 :: device_block_tokens],
        )
        if (
            (first % device_block_tokens).any()
            or (last - first != device_block_tokens - 1).any()
            or (first < 0).any()
        ):
            raise ValueError(
                f"slot_mapping of task {self.task_id} does not follow blocks of {device_block_tokens} tokens: each must begin at a"
                " multiple and count up"
            )
        return np.ascontiguousarray(first // device_block_tokens)


def token_array(token_ids: TokenIds) -> TokenIds:
    """``token_ids`` as a contiguous array.

    Raises:
        ValueError: not int32 or int64, or not one dimension.
    """
    tokens = np.ascontiguousarray(token_ids)
    if tokens.ndim != 1 or tokens.dtype not in (np.int32, np.int64):
        raise ValueError(
            f"token_ids: found {tokens.dtype} of shape {tokens.shape}; expected int32 or int64, one dimension"
        )
    return tokens


def first_true(mask: npt.NDArray[np.bool_] | None, tokens: int) -> int:
    """Place of the mask's first True; 0 without a mask, ``tokens`` without a True."""
    if mask is None:
        return 0
    _check_mask(mask, tokens)
    return int(mask.argmax()) if mask.any() else tokens


def last_true(mask: npt.NDArray[np.bool_], tokens: int) -> int:
    """One past the mask's last True; 0 without one."""
    _check_mask(mask, tokens)
    return tokens - int(mask[::-1].argmax()) if mask.any() else 0


def _check_mask(mask: npt.NDArray[np.bool_], tokens: int) -> None:
    if mask.shape != (tokens,) or mask.dtype != np.bool_:
        raise ValueError(
            f"token_mask: found {mask.dtype} of shape {mask.shape}; expected bool of shape ({tokens},)"
        )
