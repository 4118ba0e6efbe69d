"""How long requests wait for a store that has nothing."""

from __future__ import annotations

from flexkv_core.storage.remote.patience import Patience


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def waited(patience: Patience, clock: Clock, requests: int, pause_s: float) -> float:
    """By all requests of 0.25 s, ``pause_s`` apart, where each lookup takes 0.05 s and finds nothing."""
    seconds = 0.0
    for _ in range(requests):
        clock.now += pause_s
        if patience.is_left:
            patience.spend(0.05)
            seconds += 0.05
            clock.now += 0.05
        clock.now += 0.25
    return seconds


def test_waiting_in_vain_takes_a_share_of_the_time_that_passes() -> None:
    clock = Clock()
    patience = Patience(share=0.005, free_s=0.0, clock=clock)
    assert 0.004 < waited(patience, clock, 4000, 0.0) / (4000 * 0.25) < 0.006


def test_unless_told_otherwise_the_bounds_are_those_of_the_readme() -> None:
    clock = Clock()
    patience = Patience(clock=clock)
    patience.spend(0.05)
    assert patience.is_left, "a twentieth of a second, and the first 5 ms of a wait do not count"
    patience.spend(0.011)
    assert not patience.is_left
    assert 0.0018 < waited(patience, clock, 40_000, 0.0) / (40_000 * 0.25) < 0.0026
    patience.restore()
    patience.spend(0.5)
    assert patience.is_left, "half a second"
    patience.spend(0.011)
    assert not patience.is_left


def test_a_store_that_never_had_anything_is_waited_for_a_moment() -> None:
    clock = Clock()
    patience = Patience(share=0.0, seconds_first=0.1, seconds_max=0.5, free_s=0.0, clock=clock)
    assert waited(patience, clock, 100, 0.0) < 0.16
    patience.restore()
    assert 0.49 < waited(patience, clock, 100, 0.0) < 0.56


def test_an_engine_that_idles_earns_no_waiting() -> None:
    clock = Clock()
    patience = Patience(share=0.005, seconds_first=0.0, free_s=0.0, pause_max_s=1.0, clock=clock)
    assert waited(patience, clock, 1000, 3600.0) < 1000 * 1.0 * 0.005 + 0.06


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
    patience.restore()
    assert patience.is_left
    for _ in range(1000):
        clock.now += 1.0
        assert patience.is_left
    patience.spend(0.6)
    assert not patience.is_left
