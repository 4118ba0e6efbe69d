"""The one comparison that every test of a hit makes, and the sabotage that shows that it would notice."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from flexkv_core.transfer.plan import TransferOp
from flexkv_kernels.copier import CpuCopier
from tests.e2e.engine import RECOMPUTE_BOUND, Answer, Engine

Scatter = Callable[[CpuCopier, TransferOp, object, bool], npt.NDArray[np.bool_]]


def hit_differences(
    engine: Engine, prompt: Sequence[int], tokens: int = 8, salt: str | None = None
) -> set[str]:
    """What differs between a hit from FlexKV, a hit in the engine's own cache, and the recomputation of one prompt.

    Starts with every cache empty. The two hits must find as many tokens and then agree bit for bit; the recomputation within
    RECOMPUTE_BOUND; the KV bytes of all full blocks of the prompt exactly.
    """
    engine.reset(external=True)
    cold = engine.ask(prompt, tokens, salt)
    computed = engine.held_bytes(cold, len(prompt))
    device = engine.ask(prompt, tokens, salt)
    engine.reset()
    host = engine.ask(prompt, tokens, salt)
    loaded = engine.held_bytes(host, host.cached_tokens)
    found = compare(cold, device, host)
    if any(data != computed.get(place) for place, data in loaded.items()):
        found.add("kv bytes")
    return found


def compare(cold: Answer, device: Answer, host: Answer) -> set[str]:
    """The same for answers alone. ``device`` and ``host`` are hits of the same prompt, ``cold`` is its recomputation."""
    found = set()
    if cold.cached_tokens or cold.external_tokens:
        found.add("the first request was no miss")
    if device.external_tokens or not device.cached_tokens:
        found.add("the second request was no hit of the engine's own cache")
    if host.external_tokens != host.cached_tokens or host.cached_tokens != device.cached_tokens:
        found.add("cached tokens")
    if host.token_ids != device.token_ids:
        found.add("tokens against a device hit")
    if host.logprobs != device.logprobs:
        found.add("log-probabilities against a device hit")
    if host.token_ids != cold.token_ids:
        found.add("tokens against a recomputation")
    elif host.logprob_error(cold) > RECOMPUTE_BOUND:
        found.add("log-probabilities against a recomputation")
    return found


@contextmanager
def patched_scatter(replace: Callable[[Scatter], Scatter]) -> Iterator[None]:
    """Loads go through ``replace(scatter)`` inside the block."""
    original = CpuCopier.scatter
    CpuCopier.scatter = replace(original)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        CpuCopier.scatter = original  # type: ignore[method-assign]


def load_zeros(scatter: Scatter) -> Scatter:
    """The second block that a load brings arrives as zeros."""

    def sabotaged(copier: CpuCopier, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        ok = scatter(copier, op, after, verify)
        for address in _pieces(copier, int(op.blocks[1])):
            ctypes.memset(address, 0, copier.segments.piece_bytes)
        return ok

    return sabotaged


def load_zeros_last(scatter: Scatter) -> Scatter:
    """The last block that a load brings arrives as zeros; with ``--sabotage``, see the tests' ``conftest.py``."""

    def sabotaged(copier: CpuCopier, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        ok = scatter(copier, op, after, verify)
        for address in _pieces(copier, int(op.blocks[-1])):
            ctypes.memset(address, 0, copier.segments.piece_bytes)
        return ok

    return sabotaged


def load_zeros_layerwise(
    copier: CpuCopier, op: TransferOp, after: object, on_layer: Callable[[object], None]
) -> None:
    """As :func:`load_zeros_last`, for loads layer by layer: nothing comes."""
    for _ in range(copier.segments.layer_count):
        for block in op.blocks[op.blocks >= 0].tolist():
            for address in _pieces(copier, block):
                ctypes.memset(address, 0, copier.segments.piece_bytes)
        on_layer(None)


def swap_blocks(scatter: Scatter) -> Scatter:
    """The first two blocks that a load brings are swapped."""

    def sabotaged(copier: CpuCopier, op: TransferOp, after: object, verify: bool) -> npt.NDArray[np.bool_]:
        ok = scatter(copier, op, after, verify)
        size = copier.segments.piece_bytes
        first, second = (_pieces(copier, int(block)) for block in op.blocks[:2])
        for a, b in zip(first, second, strict=True):
            saved = ctypes.string_at(a, size)
            ctypes.memmove(a, b, size)
            ctypes.memmove(b, saved, size)
        return ok

    return sabotaged


def _pieces(copier: CpuCopier, block: int) -> list[int]:
    """Where the bytes of an engine's block lie, one address a segment."""
    segments = copier.segments
    assert 0 < block < segments.block_count
    return [
        int(base) + block * int(stride)
        for base, stride in zip(segments.addresses, segments.strides, strict=True)
    ]
