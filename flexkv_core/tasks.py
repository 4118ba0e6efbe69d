"""Tasks of a BlockManager: their state and their reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from flexkv_core.cache.plans import GetPlan, PutPlan
from flexkv_core.storage.base import BlockStatus, Statuses
from flexkv_core.transfer.plan import OpStatus
from flexkv_core.types import Direction, Slots, Tier

NO_STATUSES: Statuses = np.empty(0, np.uint32)
NO_SLOTS: Slots = np.empty(0, np.int32)


class KVResponseStatus(Enum):
    """How a task stands."""

    SUCCESS = "success"
    NOTFOUND = "not_found"  # no such task
    UNREADY = "unready"  # still running, or not launched
    TIMEOUT = "timeout"  # wait() gave up; the task goes on
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True)
class KVResponse:
    """The outcome of a task. ``return_mask`` is bool [tokens]: which tokens were loaded or stored."""

    status: KVResponseStatus
    task_id: int
    return_mask: npt.NDArray[np.bool_] | None = None


class Purpose(Enum):
    """What a task that reads from the cache is for."""

    GET = "get"  # slots -> device
    PREFETCH = "prefetch"  # lower tiers -> host slots
    CHECK = "check"  # slots against what the device holds, see flexkv_core/verify.py


@dataclass(frozen=True)
class Mismatch:
    """A block whose stored bytes are not what the engine computes. ``block`` counts from the sequence's first block."""

    block: int
    tier: Tier
    key: bytes


@dataclass(frozen=True)
class TaskDone:
    """Report of a task that was started by keys. ``ok`` is bool [blocks of the task]; ``mismatches`` are those of a check."""

    task_id: int
    status: KVResponseStatus
    ok: npt.NDArray[np.bool_]
    mismatches: tuple[Mismatch, ...] = ()


OnDone = Callable[[TaskDone], None]
"""Told once how a task that was started by keys has ended."""


@dataclass
class Task:
    """One get or put. The blocks that move are ``start_block`` … ``start_block + len(slots) - 1`` of the sequence.

    ``ok`` is bool [blocks that move], all False until the end. ``on_done`` is told once.
    """

    task_id: int
    direction: Direction
    plan: GetPlan | PutPlan | None
    start_block: int
    keys: bytes
    slots: Slots
    on_done: OnDone
    purpose: Purpose = Purpose.GET
    wrong: npt.NDArray[np.bool_] | None = None  # of a check: bool [blocks], compared and found different
    mismatches: tuple[Mismatch, ...] = ()
    read_statuses: Statuses | None = None  # uint32 [reads of the plan], once all have ended
    copied: bool = False  # the copy has ended, or there is none
    copy_status: OpStatus = OpStatus.DONE
    launched: bool = False
    status: KVResponseStatus = KVResponseStatus.UNREADY
    cancelled: bool = False
    sequence_keys: bytes = (
        b""  # of a put that a remote store may want: all blocks' from the sequence's first on
    )
    ok: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))

    @property
    def block_count(self) -> int:
        """Blocks that move."""
        return len(self.slots)

    @property
    def ended(self) -> bool:
        """Whether the outcome is known."""
        return self.status is not KVResponseStatus.UNREADY

    @property
    def read_count(self) -> int:
        """Blocks that a lower tier must fill first."""
        return len(self.plan.reads) if isinstance(self.plan, GetPlan) else 0

    def awaited(self) -> npt.NDArray[np.bool_] | None:
        """bool [blocks that move], the slots that a lower tier must fill first; None if none must."""
        if not isinstance(self.plan, GetPlan) or not len(self.plan.reads):
            return None
        awaited = np.zeros(self.block_count, np.bool_)
        awaited[self.plan.reads.index] = True
        return awaited

    def unread(self) -> npt.NDArray[np.bool_]:
        """bool [blocks that move], the slots that a lower tier was to fill and did not."""
        unread = np.zeros(self.block_count, np.bool_)
        if isinstance(self.plan, GetPlan) and self.read_statuses is not None and len(self.plan.reads):
            unread[self.plan.reads.index] = self.read_statuses != BlockStatus.OK
        return unread

    def drop_unread(self) -> None:
        """What was not read has not arrived, whatever the copy says."""
        if len(self.ok):
            self.ok = self.ok & ~self.unread()

    def forget_plan(self) -> None:
        """Let go of what only a task under way needs: it may be long before its caller asks for the response."""
        self.plan, self.keys, self.sequence_keys, self.slots = None, b"", b"", NO_SLOTS


def prefix_length(ok: npt.NDArray[np.bool_]) -> int:
    """How many leading entries are True."""
    return len(ok) if ok.all() else int(ok.argmin())
