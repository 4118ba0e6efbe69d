"""On which CPUs the parts of a benchmark run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager


def compute_cpus() -> str:
    """All CPUs of this process but the last, which is left to the engine's other processes, as vLLM does without a connector."""
    cpus = sorted(os.sched_getaffinity(0))
    return ",".join(str(cpu) for cpu in cpus[:-1] or cpus)


def other_cpus() -> set[int]:
    """What :func:`compute_cpus` leaves; the only one where there is but one."""
    return {max(os.sched_getaffinity(0))}


@contextmanager
def started_on(cpus: Set[int]) -> Iterator[None]:
    """What is started meanwhile, threads and processes, runs on these; on all where there are none."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
