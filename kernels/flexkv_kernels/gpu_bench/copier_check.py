"""The whole copier on the GPU: random blocks there and back while matrices are multiplied, and each ordering event left out once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from flexkv_core import native
from flexkv_core.layout import KVLayout
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import Delivery, TransferOp
from flexkv_core.types import Direction
from flexkv_kernels.calibration import ModeTable
from flexkv_kernels.cuda_copier import CudaCopier
from flexkv_kernels.paths import Mode
from flexkv_kernels.stream_copier import CopierSettings
from flexkv_kernels.streams import Order, Stream

BLOCKS = 192
LAYERS = 16
TOKENS = 16
ROUNDS = 6


def check_copier() -> list[str]:
    """What was wrong with round trips in every mode under a concurrent matrix product, whole and layer by layer; nothing is the wanted
    answer. On a thread of its own, as the product does it: the driver's calls need the device's context there."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_check_copier).result()


def _check_copier() -> list[str]:
    with _rig() as rig:
        return [
            f"copier, {mode.value}{name}: {text}"
            for mode in Mode
            for name, trip in (
                ("", rig.round_trip),
                (" by layers", rig.layered_trip),
                (" stored by layers", rig.layered_store_trip),
            )
            for _ in range(ROUNDS)
            for text in trip(mode)
        ]


def removals_noticed() -> dict[str, bool]:
    """By order and mode: whether leaving that event out changed a byte in any round. A race that never shows is no proof of safety."""
    noticed = {}
    for order, mode in (
        (Order.ENGINE_WROTE, Mode.DIRECT),
        (Order.GATHERED, Mode.STAGED),
        (Order.SENT, Mode.STAGED),
        (Order.STORED, Mode.STAGED),
        (Order.ENGINE_READ, Mode.DIRECT),
        (Order.ARRIVED, Mode.STAGED),
        (Order.SCATTERED, Mode.STAGED),
        (Order.LOADED, Mode.STAGED),
        (Order.LAYER_LOADED, Mode.DIRECT),
        (Order.LAYER_WRITTEN, Mode.DIRECT),
    ):
        with _rig() as rig:
            rig.leave_out(order)
            layered = {
                Order.LAYER_LOADED: rig.layered_trip,
                Order.LAYER_WRITTEN: rig.layered_store_trip,
            }
            trip = layered.get(order, rig.round_trip)
            noticed[order.name] = any(trip(mode) for _ in range(2 * ROUNDS))
    return noticed


@dataclass
class _Rig:
    tensors: list[torch.Tensor]
    copier: CudaCopier
    host: HostSegment
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.aside = torch.cuda.Stream()
        self.matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
        self.product = torch.empty_like(self.matrix)

    def leave_out(self, removed: Order) -> None:
        """Make the streams forget one kind of wait."""
        streams = self.copier._cuda
        wait, finish, follow = streams.wait, streams.finish, streams.follow

        def forgetful_wait(stream: Stream, event: object, order: Order) -> None:
            if order is not removed:
                wait(stream, event, order)

        def forgetful_finish(event: object, timeout_s: float, order: Order) -> None:
            if order is not removed:
                finish(event, timeout_s, order)

        def forgetful_follow(event: object, order: Order) -> None:
            if order is not removed:
                follow(event, order)

        streams.follow = forgetful_follow  # type: ignore[method-assign]
        streams.wait = forgetful_wait  # type: ignore[method-assign]
        streams.finish = forgetful_finish  # type: ignore[method-assign]

    def round_trip(self, mode: Mode) -> list[str]:
        """Write blocks behind a long computation, store them, overwrite them, load them elsewhere, overwrite-read, compare."""
        self.copier._modes = ModeTable({direction: [(0, mode)] for direction in Direction})
        order = self.rng.permutation(BLOCKS)
        sources, targets = order[: BLOCKS // 2], order[BLOCKS // 2 :]
        wanted = [_random_like(tensor[: BLOCKS // 2]) for tensor in self.tensors]
        slots = self.rng.permutation(self.host.slot_count)[: BLOCKS // 2].astype(np.int32)
        keys = self.rng.bytes(16 * len(slots))
        # Indices go to the device now: such an upload waits for the stream, and would undo the races that are looked for.
        mine, others = torch.from_numpy(sources).cuda(), torch.from_numpy(targets).cuda()
        readers = [torch.empty_like(fresh) for fresh in wanted]
        old = [tensor[others].clone() for tensor in self.tensors]
        store = TransferOp(1, Direction.STORE, keys, slots, sources)
        load = TransferOp(2, Direction.LOAD, keys, slots, targets)
        torch.cuda.synchronize()

        self._compute()  # the engine's stream is busy: what follows on it comes late
        for tensor, fresh in zip(self.tensors, wanted, strict=True):
            tensor[mine] = fresh
        self.copier.gather(store, self.copier.mark())
        for tensor in self.tensors:  # reported: the engine takes its blocks back
            tensor[mine] = 0

        self._compute()
        for tensor, reader in zip(
            self.tensors, readers, strict=True
        ):  # the engine still reads the old blocks
            reader.copy_(tensor[others])
        ok = self.copier.scatter(load, self.copier.mark(), verify=False)
        with torch.cuda.stream(self.aside):  # reported: the engine reads at once
            loaded = [tensor[others].clone() for tensor in self.tensors]
        torch.cuda.synchronize()
        found = []
        if not ok.all():
            found.append("blocks refused")
        if not all(torch.equal(a, b) for a, b in zip(loaded, wanted, strict=True)):
            found.append("loaded bytes differ")
        if not all(torch.equal(a, b) for a, b in zip(readers, old, strict=True)):
            found.append("blocks overwritten while the engine read them")
        return found

    def layered_trip(self, mode: Mode) -> list[str]:
        """Store blocks and load them elsewhere layer by layer, each layer read by the engine's stream as soon as it is announced, while
        the stream still has reads of the old blocks before it; the host waits for nothing in between."""
        self.copier._modes = ModeTable({direction: [(0, mode)] for direction in Direction})
        order = self.rng.permutation(BLOCKS)
        sources, targets = order[: BLOCKS // 2], order[BLOCKS // 2 :]
        mine, others = torch.from_numpy(sources).cuda(), torch.from_numpy(targets).cuda()
        for tensor in self.tensors:
            tensor[mine] = _random_like(tensor[mine])
        wanted, old = ([tensor[ids].clone() for tensor in self.tensors] for ids in (mine, others))
        readers = [torch.empty_like(fresh) for fresh in wanted]
        slots = self.rng.permutation(self.host.slot_count)[: BLOCKS // 2].astype(np.int32)
        keys = self.rng.bytes(16 * len(slots))
        self.copier.gather(TransferOp(1, Direction.STORE, keys, slots, sources), self.copier.mark())
        torch.cuda.synchronize()

        self._compute()
        for tensor, reader in zip(self.tensors, readers, strict=True):
            reader.copy_(tensor[others])
        load = TransferOp(2, Direction.LOAD, keys, slots, targets, delivery=Delivery.LAYERWISE)
        loaded: list[torch.Tensor] = []

        def read_layer(layer: object) -> None:
            self.copier.follow(layer)
            loaded.append(self.tensors[len(loaded)][others])

        self.copier.scatter_layers(load, self.copier.mark(), read_layer)
        torch.cuda.synchronize()
        found = []
        if not all(torch.equal(a, b) for a, b in zip(loaded, wanted, strict=True)):
            found.append("layers differ")
        if not all(torch.equal(a, b) for a, b in zip(readers, old, strict=True)):
            found.append("blocks overwritten while the engine read them")
        return found

    def layered_store_trip(self, mode: Mode) -> list[str]:
        """Write blocks layer by layer, a long computation before each few layers, and store every layer as soon as it is submitted; then
        overwrite them at once, and load them elsewhere."""
        self.copier._modes = ModeTable({direction: [(0, mode)] for direction in Direction})
        order = self.rng.permutation(BLOCKS)
        sources, targets = order[: BLOCKS // 2], order[BLOCKS // 2 :]
        wanted = [_random_like(tensor[: BLOCKS // 2]) for tensor in self.tensors]
        slots = self.rng.permutation(self.host.slot_count)[: BLOCKS // 2].astype(np.int32)
        keys = self.rng.bytes(16 * len(slots))
        mine, others = torch.from_numpy(sources).cuda(), torch.from_numpy(targets).cuda()
        store = TransferOp(1, Direction.STORE, keys, slots, sources, delivery=Delivery.LAYERWISE)
        torch.cuda.synchronize()
        marks = []
        for layer, (tensor, fresh) in enumerate(zip(self.tensors, wanted, strict=True)):
            if layer % 4 == 0:
                self._compute(16)
            tensor[mine] = fresh
            marks.append(self.copier.mark())
        for start in range(0, LAYERS, 4):
            self.copier.gather(store, marks[start + 3], range(start, start + 4))
        for tensor in self.tensors:
            tensor[mine] = 0
        load = TransferOp(2, Direction.LOAD, keys, slots, targets)
        ok = self.copier.scatter(load, self.copier.mark(), verify=native.NATIVE)
        torch.cuda.synchronize()
        loaded = [tensor[others] for tensor in self.tensors]
        found = [] if ok.all() else ["blocks refused"]
        if not all(torch.equal(a, b) for a, b in zip(loaded, wanted, strict=True)):
            found.append("stored bytes differ")
        return found

    def _compute(self, products: int = 64) -> None:
        """Work of about 12 ms on an H200: longer than it takes to queue a whole transfer, so that what nothing orders runs at once."""
        for _ in range(products):
            torch.matmul(self.matrix, self.matrix, out=self.product)


@contextmanager
def _rig() -> Iterator[_Rig]:
    shape = (BLOCKS, 2, TOKENS, 8, 64)
    tensors = [_random_like(torch.empty(shape, dtype=torch.int16, device="cuda")) for _ in range(LAYERS)]
    settings = CopierSettings(chunk_bytes=4 << 20, unstaged_chunk_bytes=4 << 20, calibration_budget_s=0.5)
    copier = CudaCopier.from_tensors(tensors, settings=settings)
    layout = KVLayout(TOKENS, TOKENS, copier.segments.block_bytes)
    host = HostSegment.create(BLOCKS, layout)
    copier.bind(host, 0)
    if not native.NATIVE:
        # The Python twin takes a minute for what is moved here; bytes are compared below anyway.
        host.checksums_now = lambda slots, keys, shard: np.zeros(len(slots), np.uint32)  # type: ignore[method-assign]
    try:
        yield _Rig(tensors, copier, host, np.random.default_rng())
    finally:
        copier.close()
        del copier
        host.close()


def _random_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randint_like(tensor, -(1 << 15), (1 << 15) - 1)
