"""Loads and stores within the step: attention waits for each layer that is loaded, each layer that is computed is stored meanwhile, a failure is
recomputed, and nothing that came of missing bytes is kept."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flexkv_core.errors import TransferError
from flexkv_core.transfer.engine import TransferEngine
from flexkv_core.transfer.plan import TransferOp
from flexkv_kernels.copier import CpuCopier
from flexkv_vllm.in_step import InStepLoads, InStepPolicy
from flexkv_vllm.in_step_stores import InStepStores
from tests.e2e.checks import hit_differences
from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Engine, prompt_tokens

DEVICE_BLOCKS = 40
LAYER_DELAY_S = 0.1


@pytest.fixture(scope="module")
def engine(llama: Path) -> Iterator[Engine]:
    """Prompts are recomputed in chunks, and 40 blocks are soon too few. Every store is layer by layer."""
    options = {
        "num_gpu_blocks_override": DEVICE_BLOCKS,
        "max_num_batched_tokens": 256,
        "long_prefill_token_threshold": 128,  # a step has room for others beside a long prompt
        "max_model_len": 2048,
    }
    config = {"host_bytes": "256MiB", "layerwise_bytes_max": "1GiB", "layerwise_store_bytes_min": 1}
    with Engine(llama, config, options) as running:
        yield running


@pytest.fixture(autouse=True)
def layerwise_loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ops that were loaded layer by layer during the test."""
    seen: list[int] = []
    scatter_layers = CpuCopier.scatter_layers

    def watched(copier: CpuCopier, op: TransferOp, after: object, on_layer: Callable[[object], None]) -> None:
        seen.append(op.op_id)
        scatter_layers(copier, op, after, on_layer)

    monkeypatch.setattr(CpuCopier, "scatter_layers", watched)
    return seen


def slow_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's bytes come late."""
    scatter_run = CpuCopier._scatter_run

    def slow(copier: CpuCopier, *arguments: Any) -> None:
        time.sleep(LAYER_DELAY_S)
        scatter_run(copier, *arguments)

    monkeypatch.setattr(CpuCopier, "_scatter_run", slow)


@pytest.mark.hit
@pytest.mark.parametrize("length", [BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS, 1000, 2000])
def test_hit_equals_device_hit(engine: Engine, layerwise_loads: list[int], length: int) -> None:
    assert hit_differences(engine, prompt_tokens(2000 + length, length)) == set()
    assert len(layerwise_loads) == 1


def test_attention_waits_for_its_layer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_layers(monkeypatch)
    assert hit_differences(engine, prompt_tokens(2100, 700)) == set()


def test_an_engine_that_does_not_wait_reads_too_early(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above guards: its comparison notices when the wait is announced and not made."""
    slow_layers(monkeypatch)

    def announce(loads: InStepLoads, name: str) -> None:
        loads._reached = dict.fromkeys(loads._reached, loads._layers[name] + 1)

    monkeypatch.setattr(InStepLoads, "wait_for_layer", announce)
    assert "log-probabilities against a device hit" in hit_differences(engine, prompt_tokens(2101, 700))


def test_layers_that_are_not_announced_cost_a_recomputation(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the forward is one graph: the load counts as failed, and the answer is right."""
    slow_layers(monkeypatch)
    prompt = prompt_tokens(2102, 700)
    engine.reset(external=True)
    wanted = engine.ask(prompt)
    engine.reset()
    with monkeypatch.context() as patch:
        patch.setattr(InStepLoads, "wait_for_layer", lambda loads, name: None)
        answer = engine.ask(prompt)
    assert answer.token_ids == wanted.token_ids
    assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND


@contextmanager
def corrupted(monkeypatch: pytest.MonkeyPatch, position: int) -> Iterator[None]:
    """One bit of the slot of block ``position`` of the next layerwise load flips before it is checked."""
    scatter_layers, turns = TransferEngine._scatter_layers, iter([position])

    def corrupting(engine: TransferEngine, load: Any, indices: Any) -> None:
        for turn in turns:
            host = engine._host
            slot = int(load.item.op.slots[turn])
            ctypes.c_uint8.from_address(host.address + slot * host.layout.slot_bytes + 4321).value ^= 0x10
        scatter_layers(engine, load, indices)

    with monkeypatch.context() as patch:
        patch.setattr(TransferEngine, "_scatter_layers", corrupting)
        yield


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next layerwise load fails behind its first layer."""
    scatter_run, layers = CpuCopier._scatter_run, iter([True, False])

    def fail(copier: CpuCopier, *arguments: Any) -> None:
        if not next(layers, True):
            raise TransferError("injected: the copy failed")
        scatter_run(copier, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CpuCopier, "_scatter_run", fail)
        yield


Fault = Callable[[pytest.MonkeyPatch], Any]
FAULTS: dict[str, Fault] = {
    "copy fails": failing,
    "first block corrupt": lambda patch: corrupted(patch, 0),
    "sixth block corrupt": lambda patch: corrupted(patch, 5),
    "last block corrupt": lambda patch: corrupted(patch, -1),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_failed_load_is_recomputed_and_stored_anew(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, layerwise_loads: list[int], fault: Fault
) -> None:
    """The prompt ends with a block, so that the step that fails computes a whole one from missing bytes: it may not be kept."""
    prompt = prompt_tokens(2200, 15 * BLOCK_TOKENS)
    longer = [*prompt, *prompt_tokens(2201, 30)]
    engine.reset(external=True)
    wanted_longer = engine.ask(longer)
    engine.reset(external=True)
    engine.ask(prompt[: 14 * BLOCK_TOKENS + 1])
    engine.reset()
    with fault(monkeypatch):
        answer = engine.ask(prompt)
    engine.check_integrity()
    engine.reset()
    host = engine.ask(longer)
    assert host.external_tokens == 15 * BLOCK_TOKENS, "all of it is cached again"
    assert host.token_ids == wanted_longer.token_ids
    assert host.logprob_error(wanted_longer) <= RECOMPUTE_BOUND
    engine.reset(external=True)
    wanted = engine.ask(prompt)
    assert answer.token_ids == wanted.token_ids
    assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND
    assert layerwise_loads


@pytest.mark.parametrize("is_evicted", [True, False])
def test_nobody_finds_the_blocks_of_a_failed_load(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, is_evicted: bool
) -> None:
    """A request with the same prefix that comes while the first one is recomputed chunk by chunk. Left in the engine's prefix cache, the
    blocks would be read before they are there."""
    prompt = prompt_tokens(2300, 1100)
    other = [*prompt[:1000], *prompt_tokens(2301, 20)]
    engine.reset(external=True)
    wanted = engine.ask(other)
    engine.ask(prompt)
    engine.reset()
    if not is_evicted:
        monkeypatch.setattr(InStepPolicy, "failed", lambda policy, blocks: None)
    for tensor in engine.kv_tensors:
        tensor.zero_()  # what the load leaves out is not what was there before
    with failing(monkeypatch):
        running = {engine.add(prompt): _running()}
        engine.step(running)
        late = engine.add(other)
        running[late] = _running()
        while any(request.final is None for request in running.values()):
            engine.step(running)
    engine.settle()
    found = tuple(running[late].final.outputs[0].token_ids)
    assert (found == wanted.token_ids) == is_evicted


def _running() -> Any:
    from tests.e2e.engine import _Running

    return _Running()


def test_others_in_the_engine_are_not_held(engine: Engine, layerwise_loads: list[int]) -> None:
    prompts = [prompt_tokens(2400 + i, 500) for i in range(3)]
    engine.reset(external=True)
    first = engine.ask_all(prompts)
    engine.reset()
    again = engine.ask_all(prompts)
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in first]
    assert all(answer.external_tokens for answer in again)
    assert not layerwise_loads


@pytest.mark.hit
def test_preempted_request_resumes_with_a_load_within_the_step(
    engine: Engine, layerwise_loads: list[int]
) -> None:
    """The first of two grows until the second gives way, and takes of its blocks; when it has ended, the second is alone."""
    lengths = {450: prompt_tokens(2600, 1150), 200: prompt_tokens(2601, 1150)}
    expected = []
    for tokens, prompt in lengths.items():
        engine.reset(external=True)
        expected.append(engine.ask(prompt, tokens))
    engine.reset(external=True)
    running = {engine.add(prompt, tokens): _running() for tokens, prompt in lengths.items()}
    while any(request.final is None for request in running.values()):
        engine.step(running)
    engine.settle()
    first, second = running.values()
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert len(layerwise_loads) == 1
    for request, wanted in zip((first, second), expected, strict=True):
        assert tuple(request.final.outputs[0].token_ids) == wanted.token_ids
    engine.check_integrity()


def test_abort_after_the_step(engine: Engine, layerwise_loads: list[int]) -> None:
    """Nothing is held of a request that ends right after its load."""
    aborted = prompt_tokens(2500, 1000)
    engine.reset(external=True)
    engine.ask(aborted)
    engine.reset()
    request = engine.add(aborted)
    engine.step()
    assert len(layerwise_loads) == 1
    engine.abort(request)
    engine.settle()
    assert engine.free_blocks() == DEVICE_BLOCKS - 1  # vLLM keeps block 0 for itself
    engine.check_integrity()


class Stores:
    """What was copied from the device during a test: which layers of which slots, and what the slots held in the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copies: list[tuple[range | None, tuple[int, ...]]] = []
        self.fail_at: int | None = None
        self.host: Any = None
        gather = CpuCopier.gather

        def watched(copier: CpuCopier, op: TransferOp, after: object, layers: range | None = None) -> None:
            self.host = copier._host
            self.copies.append((layers, tuple(op.slots.tolist())))
            if layers is not None and self.fail_at in layers:
                raise TransferError("injected: the copy of a layer failed")
            gather(copier, op, after, layers)

        monkeypatch.setattr(CpuCopier, "gather", watched)

    def layers(self) -> set[range | None]:
        return {layers for layers, _ in self.copies}

    def held(self) -> list[tuple[bytes, list[int]]]:
        """Bytes and checksums of all slots that were stored, in order."""
        size = self.host.layout.slot_bytes
        slots = list(dict.fromkeys(slot for _, slots in self.copies for slot in slots))
        return [
            (ctypes.string_at(self.host.address + slot * size, size), self.host.checksums[slot].tolist())
            for slot in slots
        ]


@pytest.mark.parametrize("length", [3 * BLOCK_TOKENS, 1000])
def test_what_is_stored_by_layers_is_what_a_whole_store_holds(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """The same answer too; and without announcements, as in a graph of the whole forward, every store is whole."""
    prompt, found = prompt_tokens(2700 + length, length), []
    for is_announced in (True, False):
        with monkeypatch.context() as patch:
            if not is_announced:
                patch.setattr(InStepStores, "written", lambda stores, name, submit: None)
            stores = Stores(patch)
            engine.reset(external=True)
            answer = engine.ask(prompt)
            found.append((answer.token_ids, answer.logprobs, stores.held()))
        assert stores.layers() == ({range(1), range(1, 2)} if is_announced else {None})
        engine.check_integrity()
    assert found[0] == found[1]
    assert len(found[0][2]) == (length + 7) // BLOCK_TOKENS


def test_a_layer_is_stored_while_the_next_one_is_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, seen, gather, written = threading.Event(), [], CpuCopier.gather, InStepStores.written

    def watched(copier: CpuCopier, op: TransferOp, after: object, layers: range | None = None) -> None:
        gather(copier, op, after, layers)
        copied.set()

    def held_up(stores: InStepStores, name: str, submit: Any) -> None:
        written(stores, name, submit)
        if not seen:  # the forward goes on when the first layer is in host memory
            seen.append(copied.wait(20))

    monkeypatch.setattr(CpuCopier, "gather", watched)
    monkeypatch.setattr(InStepStores, "written", held_up)
    assert hit_differences(engine, prompt_tokens(2702, 700)) == set()
    assert seen == [True]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_store_that_fails_at_a_layer_is_a_later_miss(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    prompt = prompt_tokens(2703, 900)
    engine.reset(external=True)
    wanted = engine.ask(prompt)
    engine.reset(external=True)
    with monkeypatch.context() as patch:
        stores = Stores(patch)
        stores.fail_at = layer
        answer = engine.ask(prompt)
    assert (answer.token_ids, answer.logprobs) == (wanted.token_ids, wanted.logprobs)
    assert stores.copies
    engine.check_integrity()
    assert engine.manager.usage()[0] == 0, "no block of it holds a slot"
    engine.reset()
    missed = engine.ask(prompt)
    assert (missed.external_tokens, missed.token_ids) == (0, wanted.token_ids)
