"""How long requests wait for a store that has nothing."""

from __future__ import annotations

from flexkv_core.storage.remote.patience import Patience


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_waiting_in_vain_takes_a_share_of_the_time_that_passes() -> None:
    clock = Clock()
    patience = Patience(share=0.01, seconds_max=0.5, free_s=0.005, clock=clock)
    waited = 0.0
    for _ in range(4000):  # requests of 0.25 s, and 0.05 s more for those that wait
        clock.now += 0.25
        if patience.is_left:
            patience.spend(0.05)
            waited += 0.05
            clock.now += 0.05
    assert 0.01 < waited / (clock.now - 100.0) < 0.013


def test_waits_within_a_step_cost_nothing() -> None:
    patience = Patience(clock=Clock())
    for _ in range(10_000):
        patience.spend(0.004)
    assert patience.is_left


def test_what_was_found_gives_all_of_it_back_and_time_no_more_than_that() -> None:
    clock = Clock()
    patience = Patience(share=0.01, seconds_max=0.5, free_s=0.0, clock=clock)
    patience.spend(3.0)
    assert not patience.is_left
    clock.now += 240.0
    assert not patience.is_left
    clock.now += 20.0
    assert patience.is_left
    patience.spend(3.0)
    patience.restore()
    assert patience.is_left
    clock.now += 1e6
    assert patience.is_left
    patience.spend(0.6)
    assert not patience.is_left
