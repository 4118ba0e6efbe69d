"""Which loads may be within a step, and what a worker reports of one that the step did not wait for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from flexkv_core.config import FlexKVConfig
from flexkv_core.transfer.plan import Delivery
from flexkv_core.types import Direction
from flexkv_vllm.in_step import InStepLoads, InStepPolicy
from tests.unit.core.device import LAYERS
from tests.unit.core.test_transfer import Rig

NAMES = {f"model.layers.{layer}.attn": layer for layer in range(LAYERS)}
TIMEOUT_S = 30


class Cache:
    """Of an engine: what was taken out of its prefix cache."""

    def __init__(self) -> None:
        self.evicted: list[set[int]] = []

    def evict_blocks(self, blocks: set[int]) -> None:
        self.evicted.append(blocks)


def config_of(stages: int = 1, is_asynchronous: bool = False, guesses: object = None) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        scheduler_config=SimpleNamespace(async_scheduling=is_asynchronous),
        speculative_config=guesses,
    )


def policy(bytes_max: int = 1000, **engine: Any) -> InStepPolicy:
    made = InStepPolicy(config_of(**engine), FlexKVConfig(layerwise_bytes_max=bytes_max))
    made.bind(Cache())
    made.arrived("a")
    return made


def test_a_lone_request_with_a_hit_of_the_right_size_is_loaded_in_its_step() -> None:
    assert policy().allows("a", 1000)
    assert not policy().allows("a", 1001)
    assert not policy(bytes_max=0).allows("a", 1)


def test_not_with_others_nor_where_steps_overlap() -> None:
    alone = policy()
    alone.arrived("b")
    assert not alone.allows("a", 10)
    alone.left("b")
    assert alone.allows("a", 10)
    assert not policy(stages=2).allows("a", 10)
    assert not policy(is_asynchronous=True).allows("a", 10)
    assert not policy(guesses=SimpleNamespace(method="ngram")).allows("a", 10)


def test_not_where_the_version_tells_too_little() -> None:
    silent = policy()
    assert not silent.allows("never announced", 10)
    unbound = InStepPolicy(config_of(), FlexKVConfig(layerwise_bytes_max=1000))
    unbound.arrived("a")
    assert not unbound.allows("a", 10)


def test_an_engine_whose_steps_overlap_is_told(caplog: pytest.LogCaptureFixture) -> None:
    policy(is_asynchronous=True)
    assert "asynchronous scheduling" in caplog.text
    caplog.clear()
    policy(is_asynchronous=True, bytes_max=0)
    assert not caplog.text


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(timeout_s=TIMEOUT_S)
    rig.device.fill(0, 1)
    rig.engine.submit(rig.op(1, Direction.STORE))
    rig.results.get(timeout=TIMEOUT_S)
    yield rig
    rig.close()


def begin(rig: Rig, timeout_s: float = TIMEOUT_S) -> InStepLoads:
    loads = InStepLoads(NAMES, timeout_s)
    rig.engine.submit(replace(rig.op(2, Direction.LOAD), delivery=Delivery.LAYERWISE))
    loads.begin(rig.engine, 2)
    return loads


def test_a_step_that_waits_for_every_layer_is_right(rig: Rig) -> None:
    loads = begin(rig)
    for name in NAMES:
        loads.wait_for_layer(name)
    loads.wait_for_layer("a layer without KV")
    assert loads.end() == set()
    assert loads.end() == set()
    assert rig.results.get(timeout=TIMEOUT_S).ok.all()


@pytest.mark.parametrize("announced", [[], list(NAMES)[:-1]])
def test_a_layer_that_was_not_announced_spoils_the_load(rig: Rig, announced: list[str]) -> None:
    loads = begin(rig)
    for name in announced:
        loads.wait_for_layer(name)
    assert loads.end() == {2}
    assert loads.end() == set()


def test_a_layer_that_is_late_spoils_the_load_and_its_end_is_awaited(rig: Rig) -> None:
    rig.device.copier.hold.clear()
    loads = begin(rig, timeout_s=0.05)
    loads.wait_for_layer(next(iter(NAMES)))
    with pytest.raises(RuntimeError, match="may still write"):
        loads.end()
    rig.device.copier.hold.set()
    assert rig.engine.drain([2], TIMEOUT_S)
    assert loads.end() == {2}


def test_a_load_that_failed_is_waited_for_once_and_reported_by_its_result(rig: Rig) -> None:
    rig.host.checksums[0, 0] ^= 1
    loads = begin(rig)
    for name in NAMES:
        loads.wait_for_layer(name)
    assert loads.end() == set()
    assert not rig.results.get(timeout=TIMEOUT_S).ok.any()
