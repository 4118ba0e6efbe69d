"""Shadow verification: a sample of the hits is computed again by the engine, and the stored bytes are compared with what came out.

A checksum says that bytes have not changed since they were stored. It cannot say that they belong to their key. For a sampled hit the
adapter reports nothing found; the engine computes the blocks, and before their device blocks are freed the worker gathers them into
scratch slots and compares these with the slots that hold the same keys.

Recomputed floats differ in their last bits with the shape of the batch, so bytes are not compared but, for each piece (a layer of a
device block), the distance ``|a - b| / max(|a|, |b|)`` of the two vectors. It finds zeros (1.0), another block's bytes (about 1.4 where
values are independent, and some layer always far above the bounds below), two swapped blocks, a layer in another's place, one wrong
token among 64 (0.18), one flipped exponent bit, and whatever the engine computed wrongly once and not again. It does not find less
than the bound: a flipped low bit (the checksum's task), or drift that stays below it in every layer; nor a fault that the engine repeats.
Where the device held the blocks before a wrong one was stored, the right block behind them may be blamed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import xxhash

from flexkv_core.cache.engine import GlobalCacheEngine
from flexkv_core.cache.plans import GetPlan
from flexkv_core.errors import TransferError
from flexkv_core.metrics import Counters
from flexkv_core.ssd_link import SsdLink
from flexkv_core.storage.base import BlockStatus
from flexkv_core.storage.memory import HostSegment
from flexkv_core.tasks import Mismatch, Task
from flexkv_core.transfer.plan import DeviceCopier, OpStatus, TransferOp
from flexkv_core.types import KEY_BYTES, Direction, Slots, Tier

TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Distance of a piece from which on it counts as wrong, by the dtype of the KV cache.

Chosen from the formats: about 10,000, 40 and 25 roundings, so that the errors of many layers, of other batch shapes, and of devices
that multiply float32 with fewer bits stay below. On a CPU, SmolLM2-135M in bfloat16, 11 blocks that were computed again alone and in a
batch were equal bit for bit, and a neighbouring block's bytes were at least 1.007 away in some layer (2026-11).
"""

SCRATCH_BYTES = 16 << 20
"""What a worker takes for the recomputed side, at least one slot."""


class HitSampler:
    """Chooses a share of the hits. Which ones follows from the keys and the number of hits so far, so that a run can be repeated,
    and that no key is left out for ever."""

    def __init__(self, share: float) -> None:
        assert 0 <= share <= 1, share
        self._bound = int(share * 2**64)
        self._hits = 0

    def take(self, key: bytes) -> bool:
        """Whether this hit, whose last block has ``key``, is verified."""
        self._hits += 1
        return xxhash.xxh3_64_intdigest(key, seed=self._hits) < self._bound


class ShadowCopier:
    """A :class:`~flexkv_core.transfer.plan.DeviceCopier` whose ``scatter`` compares instead of copying; run by a TransferEngine of its own.

    Args:
        inner: copies from the same device; no other engine may use it.
        dtype: of the KV cache, a key of :data:`TOLERANCES`.
    """

    concurrent = False

    def __init__(self, inner: DeviceCopier, dtype: str) -> None:
        self.segments = inner.segments
        self.store_piece_bytes = inner.store_piece_bytes
        self._inner = inner
        self._dtype = dtype
        self._scratch: HostSegment | None = None
        self._wrong: dict[int, set[int]] = {}

    def bind(self, host: HostSegment, shard: int) -> None:
        """Compare with ``host``; see the protocol.

        Raises:
            CapacityError: no memory for the scratch slots.
        """
        self._host, self._shard = host, shard
        self._scratch = HostSegment.create(max(1, SCRATCH_BYTES // host.layout.slot_bytes), host.layout)
        self._inner.bind(self._scratch, shard)

    def mark(self) -> object:
        """See the protocol."""
        return self._inner.mark()

    def gather(self, op: TransferOp, after: object, layers: range | None = None) -> None:
        """Nothing is stored here; raises TransferError."""
        raise TransferError("a shadow copier stores nothing")

    def scatter(self, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        """Compare the device blocks with the slots; bool [n], True where they agree. Changes neither."""
        assert self._scratch is not None
        ok = np.zeros(len(op.slots), np.bool_)
        step = self._scratch.slot_count
        for start in range(0, len(op.slots), step):
            part = op.part(np.arange(start, min(start + step, len(op.slots))))
            scratch: Slots = np.arange(len(part.slots), dtype=np.int32)
            self._inner.gather(replace(part, direction=Direction.STORE, slots=scratch), after)
            for place, slot in enumerate(part.slots.tolist()):
                ok[start + place] = self._agree(slot, place)
        self._wrong.setdefault(op.op_id, set()).update(op.slots[~ok].tolist())
        return ok

    def scatter_layers(self, op: TransferOp, after: object, on_layer: Callable[[object], None]) -> None:
        """A check compares whole blocks; raises TransferError."""
        raise TransferError("a shadow copier compares whole blocks")

    def follow(self, layer: object) -> None:
        """Nothing is loaded here."""

    def take_wrong(self, op: TransferOp) -> npt.NDArray[np.bool_]:
        """bool [n]: which slots of an op that has ended were compared and found wrong."""
        return np.isin(op.slots, list(self._wrong.pop(op.op_id, ())))

    def close(self) -> None:
        """Give the scratch memory back."""
        self._inner.close()
        if self._scratch is not None:
            self._scratch.close()

    def _agree(self, slot: int, scratch: int) -> bool:
        assert self._scratch is not None
        stored, computed = self._pieces(self._host, slot), self._pieces(self._scratch, scratch)
        return bool(piece_errors(stored, computed, self._dtype).max() < TOLERANCES[self._dtype])

    def _pieces(self, host: HostSegment, slot: int) -> npt.NDArray[np.uint8]:
        """uint8 [device blocks of a slot * segments, bytes of a piece], a view of this rank's shard."""
        layout = host.layout
        address = host.address + slot * layout.slot_bytes + self._shard * layout.shard_bytes
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * layout.shard_bytes).from_address(address))
        return raw.reshape(-1, self.segments.piece_bytes)


def piece_errors(
    stored: npt.NDArray[np.uint8], computed: npt.NDArray[np.uint8], dtype: str
) -> npt.NDArray[np.float64]:
    """Distances of the rows, float64 [n]: 0 for equal bytes, infinite where a value is not finite and the bytes differ.

    ``stored``, ``computed``: uint8 [n, bytes of a piece]; ``dtype``: a key of :data:`TOLERANCES`.
    """
    errors = np.zeros(len(stored))
    rows = np.flatnonzero((stored != computed).any(axis=1))
    if not len(rows):
        return errors
    a, b = _floats(stored[rows], dtype), _floats(computed[rows], dtype)
    with np.errstate(all="ignore"):
        distance = np.sqrt(_squares(a - b) / np.maximum(_squares(a), _squares(b)))
    errors[rows] = np.where(np.isfinite(distance), distance, np.inf)
    return errors


def settle_check(
    task: Task, cache: GlobalCacheEngine, counters: Counters, ssd: SsdLink | None
) -> tuple[Mismatch, ...]:
    """Count the outcome of a check and expel what was wrong, from every tier. Called under the manager's lock, before the plan ends."""
    assert isinstance(task.plan, GetPlan)
    done = task.copy_status is OpStatus.DONE
    wrong = task.wrong if done and task.wrong is not None else np.zeros(task.block_count, np.bool_)
    checked = int((task.ok | wrong).sum()) if done else 0
    counters.verify_checked += checked
    counters.verify_skipped += task.block_count - checked
    mismatches = tuple(_expel(task, task.plan, int(index), cache, ssd) for index in np.flatnonzero(wrong))
    counters.verify_mismatches += len(mismatches)
    return mismatches


def _expel(task: Task, plan: GetPlan, index: int, cache: GlobalCacheEngine, ssd: SsdLink | None) -> Mismatch:
    block = task.start_block + index
    read = np.flatnonzero(plan.reads.index == index)
    if len(read) and task.read_statuses is not None:
        task.read_statuses[read] = BlockStatus.CORRUPT  # so that what was read is not published
    tier = Tier.SSD if len(read) else Tier.HOST
    written = cache.expel(plan, block, tier)
    if ssd is not None:
        ssd.forget(written)  # or a restart would find it again
    return Mismatch(block, tier, plan.sequence_keys[KEY_BYTES * block : KEY_BYTES * (block + 1)])


def _squares(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Sums of squares of the rows, float64 [n]."""
    sums: npt.NDArray[np.float64] = np.einsum("ij,ij->i", values, values, dtype=np.float64)
    return sums


def _floats(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.dtype(dtype)).astype(np.float32, copy=False)
