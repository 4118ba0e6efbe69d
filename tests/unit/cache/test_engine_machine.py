"""The engine against the model, on both indexes; and the proof that the model notices broken rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from flexkv_core.cache import GetPlan, GlobalCacheEngine, PutPlan, WritePlan
from flexkv_core.cache.radix_tree import PyRunIndex, RunIndex
from flexkv_core.cache.run import Run
from flexkv_core.types import Slots, Tier
from tests.unit.cache.engine_machine import EngineMachine
from tests.unit.cache.tiers_machine import TiersMachine

MACHINE = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("model", [EngineMachine, TiersMachine])
@pytest.mark.parametrize("factory", [PyRunIndex, RunIndex], ids=["twin", "native"])
def test_engine_equals_model(factory: type[PyRunIndex], model: type[RuleBasedStateMachine]) -> None:
    if factory is RunIndex and RunIndex is PyRunIndex:
        pytest.skip("the C extension was not built")
    machine = type("Machine", (model,), {"index_factory": factory})
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


class _WritesDoNotPin(GlobalCacheEngine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        begin = self._write_behind._begin

        def begin_and_release(pieces: list[tuple[int, int, int]], slots: Slots) -> WritePlan:
            plan = begin(pieces, slots)
            for run, *_ in pieces:
                self.residency.release(run)
            return plan

        self._write_behind._begin = begin_and_release  # type: ignore[method-assign]
        self._write_behind._release = lambda writing: None  # type: ignore[method-assign]


class _FailedWritesCount(GlobalCacheEngine):
    def finish_write(self, plan: WritePlan, ok: npt.NDArray[np.bool_], retry: bool = False) -> Slots:
        return super().finish_write(plan, np.ones(len(ok), np.bool_), retry)


class _FailedReadsCount(GlobalCacheEngine):
    def finish_get(self, plan: GetPlan, read_ok: npt.NDArray[np.bool_] | None = None) -> None:
        super().finish_get(plan, np.ones(len(plan.reads), np.bool_))


class _BadSlotsAreUsedAgain(GlobalCacheEngine):
    def invalidate(self, plan: GetPlan, block: int, tier: Tier = Tier.HOST, quarantine: bool = True) -> int:
        return super().invalidate(plan, block, tier, quarantine=False)


class _BadCopiesReturnAtOnce(GlobalCacheEngine):
    """The slot of a bad copy goes back to the pool although other plans may be using it."""

    def _drop_copy(self, run: int, at: int, tier: Tier, slot: int) -> None:
        super()._drop_copy(run, at, tier, slot)
        waiting, self._leases._waiting = self._leases._waiting, []
        for _, of, slots in waiting:
            self.pools[of].free(slots)


class _FirstBlocksAreWrittenLast(GlobalCacheEngine):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._write_behind._published_path = lambda run: [run] if run in self.index.runs() else []  # type: ignore[method-assign]


class _LoadsOrphans(PyRunIndex):
    def load(self, tier, slots, keys, parents, ages):  # type: ignore[no-untyped-def]
        known = {keys[i : i + 16] for i in range(0, len(keys), 16)}
        fixed = [parents[i : i + 16] for i in range(0, len(parents), 16)]
        return super().load(tier, slots, keys, b"".join(p if p in known else bytes(16) for p in fixed), ages)


class _CutsNothingBelow(PyRunIndex):
    """What follows a block that is gone stays."""

    def _cut_holes(self, run: Run, begin: int) -> tuple[list[int], int]:
        return ([], -1) if run.children else super()._cut_holes(run, begin)


@pytest.mark.parametrize(
    ("engine_class", "factory"),
    [
        (_WritesDoNotPin, PyRunIndex),
        (_FailedWritesCount, PyRunIndex),
        (_FailedReadsCount, PyRunIndex),
        (_BadSlotsAreUsedAgain, PyRunIndex),
        (_BadCopiesReturnAtOnce, PyRunIndex),
        (_FirstBlocksAreWrittenLast, PyRunIndex),
        (GlobalCacheEngine, _LoadsOrphans),
        (GlobalCacheEngine, _CutsNothingBelow),
    ],
    ids=lambda value: value.__name__.strip("_"),
)
def test_model_of_tiers_notices_a_broken_rule(
    engine_class: type[GlobalCacheEngine], factory: type[PyRunIndex]
) -> None:
    _must_be_noticed(TiersMachine, engine_class, factory)


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
    _must_be_noticed(EngineMachine, engine_class, factory)


def _must_be_noticed(
    model: type[RuleBasedStateMachine], engine_class: type[GlobalCacheEngine], factory: type[PyRunIndex]
) -> None:
    # Without its own recount: the model must see it from outside.
    blind = type("Blind", (engine_class,), {"check_integrity": lambda self: None})
    machine = type("Machine", (model,), {"engine_class": blind, "index_factory": factory})
    few = settings(MACHINE, max_examples=250, phases=[Phase.generate], database=None)
    # One seed may happen to pass a rarely visible rule by; that none of ten finds it does not happen by chance.
    for number in range(10):
        try:
            run_state_machine_as_test(seed(number)(machine), settings=few)
        except (AssertionError, KeyError, ValueError):
            return
    pytest.fail("the model noticed nothing")
