"""What a device copier needs of a device: streams that run their work in order and each other's work in any order, and events.

The real one is :class:`flexkv_kernels.cuda_streams.CudaStreams`; the tests have one that runs work on the CPU in the most unhelpful order
that the events allow.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.int64]


class Stream(Enum):
    """The copier's own streams: kernels and DMA apart, so that one chunk's gather overlaps another's DMA; a pair a direction."""

    STORE_KERNEL = "store kernel"
    STORE_DMA = "store DMA"
    LOAD_DMA = "load DMA"
    LOAD_KERNEL = "load kernel"


class ImagePlace(Enum):
    """Where a kernel finds images, which decides how much of the GPU it needs."""

    STAGING = "staging memory on the device"
    HOST = "pinned host memory, over the bus"


ALL = slice(None)
"""Every segment."""


class Order(Enum):
    """Why one piece of work must come after another. Each is a wait; the race test removes them one by one."""

    ENGINE_WROTE = "a store reads blocks after the engine has written them"
    ENGINE_READ = "a load overwrites blocks after the engine's earlier work on them"
    GATHERED = "DMA sends a staging buffer after it was filled"
    SENT = "a staging buffer is filled anew after DMA has sent it"
    ARRIVED = "a staging buffer is scattered after DMA has filled it"
    SCATTERED = "DMA fills a staging buffer anew after it was scattered"
    STORED = "a store is reported, and the engine may overwrite its blocks, after the last byte left them"
    LOADED = "a load is reported, and the engine may read its blocks, after the last byte is there"
    LAYER_LOADED = (
        "the engine reads a layer after its last byte is there, while later layers are still coming"
    )
    LAYER_WRITTEN = "a store reads a layer after the engine has written it, while it computes later layers"


class Streams(Protocol):
    """One device. Nothing here blocks but ``finish``. One thread calls at a time, except ``mark`` and
    ``follow``, which the engine's thread calls.

    Arrays of addresses are int64; what they point to stays in place until the work is finished. Errors are TransferErrors, raised by
    any call, possibly by a later one than the cause.
    """

    def mark(self) -> object:
        """An event after everything that the calling thread has given the engine's stream so far."""

    def record(self, stream: Stream) -> object:
        """An event after everything that ``stream`` has been given so far."""

    def wait(self, stream: Stream, event: object, order: Order) -> None:
        """What ``stream`` is given from now on runs after ``event``."""

    def follow(self, event: object, order: Order) -> None:
        """What the calling thread gives the engine's stream from now on runs after ``event``."""

    def finish(self, event: object, timeout_s: float, order: Order) -> None:
        """Wait for ``event`` on the host, at most ``timeout_s``."""

    def gather(
        self, stream: Stream, blocks: Addresses, images: Addresses, place: ImagePlace, run: slice = ALL
    ) -> None:
        """Kernel: blocks -> images, whose addresses are given; of the segments of ``run`` alone, whose pieces go to their places in whole
        images."""

    def scatter(
        self, stream: Stream, blocks: Addresses, images: Addresses, place: ImagePlace, run: slice = ALL
    ) -> None:
        """Kernel: images -> blocks; of the segments of ``run`` alone, whose pieces lie at their places in whole images."""

    def copy(self, stream: Stream, sources: Addresses, targets: Addresses, sizes: Addresses) -> None:
        """DMA: ``sizes[i]`` bytes from ``sources[i]`` to ``targets[i]``, in any order among themselves."""
