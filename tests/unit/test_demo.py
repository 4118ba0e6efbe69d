"""What the demo counts as a success: the answers, where they came from, and what was faster, in every act that was played."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexkv_core.cli.demo.measure import Ask, Report, State
from flexkv_core.cli.demo.table import summary
from flexkv_core.cli.harness.client import Completion

HITS = tuple(state for state in State if state not in (State.RECOMPUTE, State.DEVICE_HIT))


def ask(state: State) -> Ask:
    tokens = 0 if state is State.RECOMPUTE else 1000
    answer = Completion(
        prompt_tokens=1001,
        cached_tokens=tokens,
        token_ids=(1, 2),
        logprobs=(),
        text="yes",
        finish_reason="length",
        ttft_ms=5.0 if tokens else 50.0,
        total_ms=60.0,
    )
    return Ask(0, "why?", state, answer, tokens if state in HITS else 0)


def report(**changes: object) -> Report:
    """Of all acts, in which the last state's ask is changed."""
    asks = [ask(state) for state in State]
    last = asks.pop()
    external = changes.pop("external_tokens", last.external_tokens)
    return Report((*asks, replace(last, answer=replace(last.answer, **changes), external_tokens=external)))


def test_a_good_demo() -> None:
    good = report()
    assert good.faults() == []
    assert summary(good)["ttft_shared_hit_after_engine_restart_ms"] == 5.0
    assert summary(good)["identical"] is True


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"token_ids": (1, 3)}, "differ"),
        ({"ttft_ms": 51.0}, "not faster"),
        ({"external_tokens": 0}, "served 0 tokens"),
    ],
)
def test_what_keeps_it_from_being_one(changes: dict[str, object], word: str) -> None:
    faults = report(**changes).faults()
    assert len(faults) == 1
    assert word in faults[0]
    assert State.SHARED_HIT.value in faults[0]


@pytest.mark.parametrize("state", HITS[1:])
def test_acts_that_were_not_played_are_not_judged(state: State) -> None:
    without = Report(tuple(one for one in report().asks if one.state is not state))
    assert without.faults() == []
    assert state not in without.states


def test_the_last_line_without_the_third_act() -> None:
    played = Report(tuple(one for one in report().asks if one.state is not State.SHARED_HIT))
    assert set(summary(report())) - set(summary(played)) == {"ttft_shared_hit_after_engine_restart_ms"}
