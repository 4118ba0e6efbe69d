"""Streams of a device that runs its work on the CPU in the most unhelpful order that the events allow.

Work is cut as small as the contract allows (a block of a kernel, a piece of a DMA batch, in any order), queued, and run only when
somebody must wait, or when chance wants it. Then streams are picked at random, with weights of the run's own, so that some streams run far ahead
and others far behind. Each kind of wait can be left out, which is what the race tests do.
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flexkv_core.errors import TransferError
from flexkv_core.layout import DeviceSegments
from flexkv_kernels.streams import ALL, Addresses, ImagePlace, Order, Stream


@dataclass
class Event:
    """Passed or not."""

    done: bool = False


_Work = Callable[[], None] | Event  # an Event in a queue is one to wait for


class Adversary:
    """Implements :class:`~flexkv_kernels.streams.Streams`, and the engine's stream beside them.

    Args:
        segments: the device's blocks, in the memory of this process.
        removed: kinds of waits that do nothing.
    """

    def __init__(self, segments: DeviceSegments, seed: int, removed: frozenset[Order] = frozenset()) -> None:
        self._segments = segments
        self._rng = np.random.default_rng(seed)
        self._removed = removed
        self._queues: dict[object, deque[_Work]] = {name: deque() for name in ("engine", *Stream)}
        self._weights = dict(zip(self._queues, self._rng.random(len(self._queues)) ** 6 + 1e-6, strict=True))
        self.asked: Counter[Order] = Counter()
        self.hung = False
        self.calls_left = 1 << 30  # then a call fails, as when memory runs short

    @property
    def idle(self) -> bool:
        """Whether nothing is queued on the copier's own streams."""
        return not any(self._queues[stream] for stream in Stream)

    def engine(self, work: Callable[[], None]) -> None:
        """The engine submits ``work`` to its own stream."""
        self._queues["engine"].append(work)

    def drain(self) -> None:
        """Run everything."""
        while self._step():
            pass

    def mark(self) -> object:
        return self._record("engine")

    def record(self, stream: Stream) -> object:
        return self._record(stream)

    def wait(self, stream: Stream, event: object, order: Order) -> None:
        assert isinstance(event, Event)
        self.asked[order] += 1
        if order not in self._removed:
            self._queues[stream].append(event)

    def follow(self, event: object, order: Order) -> None:
        assert isinstance(event, Event)
        self.asked[order] += 1
        if order not in self._removed:
            self._queues["engine"].append(event)

    def finish(self, event: object, timeout_s: float, order: Order) -> None:
        assert isinstance(event, Event)
        self.asked[order] += 1
        if order in self._removed:
            return
        while not event.done:
            if not self._step():
                raise TransferError(f"the device did not finish within {timeout_s:g} s: {order.value}")

    def gather(
        self, stream: Stream, blocks: Addresses, images: Addresses, place: ImagePlace, run: slice = ALL
    ) -> None:
        self._queue_copies(stream, *self._pieces(blocks, images, run))

    def scatter(
        self, stream: Stream, blocks: Addresses, images: Addresses, place: ImagePlace, run: slice = ALL
    ) -> None:
        pieces, places, sizes = self._pieces(blocks, images, run)
        self._queue_copies(stream, places, pieces, sizes)

    def copy(self, stream: Stream, sources: Addresses, targets: Addresses, sizes: Addresses) -> None:
        self._queue_copies(stream, sources, targets, sizes)

    def _record(self, stream: object) -> Event:
        event = Event()

        def passed() -> None:
            event.done = True

        self._queues[stream].append(passed)
        self._chance()
        return event

    def _pieces(
        self, blocks: Addresses, images: Addresses, run: slice = ALL
    ) -> tuple[Addresses, Addresses, Addresses]:
        segments = self._segments
        pieces = segments.addresses[run] + blocks[:, None] * segments.strides[run]
        places = images[:, None] + np.arange(len(segments.addresses))[run] * segments.piece_bytes
        return pieces.ravel(), places.ravel(), np.full(pieces.size, segments.piece_bytes)

    def _queue_copies(self, stream: Stream, sources: Addresses, targets: Addresses, sizes: Addresses) -> None:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise TransferError("injected")
        for index in self._rng.permutation(len(sizes)).tolist():
            arguments = int(targets[index]), int(sources[index]), int(sizes[index])
            self._queues[stream].append(lambda arguments=arguments: ctypes.memmove(*arguments))
        self._chance()

    def _chance(self) -> None:
        """The device may get on with its work at any time."""
        if self._rng.random() < 0.3:
            for _ in range(int(self._rng.integers(1, 60))):
                self._step()

    def _step(self) -> bool:
        """Run the first work of one stream that may run; False when none may."""
        if self.hung:
            return False
        names = [name for name, queue in self._queues.items() if self._may_run(queue)]
        if not names:
            return False
        weights = np.array([self._weights[name] for name in names])
        queue = self._queues[names[self._rng.choice(len(names), p=weights / weights.sum())]]
        work = queue.popleft()
        if not isinstance(work, Event):
            work()
        return True

    @staticmethod
    def _may_run(queue: deque[_Work]) -> bool:
        return bool(queue) and (not isinstance(queue[0], Event) or queue[0].done)
