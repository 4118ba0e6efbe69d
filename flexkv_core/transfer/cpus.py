"""Which CPUs an engine that computes on CPUs leaves to others.

Such an engine binds each thread that computes to a CPU. A thread of another process that runs there, for however short, keeps all of
them waiting: with the remote process anywhere a miss took a tenth longer, with it on the CPUs that are left nothing that could be measured
(requests of 0.26 s, 2 MB written each, one CPU of two bound).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineCpus:
    """``allowed``: where the engine may run at all. ``spare``: those of them to which it has bound no thread; all where it bound every one."""

    allowed: frozenset[int]
    spare: frozenset[int]


def engine_cpus() -> EngineCpus:
    """The CPUs of the engine that this process is part of; once its threads that compute are bound.

    Read from the system, not from an engine's settings: how they name CPUs, and what they mean by default, differs from version to version.
    The engine's processes are those of this session. FlexKV's own have sessions of their own. What the engine may use is what any thread
    of this process may: where the thread that calls this is bound, those that the engine started before are not.
    """
    allowed = frozenset[int]().union(*_affinities(os.getpid()))
    bound = frozenset[int]().union(*(cpus for cpus in _affinities_of_session() if cpus < allowed))
    return EngineCpus(allowed, allowed - bound or allowed)


def _affinities_of_session() -> Iterator[set[int]]:
    session = os.getsid(0)
    for process in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):  # it has ended, or is another user's
            if os.getsid(process) == session:
                yield from _affinities(process)


def _affinities(process: int) -> Iterator[set[int]]:
    """Of its threads."""
    for thread in os.listdir(f"/proc/{process}/task"):
        with suppress(ProcessLookupError):
            yield os.sched_getaffinity(int(thread))
