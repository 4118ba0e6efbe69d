"""RemoteWrites: sequences that wait to be written to the store that is shared, and those under way.

Sequences are written in the order in which they came, from their beginning: a block is found in the store by those before it. A batch is
leased, written and released; what has left host memory before its turn comes is not written. When more waits than the bound, the
oldest is dropped. The manager's lock guards every call.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flexkv_core.cache.engine import GlobalCacheEngine
from flexkv_core.cache.plans import GetPlan
from flexkv_core.layout import KVLayout
from flexkv_core.storage.base import BlockStatus, Statuses
from flexkv_core.storage.remote.breaker import Allow, Breaker
from flexkv_core.storage.remote.presence import Presence
from flexkv_core.tasks import prefix_length
from flexkv_core.transfer.remote_process import RemoteProcess
from flexkv_core.transfer.supervisor import Progress
from flexkv_core.types import KEY_BYTES

WRITE_BYTES = 16 << 20
"""One write: enough values to keep the client busy, little host memory pinned."""
WRITES_MAX = 2
"""Writes under way: one at the store, one waiting."""
SEQUENCES_MAX = 1024
"""That wait, whatever their length: their keys take up to 16 bytes a block."""
OFFERED_MAX = 65536
BEGIN_S = 0.02
"""The thread that writes is woken so long after an offer; awake for another reason, it begins at once. Blocks are offered when a step has ended;
by then the next one computes, and the engine's scheduler has time to spare."""
AGAIN_S = 600.0
"""A sequence that is used again and again is offered again after this long: the store may have dropped it meanwhile."""


@dataclass
class _Waiting:
    """Blocks ``start`` … of a sequence."""

    keys: bytes
    start: int

    @property
    def block_count(self) -> int:
        return len(self.keys) // KEY_BYTES - self.start


@dataclass
class _Write:
    sequence: _Waiting
    plan: GetPlan
    statuses: Statuses
    epoch: int
    is_lost: bool = False


class RemoteWrites:
    """See the module's text. ``queue_blocks``: the bound of what waits."""

    def __init__(
        self,
        process: RemoteProcess,
        cache: GlobalCacheEngine,
        presence: Presence,
        new_id: Callable[[], int],
        queue_blocks: int,
        layout: KVLayout,
    ) -> None:
        self._process = process
        self._cache = cache
        self._presence = presence
        self._new_id = new_id
        self._write_blocks = max(1, WRITE_BYTES // layout.slot_bytes)
        self._queue_blocks = max(queue_blocks, self._write_blocks)
        self._waiting: OrderedDict[bytes, _Waiting] = OrderedDict()  # by the last key
        self._waiting_blocks = 0
        self._offered: OrderedDict[bytes, float] = (
            OrderedDict()
        )  # last key of a sequence -> when it may come again
        self._writes: dict[int, _Write] = {}
        self._epoch = 0
        self.breaker = Breaker()
        self.written_blocks = 0
        self.dropped_blocks = 0
        self.failures = 0

    def offer(self, keys: bytes, start: int) -> None:
        """Blocks ``start`` … of a sequence are to be written; those before were offered already."""
        key = keys[-KEY_BYTES:]
        if key in self._waiting:
            return
        self._remember(key)
        shorter = (
            self._waiting.pop(keys[KEY_BYTES * (start - 1) : KEY_BYTES * start], None) if start else None
        )
        if shorter is not None:  # the same sequence, which has grown
            self._waiting_blocks -= shorter.block_count
            start = shorter.start
        self._enter(key, _Waiting(bytes(keys), start))
        while self._waiting_blocks > self._queue_blocks or len(self._waiting) > SEQUENCES_MAX:
            _, dropped = self._waiting.popitem(last=False)
            self._waiting_blocks -= dropped.block_count
            self.dropped_blocks += dropped.block_count
        self._process.wake(time.monotonic() + BEGIN_S)

    def offer_again(self, keys: bytes) -> None:
        """A sequence is used that may have been written before."""
        if time.monotonic() >= self._offered.get(keys[-KEY_BYTES:], 0.0):
            self.offer(keys, 0)

    def pump(self) -> bool:
        """Start writes while there are sequences that wait, and room; whether anything waits or is under way."""
        while self._waiting and len(self._writes) < WRITES_MAX and self._process.is_up:
            if self.breaker.ask() is Allow.NO or not self._write_next():
                break
        is_dead = self.breaker.state is not Allow.YES or not self._process.is_up
        return bool(self._waiting or self._writes) and not is_dead

    def take(self, progress: Progress) -> None:
        """Blocks of a write have ended."""
        write = self._writes[progress.op]
        write.statuses[progress.indexes] = progress.statuses
        write.is_lost |= progress.is_lost
        if not progress.finished:
            return
        del self._writes[progress.op]
        plan = write.plan
        self._cache.finish_get(plan)
        ok = write.statuses == BlockStatus.OK
        done = prefix_length(ok)
        self.written_blocks += int(ok.sum())
        if write.epoch == self._epoch:
            self._note(write, plan.start_block + done)
        if done == plan.count:
            self.breaker.succeeded()
            return
        self.failures += 1
        self.breaker.failed()

    def clear(self, epoch: int) -> None:
        """Nothing that waits is written; from now on values get other names."""
        self._waiting.clear()
        self._waiting_blocks = 0
        self._offered.clear()
        self._epoch = epoch

    # Inside

    def _write_next(self) -> bool:
        """Write the next batch of what waits longest, or drop it; False when the process refuses."""
        key, waiting = self._waiting.popitem(last=False)
        self._waiting_blocks -= waiting.block_count
        waiting.start = max(waiting.start, self._presence.prefix(waiting.keys, waiting.start))
        if waiting.block_count <= 0:
            return True
        stop = waiting.start + min(waiting.block_count, self._write_blocks)
        plan = self._cache.plan_get(waiting.keys[: KEY_BYTES * stop], waiting.start, fetch=False)
        if plan.lease is None:
            return True  # it has left host memory
        op = self._new_id()
        if not self._process.write(op, plan.keys, plan.host_slots, self._epoch):
            self._cache.finish_get(plan)
            self._enter(key, waiting, first=True)
            return False
        dropped = np.full(plan.count, BlockStatus.DROPPED, np.uint32)
        self._writes[op] = _Write(_Waiting(waiting.keys, waiting.start), plan, dropped, self._epoch)
        waiting.start = plan.blocks
        if waiting.block_count:
            self._enter(key, waiting, first=True)
        return True

    def _note(self, write: _Write, stop: int) -> None:
        """The store has the sequence's blocks up to ``stop``; the others wait again, in front."""
        keys, plan = write.sequence.keys, write.plan
        if stop > plan.start_block:
            self._presence.note_found(keys[: KEY_BYTES * stop])
            for end in range(KEY_BYTES * (plan.start_block + 1), KEY_BYTES * stop + 1, KEY_BYTES):
                self._presence.forget_missing(keys[end - KEY_BYTES : end])
        if stop < plan.blocks:
            key = keys[-KEY_BYTES:]
            later = self._waiting.pop(key, None)
            if later is not None:
                self._waiting_blocks -= later.block_count
            self._enter(key, _Waiting(keys, stop), first=True)

    def _enter(self, key: bytes, waiting: _Waiting, first: bool = False) -> None:
        self._waiting[key] = waiting
        self._waiting_blocks += waiting.block_count
        if first:
            self._waiting.move_to_end(key, last=False)

    def _remember(self, key: bytes) -> None:
        self._offered.pop(key, None)
        self._offered[key] = time.monotonic() + AGAIN_S
        if len(self._offered) > OFFERED_MAX:
            self._offered.popitem(last=False)
