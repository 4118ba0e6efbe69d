"""Alarm: it rings at its moment, not before, and once."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator

import pytest

from flexkv_core.transfer.alarm import Alarm

LONG_S = 20.0


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    alarm = Alarm()
    yield alarm
    alarm.close()


def rings(alarm: Alarm, within_s: float) -> bool:
    return bool(select.select([alarm], [], [], within_s)[0])


def test_it_rings_at_its_moment_and_once(alarm: Alarm) -> None:
    assert not rings(alarm, 0.0)
    at = time.monotonic() + 0.05
    alarm.set(at)
    assert rings(alarm, LONG_S)
    assert time.monotonic() >= at
    alarm.silence()
    assert not rings(alarm, 0.0)
    alarm.silence()  # waits for nothing


@pytest.mark.parametrize("at", [0.0, -1.0, 1.0])
def test_a_moment_that_has_passed_is_now(alarm: Alarm, at: float) -> None:
    alarm.set(at)
    assert rings(alarm, LONG_S)


def test_the_last_moment_counts(alarm: Alarm) -> None:
    alarm.set(time.monotonic() + 3600)
    alarm.set(0.0)
    assert rings(alarm, LONG_S)
    alarm.silence()
    alarm.set(0.0)
    alarm.set(time.monotonic() + 3600)
    assert not rings(alarm, 0.05)
