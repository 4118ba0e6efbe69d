"""The three ways between blocks and slots, and the events that keep each of them right. Pure logic over :class:`Streams`.

- DMA: the copy engine moves every piece by itself, no SM is used; slow for small pieces.
- STAGED: a kernel packs blocks in a staging buffer, the copy engine moves that in large pieces; and the reverse.
- DIRECT: a kernel reads or writes pinned host memory over the bus by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import numpy as np

from flexkv_core.layout import DeviceSegments
from flexkv_kernels.streams import ALL, Addresses, ImagePlace, Order, Stream, Streams


class Mode(Enum):
    """How a transfer goes."""

    DMA = "dma"
    STAGED = "staged"
    DIRECT = "direct"


@dataclass
class StagingBuffer:
    """Device memory for packed blocks; ``free`` is the event after its last use."""

    address: int
    size_bytes: int
    free: object | None = None


@dataclass
class StagingRing:
    """Buffers in turn: as many chunks are under way at once, and staging memory has that bound."""

    buffers: Sequence[StagingBuffer]
    _next: int = 0

    def take(self) -> StagingBuffer:
        """The buffer whose last use lies furthest back."""
        buffer = self.buffers[self._next]
        self._next = (self._next + 1) % len(self.buffers)
        return buffer


@dataclass(frozen=True)
class Chunk:
    """Blocks and where their images lie in host memory, int64 [n] both; at most what a staging buffer holds."""

    blocks: Addresses
    images: Addresses


@dataclass(frozen=True)
class _Step:
    """A chunk that was begun: ``event`` is after its last byte, or, with a buffer, after the first half of its way."""

    chunk: Chunk
    event: object
    buffer: StagingBuffer | None = None


@dataclass
class Paths:
    """Queues chunks on a device's streams. ``host_run_bytes`` limits how far one DMA may run: see :func:`merge_runs`. ``image_bytes``: of an
    image where it is not a block's bytes, which then only STAGED makes and takes apart; 0: it is."""

    streams: Streams
    segments: DeviceSegments
    store_ring: StagingRing
    load_ring: StagingRing
    host_base: int = 0
    host_run_bytes: int = field(default=1 << 62)
    image_bytes: int = 0

    def __post_init__(self) -> None:
        self.image_bytes = self.image_bytes or self.segments.block_bytes

    def store(self, mode: Mode, chunks: Iterable[Chunk], after: object) -> Iterator[object]:
        """Blocks -> images once ``after`` has passed; for each chunk, in order, the event after which its bytes are there."""
        return _in_turn(partial(self._begin_store, mode, after), self._send, chunks)

    def load(self, mode: Mode, chunks: Iterable[Chunk], after: object) -> Iterator[object]:
        """Images -> blocks once ``after`` has passed; for each chunk, in order, the event after which its blocks may be read."""
        return _in_turn(partial(self._begin_load, mode, after), partial(self._unpack, after), chunks)

    def _begin_store(self, mode: Mode, after: object, chunk: Chunk) -> _Step:
        streams = self.streams
        if mode is Mode.DMA:
            streams.wait(Stream.STORE_DMA, after, Order.ENGINE_WROTE)
            pieces, images, sizes = self._pieces(chunk)
            streams.copy(Stream.STORE_DMA, pieces, images, sizes)
            return _Step(chunk, streams.record(Stream.STORE_DMA))
        streams.wait(Stream.STORE_KERNEL, after, Order.ENGINE_WROTE)
        if mode is Mode.DIRECT:
            streams.gather(Stream.STORE_KERNEL, chunk.blocks, chunk.images, ImagePlace.HOST)
            return _Step(chunk, streams.record(Stream.STORE_KERNEL))
        buffer = self.store_ring.take()
        if buffer.free is not None:
            streams.wait(Stream.STORE_KERNEL, buffer.free, Order.SENT)
        staged = self._staged(buffer, chunk)
        streams.gather(Stream.STORE_KERNEL, chunk.blocks, staged, ImagePlace.STAGING)
        return _Step(chunk, streams.record(Stream.STORE_KERNEL), buffer)

    def _send(self, step: _Step) -> object:
        """The second half of a store: what was packed goes to host memory."""
        if step.buffer is None:
            return step.event
        streams, buffer = self.streams, step.buffer
        streams.wait(Stream.STORE_DMA, step.event, Order.GATHERED)
        staged, images, sizes = self._runs(buffer, step.chunk)
        streams.copy(Stream.STORE_DMA, staged, images, sizes)
        buffer.free = streams.record(Stream.STORE_DMA)
        return buffer.free

    def _begin_load(self, mode: Mode, after: object, chunk: Chunk) -> _Step:
        streams = self.streams
        if mode is Mode.DMA:
            streams.wait(Stream.LOAD_DMA, after, Order.ENGINE_READ)
            pieces, images, sizes = self._pieces(chunk)
            streams.copy(Stream.LOAD_DMA, images, pieces, sizes)
            return _Step(chunk, streams.record(Stream.LOAD_DMA))
        if mode is Mode.DIRECT:
            streams.wait(Stream.LOAD_KERNEL, after, Order.ENGINE_READ)
            streams.scatter(Stream.LOAD_KERNEL, chunk.blocks, chunk.images, ImagePlace.HOST)
            return _Step(chunk, streams.record(Stream.LOAD_KERNEL))
        buffer = self.load_ring.take()
        if buffer.free is not None:
            streams.wait(Stream.LOAD_DMA, buffer.free, Order.SCATTERED)
        staged, images, sizes = self._runs(buffer, chunk)
        streams.copy(Stream.LOAD_DMA, images, staged, sizes)
        return _Step(chunk, streams.record(Stream.LOAD_DMA), buffer)

    def _unpack(self, after: object, step: _Step) -> object:
        """The second half of a load: what arrived goes to the blocks."""
        if step.buffer is None:
            return step.event
        streams, buffer = self.streams, step.buffer
        streams.wait(Stream.LOAD_KERNEL, step.event, Order.ARRIVED)
        streams.wait(Stream.LOAD_KERNEL, after, Order.ENGINE_READ)
        staged = self._staged(buffer, step.chunk)
        streams.scatter(Stream.LOAD_KERNEL, step.chunk.blocks, staged, ImagePlace.STAGING)
        buffer.free = streams.record(Stream.LOAD_KERNEL)
        return buffer.free

    def load_layers(self, mode: Mode, chunk: Chunk, layers: range, after: object) -> object:
        """The pieces of some layers -> blocks once ``after`` has passed, behind the layers before; the event after which these layers
        may be read. STAGED has no gain here: a layer's pieces are apart in the images."""
        assert mode is not Mode.STAGED, mode
        streams, stream = self.streams, Stream.LOAD_DMA if mode is Mode.DMA else Stream.LOAD_KERNEL
        streams.wait(stream, after, Order.ENGINE_READ)
        for run in self.segments.runs_of(layers.start, len(layers)):
            if mode is Mode.DMA:
                pieces, images, sizes = self._pieces(chunk, run)
                streams.copy(stream, images, pieces, sizes)
            else:
                streams.scatter(stream, chunk.blocks, chunk.images, ImagePlace.HOST, run)
        return streams.record(stream)

    def store_layers(self, mode: Mode, chunk: Chunk, layers: range, after: object) -> object:
        """The pieces of some layers -> their places in the images once ``after`` has passed; the event after which they are there. STAGED
        has no gain here either."""
        assert mode is not Mode.STAGED, mode
        streams, stream = self.streams, Stream.STORE_DMA if mode is Mode.DMA else Stream.STORE_KERNEL
        streams.wait(stream, after, Order.LAYER_WRITTEN)
        for run in self.segments.runs_of(layers.start, len(layers)):
            if mode is Mode.DMA:
                pieces, images, sizes = self._pieces(chunk, run)
                streams.copy(stream, pieces, images, sizes)
            else:
                streams.gather(stream, chunk.blocks, chunk.images, ImagePlace.HOST, run)
        return streams.record(stream)

    def _pieces(self, chunk: Chunk, run: slice = ALL) -> tuple[Addresses, Addresses, Addresses]:
        """Address of every piece, of its place in its image, and its size; of the segments of ``run`` alone."""
        segments = self.segments
        pieces = segments.addresses[run] + chunk.blocks[:, None] * segments.strides[run]
        within = np.arange(len(segments.addresses), dtype=np.int64)[run] * segments.piece_bytes
        images = chunk.images[:, None] + within
        return pieces.ravel(), images.ravel(), np.full(pieces.size, segments.piece_bytes, np.int64)

    def _staged(self, buffer: StagingBuffer, chunk: Chunk) -> Addresses:
        image_bytes = self.image_bytes
        assert len(chunk.blocks) * image_bytes <= buffer.size_bytes, (len(chunk.blocks), buffer.size_bytes)
        return buffer.address + np.arange(len(chunk.blocks), dtype=np.int64) * image_bytes

    def _runs(self, buffer: StagingBuffer, chunk: Chunk) -> tuple[Addresses, Addresses, Addresses]:
        """The chunk as few copies: address in the staging buffer, in host memory, size."""
        images, sizes = merge_runs(chunk.images, self.image_bytes, self.host_base, self.host_run_bytes)
        return buffer.address + np.cumsum(sizes) - sizes, images, sizes


def _in_turn(
    begin: Callable[[Chunk], _Step], end: Callable[[_Step], object], chunks: Iterable[Chunk]
) -> Iterator[object]:
    """Begin each chunk before the one before it is ended. Streams may share a hardware queue, which runs what it holds in the order in
    which it came: a second half that waits there would keep the next first half from starting, and the bus would idle meanwhile (0.5 to
    0.75 of it was used, H200, 2026-11-27)."""
    held = None
    for chunk in chunks:
        step = begin(chunk)
        if held is not None:
            yield end(held)
        held = step
    if held is not None:
        yield end(held)


def merge_runs(images: Addresses, image_bytes: int, base: int, run_bytes: int) -> tuple[Addresses, Addresses]:
    """Join images that follow each other in memory: start and size of each run.

    No run crosses ``base`` plus a multiple of ``run_bytes``: host memory is pinned in pieces of that size, and one DMA stays in one.
    """
    joined = np.diff(images) == image_bytes
    if not joined.any():  # as a rule
        return images, np.full(len(images), image_bytes, np.int64)
    joined &= np.diff((images - base) // run_bytes) == 0
    first = np.ones(len(images), np.bool_)
    np.logical_not(joined, out=first[1:])
    starts = np.flatnonzero(first)
    counts = np.empty(len(starts), np.int64)
    counts[:-1] = starts[1:] - starts[:-1]
    counts[-1] = len(images) - starts[-1]
    return images[starts], counts * image_bytes


def chunk_slices(count: int, first: int, most: int) -> Iterator[slice]:
    """Cut ``count`` slots into chunks, the first of ``first``, each later one twice as large, up to ``most``.

    The first is small, so that the device starts while the host checks the next; the others are large, because each costs the host
    a tenth of a millisecond of calls, and on a GPU that computes each kernel waits for room.
    """
    most = max(1, most)
    start, size = 0, max(1, min(first, most))
    while start < count:
        yield slice(start, min(start + size, count))
        start, size = start + size, min(2 * size, most)
