"""CUDA's streams and events for the device copier: torch's streams, Triton's kernels, the driver's copies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from flexkv_core.errors import TransferError
from flexkv_core.layout import DeviceSegments
from flexkv_kernels.access import choose_access
from flexkv_kernels.cuda_driver import CudaDriver
from flexkv_kernels.paged_copy import SegmentTable, gather, scatter
from flexkv_kernels.stream_copier import PROGRAMS_DEFAULT
from flexkv_kernels.streams import ALL, Addresses, ImagePlace, Order, Stream

_SPIN_S = 50e-6
_SLEEP_S = 20e-6

# Loads first: a request waits for them, nobody for a store. And each its own: a process has few hardware queues for the streams of one
# priority, and in an engine with many streams a kernel and a DMA that share a queue run one after the other.
_PRIORITY = {Stream.LOAD_KERNEL: -3, Stream.LOAD_DMA: -2, Stream.STORE_DMA: -1, Stream.STORE_KERNEL: 0}

BUS_BYTES = 128 << 10
"""What a kernel keeps under way to fill the bus, no more: on an H200 (PCIe 5, 55 GB/s, 2026-11-27) this reached what 64 KiB in each of
64 programs did, 0.82–0.87 of a DMA, and slowed a matrix product by 1–7 % where 64 programs of 8 KiB did by 27 %."""

PROGRAMS_MIN = 16
PROGRAMS_STAGING = 64
"""Within device memory: several times as fast as the bus, which is enough."""

PROGRAMS_LAYER = 64
"""For one layer of a load, which the engine waits for while it computes the layers before."""


class CudaStreams:
    """Implements :class:`~flexkv_kernels.streams.Streams` on one NVIDIA GPU.

    Args:
        device: whose memory ``segments`` lie in.
        segments: what the kernels copy.
        image_alignment: every image's address will be a multiple of this.
        programs: of one kernel at most; how much of the GPU a copy may take.
    """

    def __init__(
        self,
        device: torch.device,
        segments: DeviceSegments,
        image_alignment: int,
        programs: int = PROGRAMS_DEFAULT,
    ) -> None:
        self.driver = CudaDriver()
        self._device = device
        self._access = choose_access(segments, image_alignment)
        self._table = SegmentTable.on(device, segments)
        self._programs = programs
        self._streams = {stream: torch.cuda.Stream(device, _PRIORITY[stream]) for stream in Stream}
        self._uploaded: dict[Stream, tuple[Addresses, Addresses, torch.Tensor, torch.Tensor]] = {}
        torch.cuda.synchronize(device)  # the table has arrived before any stream reads it

    def mark(self) -> object:
        """An event on the calling thread's current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def record(self, stream: Stream) -> object:
        """See the protocol."""
        event = torch.cuda.Event()
        event.record(self._streams[stream])
        return event

    def wait(self, stream: Stream, event: object, order: Order) -> None:
        """See the protocol."""
        self._streams[stream].wait_event(_cuda_event(event))

    def follow(self, event: object, order: Order) -> None:
        """See the protocol."""
        torch.cuda.current_stream(self._device).wait_event(_cuda_event(event))

    def finish(self, event: object, timeout_s: float, order: Order) -> None:
        """Poll, because the driver's own wait has no deadline."""
        cuda_event, started = _cuda_event(event), time.monotonic()
        try:
            while not cuda_event.query():
                waited = time.monotonic() - started
                if waited > timeout_s:
                    raise TransferError(f"the device did not finish within {timeout_s:g} s: {order.value}")
                if waited > _SPIN_S:
                    time.sleep(_SLEEP_S)
        except TransferError:
            raise
        except RuntimeError as error:  # what the device did wrong earlier shows here
            raise TransferError(f"CUDA: {error}") from error

    def gather(
        self, stream: Stream, blocks: Addresses, images: Addresses, place: ImagePlace, run: slice = ALL
    ) -> None:
        """See the protocol."""
        with self._on(stream):
            lists = self._upload(stream, blocks, images)
            gather(self._table, *lists, self._access, self._programs_for(place), run=run)

    def scatter(
        self, stream: Stream, blocks: Addresses, images: Addresses, place: ImagePlace, run: slice = ALL
    ) -> None:
        """See the protocol."""
        with self._on(stream):
            lists = self._upload(stream, blocks, images)
            programs = self._programs_for(place) if run == ALL else min(self._programs, PROGRAMS_LAYER)
            scatter(self._table, *lists, self._access, programs, run=run)

    def copy(self, stream: Stream, sources: Addresses, targets: Addresses, sizes: Addresses) -> None:
        """See the protocol; in one call of the driver where it can."""
        with torch.cuda.device(self._device):
            self.driver.copy(sources, targets, sizes, self._streams[stream].cuda_stream)

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        try:
            with torch.cuda.stream(self._streams[stream]):
                yield
        except RuntimeError as error:
            raise TransferError(f"CUDA: {error}") from error

    def _upload(
        self, stream: Stream, blocks: Addresses, images: Addresses
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both lists on the device. The same two arrays again, as for each layer of a load, need no second upload."""
        last = self._uploaded.get(stream)
        if last is not None and last[0] is blocks and last[1] is images:
            return last[2], last[3]
        # The pinned source is torch's to keep until the copy is done.
        lists = torch.from_numpy(np.stack([blocks, images])).pin_memory().to(self._device, non_blocking=True)
        self._uploaded[stream] = (blocks, images, lists[0], lists[1])
        return lists[0], lists[1]

    def _programs_for(self, place: ImagePlace) -> int:
        if place is ImagePlace.STAGING:
            return min(self._programs, PROGRAMS_STAGING)
        bytes_each = min(self._access.tile_bytes, self._table.piece_bytes)
        return min(self._programs, max(PROGRAMS_MIN, -(-BUS_BYTES // bytes_each)))


def _cuda_event(event: object) -> torch.cuda.Event:
    assert isinstance(event, torch.cuda.Event)
    return event
