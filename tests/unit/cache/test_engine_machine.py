"""The engine against the model, on both indexes; and the proof that the model notices broken rules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from flexkv_core.cache import GetPlan, GlobalCacheEngine, PutPlan
from flexkv_core.cache.radix_tree import PyRunIndex, RunIndex
from flexkv_core.cache.run import Run
from tests.unit.cache.engine_machine import EngineMachine

MACHINE = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("factory", [PyRunIndex, RunIndex], ids=["twin", "native"])
def test_engine_equals_model(factory: type[PyRunIndex]) -> None:
    if factory is RunIndex and RunIndex is PyRunIndex:
        pytest.skip("the C extension was not built")
    machine = type("Machine", (EngineMachine,), {"index_factory": factory})
    run_state_machine_as_test(machine, settings=MACHINE)


class _GetsDoNotPin(GlobalCacheEngine):
    def plan_get(self, keys: bytes, start_block: int = 0, fetch: bool = True) -> GetPlan:
        plan = super().plan_get(keys, start_block, fetch)
        self.finish_get(plan)
        return plan


class _PutsDoNotProtectTheirPrefix(GlobalCacheEngine):
    def _branch_at(self, run: int, at: int) -> int:
        run = super()._branch_at(run, at)
        self.residency.release(run)
        return run

    def _unpin_branch(self, run: int) -> None:
        pass


class _AbortPublishes(GlobalCacheEngine):
    def abort_put(self, plan: PutPlan) -> None:
        self.commit_put(plan)


class _PartialCommitKeepsAll(GlobalCacheEngine):
    def commit_put(self, plan: PutPlan, blocks: int | None = None) -> int:
        super().commit_put(plan)
        return plan.count if blocks is None else blocks


class _ParkedForEver(GlobalCacheEngine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.residency._unpark = lambda run: None  # type: ignore[method-assign]


class _MatchesWhatIsBeingWritten(PyRunIndex):
    def match(self, keys, start, out, tier, through_writing):  # type: ignore[no-untyped-def]
        return super().match(keys, start, out, tier, True)


class _FreesUnderLeases(PyRunIndex):
    """Slots return as soon as the run leaves the tree; only the run's entry waits for the lease."""

    def _leave(self, run: Run) -> None:
        super()._leave(run)
        for tier, slots in enumerate(run.slots):
            if slots is not None and run.pins:
                self._freed[tier].append(run.tier_slots(tier))
                run.slots[tier] = None


class _AncestorsOfLeasesGo(PyRunIndex):
    """A run that was cut off above a lease does not keep its parents."""

    def _leave(self, run: Run) -> None:
        super()._leave(run)
        if run.parent is not None and not run.parent.detached:
            run.unlink()


@pytest.mark.parametrize(
    ("engine_class", "factory"),
    [
        (_GetsDoNotPin, PyRunIndex),
        (_PutsDoNotProtectTheirPrefix, PyRunIndex),
        (_AbortPublishes, PyRunIndex),
        (_PartialCommitKeepsAll, PyRunIndex),
        (_ParkedForEver, PyRunIndex),
        (GlobalCacheEngine, _MatchesWhatIsBeingWritten),
        (GlobalCacheEngine, _FreesUnderLeases),
        (GlobalCacheEngine, _AncestorsOfLeasesGo),
    ],
    ids=lambda value: value.__name__.strip("_"),
)
def test_model_notices_a_broken_rule(
    engine_class: type[GlobalCacheEngine], factory: type[PyRunIndex]
) -> None:
    # Without its own recount: the model must see it from outside.
    blind = type("Blind", (engine_class,), {"check_integrity": lambda self: None})
    machine = type("Machine", (EngineMachine,), {"engine_class": blind, "index_factory": factory})
    once = settings(MACHINE, max_examples=1000, phases=[Phase.generate], derandomize=True, database=None)
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(machine, settings=once)
