"""The logic of a device copier over streams: chunks, checksums, modes; no GPU, no Triton.

:class:`~flexkv_kernels.cuda_copier.CudaCopier` adds what a GPU needs; the tests run it on streams that reorder.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import LayoutError, TransferError
from flexkv_core.layout import DeviceSegments
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import TransferOp
from flexkv_core.types import Direction
from flexkv_kernels.calibration import ModeTable
from flexkv_kernels.paths import Chunk, Mode, Paths, StagingBuffer, StagingRing, chunk_slices
from flexkv_kernels.streams import Order, Stream, Streams

logger = logging.getLogger(__name__)

PROGRAMS_DEFAULT = 128
"""Programs of a kernel at most, which the hardware spreads over the SMs; :mod:`~flexkv_kernels.cuda_streams` takes as few as will do."""

FIRST_CHUNK_BYTES = 8 << 20
"""Of a transfer: 0.15 ms of a PCIe 5 bus, after which the device has something to do."""

CHUNK_BYTES = 16 << 20
"""Through staging memory. A chunk costs the host 0.2 ms of calls (H200's machine, 2026-11-27), the bus takes 0.3 ms for it; with 8 MiB
the calls were the limit, at 0.6 of the bus, with 16 MiB it was 0.9, and no more with 32."""

UNSTAGED_CHUNK_BYTES = 32 << 20
"""Straight between slots and blocks, where a chunk takes no memory. The checksum of one chunk overlaps the copy of the next."""

LAYER_GROUP_BYTES = 128 << 20
LAYER_GROUPS_MIN = 4
"""Of a load layer by layer: each group costs the host 0.1 to 0.2 ms, in which the reader's thread does not have the interpreter. To the end
of a forward pass of 7 ms behind 500 MiB of 32 layers it took 1.04 of the time of a whole load one layer at a time, 0.95 to 1.03 with 4 at
a time, 0.81 to 0.84 with 8 (H200, 2026-11-27)."""

CHECKSUM_THREADS_MAX = 8
"""One thread took the checksums of 11 GB/s, two of 23, four of 42, eight of 72 (H200's machine, 16 cores, 2026-11-27); the bus brings 55."""

BUFFERS = 3
"""Staging buffers a direction: one that is filled, one that is sent, one to spare."""

CHUNKS_UNDER_WAY = 2 * BUFFERS
"""Of one store: the device has work left while the host takes checksums, and finished chunks wait for the host, not the device."""


_Work = Callable[[TransferOp], npt.NDArray[np.bool_]]
_Check = Callable[[], npt.NDArray[np.bool_]]
_StartCheck = Callable[[_Work, TransferOp], _Check]


@dataclass(frozen=True)
class CopierSettings:
    """What may be chosen. ``chunk_bytes``: of a staging buffer; ``unstaged_chunk_bytes``: of a chunk that needs none. ``timeout_s``: for
    the device to finish what it was given. ``programs``: of one kernel, see :data:`PROGRAMS_DEFAULT`. ``pin_budget_s``,
    ``calibration_budget_s``: at start, then it goes on without. ``checksum_threads``: for a moment at a time, the calling one included;
    0: half of the machine's cores, at most :data:`CHECKSUM_THREADS_MAX`.
    """

    chunk_bytes: int = CHUNK_BYTES
    unstaged_chunk_bytes: int = UNSTAGED_CHUNK_BYTES
    timeout_s: float = 20.0
    programs: int = PROGRAMS_DEFAULT
    pin_budget_s: float = 120.0
    calibration_budget_s: float = 5.0
    checksum_threads: int = 0


class StreamCopier:
    """Implements :class:`~flexkv_core.transfer.plan.DeviceCopier` over streams.

    Stores: the gather waits by an event for what the engine had submitted at ``mark``; ``gather`` returns when the last byte has left
    the blocks, and until then the engine keeps them (its promise to whoever stores). Loads: nothing is overwritten before what the engine
    had submitted at ``mark`` has run; ``scatter`` returns when the blocks may be read by anyone. Only the calling thread, the
    transfer thread, waits on the host, never the engine's.

    After a wait that timed out the device may still be writing: every later call is refused.
    """

    concurrent = False
    store_piece_bytes = 64 << 20  # 1.3 ms at 50 GB/s

    def __init__(self, streams: Streams, segments: DeviceSegments, settings: CopierSettings) -> None:
        self.segments = segments
        self._streams = streams
        self._settings = settings
        self._broken = ""
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="flexkv-checksum")

    def use(self, host: HostSegment, shard: int, paths: Paths, modes: ModeTable) -> None:
        """Copy between the device and ``host``'s slots from now on.

        Raises:
            LayoutError: the slots are made for blocks of another size.
        """
        self.check_slots(host)
        self._host, self._shard, self._paths, self._modes = host, shard, paths, modes
        host.checksum_threads = self._settings.checksum_threads or min(
            CHECKSUM_THREADS_MAX, max(1, (os.cpu_count() or 1) // 2)
        )
        shard_bytes = host.layout.shard_bytes
        unstaged = self._settings.unstaged_chunk_bytes // shard_bytes
        self._first_slots = max(1, FIRST_CHUNK_BYTES // shard_bytes)
        self._chunk_slots = {mode: max(1, unstaged) for mode in Mode}
        self._chunk_slots[Mode.STAGED] = max(1, paths.store_ring.buffers[0].size_bytes // shard_bytes)

    def check_slots(self, host: HostSegment) -> None:
        """Refuse slots that are made for blocks of another size.

        Raises:
            LayoutError: what was found and what was expected.
        """
        if self.segments.block_bytes != host.layout.device_block_bytes:
            raise LayoutError(
                f"KV tensors: found {self.segments.block_bytes} bytes a block in {len(self.segments.addresses)} segments; expected"
                f" {host.layout.device_block_bytes} bytes"
            )

    def close(self) -> None:
        """End the thread of the checksums."""
        self._checker.shutdown()

    def mark(self) -> object:
        """An event on the calling thread's stream."""
        return self._streams.mark()

    def gather(
        self, op: TransferOp, after: object, layers: range | None = None
    ) -> npt.NDArray[np.bool_] | None:
        """Blocks -> slots and their checksums, chunk by chunk; see the protocol."""
        self._refuse_what_cannot_be(op)
        if layers is not None:
            return self._gather_layers(op, after, layers)
        mode = self._modes.choose(Direction.STORE, self._op_bytes(op))
        parts = self._parts(op, mode)
        chunks = (self._chunk(part) for part in parts)
        under_way: deque[tuple[TransferOp, object]] = deque()
        taken: list[_Check] = []
        with self._settled(), self._checks(parts) as start:
            for part, event in zip(parts, self._paths.store(mode, chunks, after), strict=True):
                under_way.append((part, event))
                if len(under_way) >= CHUNKS_UNDER_WAY:
                    taken.append(self._finish_store(*under_way.popleft(), start))
            while under_way:
                taken.append(self._finish_store(*under_way.popleft(), start))
            return np.concatenate([check() for check in taken])

    def _gather_layers(self, op: TransferOp, after: object, layers: range) -> npt.NDArray[np.bool_] | None:
        size = self._op_bytes(op) * len(layers) // self.segments.layer_count
        mode = self._modes.choose_for_layers(Direction.STORE, size)
        with self._settled():
            self._finish(self._paths.store_layers(mode, self._chunk(op), layers, after), Order.STORED)
        return self._take_checksums(op) if layers.stop == self.segments.layer_count else None

    def scatter(self, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        """Slots -> blocks, each slot checked in host memory before it is sent; see the protocol."""
        self._refuse_what_cannot_be(op)
        mode = self._modes.choose(Direction.LOAD, self._op_bytes(op))
        parts = self._parts(op, mode)
        oks: list[npt.NDArray[np.bool_]] = []
        with self._settled(), self._checks(parts) as start:
            checks = [start(self._matches, part) if verify else partial(_unchecked, part) for part in parts]
            events = list(self._paths.load(mode, self._whole_chunks(parts, checks, oks), after))
            if events:
                # Chunks of one op take one mode, and their last step runs on one stream: the last event is after all.
                self._finish(events[-1], Order.LOADED)
        return np.concatenate(oks)

    def _whole_chunks(
        self, parts: Sequence[TransferOp], checks: Sequence[_Check], oks: list[npt.NDArray[np.bool_]]
    ) -> Iterator[Chunk]:
        """The chunks of ``parts`` without what did not pass its check; ``oks`` gets the outcome of each."""
        for part, check in zip(parts, checks, strict=True):
            ok = check()
            oks.append(ok)
            chunk = self._chunk(part, ok)
            if len(chunk.blocks):
                yield chunk

    def scatter_layers(self, op: TransferOp, after: object, on_layer: Callable[[object], None]) -> None:
        """Slots -> blocks, layer by layer; an event for every few layers; see the protocol."""
        self._refuse_what_cannot_be(op)
        chunk = self._chunk(op)
        groups = self._layer_groups(self._op_bytes(op))
        mode = self._modes.choose_for_layers(Direction.LOAD, self._op_bytes(op) // len(groups))
        layers: list[object] = []
        with self._settled():
            # All are queued before the first is announced: who reads it takes the interpreter, and may keep it for milliseconds.
            for group in groups:
                done = self._paths.load_layers(mode, chunk, group, after) if len(chunk.blocks) else None
                layers += [done] * len(group)
            for layer in layers:
                on_layer(layer)
            if len(chunk.blocks):
                self._finish(layers[-1], Order.LOADED)

    def _layer_groups(self, size_bytes: int) -> list[range]:
        """The layers of a load of ``size_bytes``, as many together as :data:`LAYER_GROUP_BYTES` allows, in four groups or more."""
        count = self.segments.layer_count
        together = max(1, min(count // LAYER_GROUPS_MIN, LAYER_GROUP_BYTES * count // size_bytes))
        return [range(start, min(start + together, count)) for start in range(0, count, together)]

    def follow(self, layer: object) -> None:
        """The calling thread's stream waits for a layer's event."""
        if layer is not None:
            self._streams.follow(layer, Order.LAYER_LOADED)

    def _parts(self, op: TransferOp, mode: Mode) -> list[TransferOp]:
        slices = chunk_slices(len(op.slots), self._first_slots, self._chunk_slots[mode])
        return [op.part(np.arange(part.start, part.stop)) for part in slices]

    @contextmanager
    def _checks(self, parts: Sequence[TransferOp]) -> Iterator[_StartCheck]:
        """What starts passes over the bytes of ``parts`` on a thread beside this one, one after another, and gives what waits for a pass's
        outcome; none runs on when this ends. A lone part is not worth the other thread: its pass runs when the outcome is asked for."""
        futures: list[Future[npt.NDArray[np.bool_]]] = []

        def start(work: _Work, part: TransferOp) -> _Check:
            if len(parts) == 1:
                return partial(work, part)
            futures.append(self._checker.submit(work, part))
            return futures[-1].result

        try:
            yield start
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _matches(self, part: TransferOp) -> npt.NDArray[np.bool_]:
        return self._host.matches(part.slots, part.keys, self._shard)

    def _chunk(self, op: TransferOp, wanted: npt.NDArray[np.bool_] | None = None) -> Chunk:
        """Every device block with the address of its image in its slot; left out where negative or its slot is not ``wanted``."""
        layout = self._host.layout
        blocks = op.blocks.reshape(len(op.slots), -1)
        shards = self._host.address + op.slots.astype(np.int64) * layout.slot_bytes
        shards += self._shard * layout.shard_bytes
        places = np.arange(blocks.shape[1], dtype=np.int64) * layout.device_block_bytes
        keep = blocks >= 0
        if wanted is not None:
            keep &= wanted[:, None]
        return Chunk(blocks[keep].astype(np.int64), (shards[:, None] + places)[keep])

    def _finish_store(self, part: TransferOp, event: object, start: _StartCheck) -> _Check:
        self._finish(event, Order.STORED)
        return start(self._take_checksums, part)

    def _take_checksums(self, part: TransferOp) -> npt.NDArray[np.bool_]:
        """Of this rank's shard of each slot, as it is in host memory now."""
        found = self._host.checksums_now(part.slots, part.keys, self._shard)
        self._host.checksums[part.slots, self._shard] = found
        return np.ones(len(part.slots), np.bool_)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """When the work inside fails, wait for what it had queued: its slots and blocks will be used for other things."""
        try:
            yield
        except Exception:
            if not self._broken:
                logger.warning("a transfer failed; waiting for what it had queued")
                for stream in Stream:
                    self._finish(self._streams.record(stream), Order.STORED)
            raise

    def _finish(self, event: object, order: Order) -> None:
        try:
            self._streams.finish(event, self._settings.timeout_s, order)
        except TransferError as error:
            self._broken = str(error)
            raise

    def _refuse_what_cannot_be(self, op: TransferOp) -> None:
        if self._broken:
            raise TransferError(f"the device's copies stopped: {self._broken}")
        slots, blocks = self._host.slot_count, self.segments.block_count
        if (op.slots < 0).any() or (op.slots >= slots).any() or (op.blocks >= blocks).any():
            raise TransferError(
                f"op {op.op_id}: a slot or block does not exist ({slots} slots, {blocks} blocks)"
            )

    def _op_bytes(self, op: TransferOp) -> int:
        return len(op.blocks) * self.segments.block_bytes


def _unchecked(part: TransferOp) -> npt.NDArray[np.bool_]:
    return np.ones(len(part.slots), np.bool_)


def staging_rings(address: int, buffer_bytes: int, buffers: int) -> tuple[StagingRing, StagingRing]:
    """Two rings, for stores and for loads, in ``2 * buffers * buffer_bytes`` of device memory."""
    places = [StagingBuffer(address + index * buffer_bytes, buffer_bytes) for index in range(2 * buffers)]
    return StagingRing(places[:buffers]), StagingRing(places[buffers:])
