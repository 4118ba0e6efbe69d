"""Which CPUs an engine that computes on CPUs leaves to others.

Such an engine binds each thread that computes to a CPU. A thread of another process that runs there, for however short, keeps all of
them waiting. A vLLM server had 0.90 of the throughput of one without a store while its remote process ran anywhere, and 0.97 while it ran on the
CPU that was left (one of two bound; 40 requests of 0.26 s each, 2 MB written for each; two servers of one command differ by some hundredths).
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
    of this process may: where the thread that calls this is bound, those that the engine started before are not. Where the system does
    not say, all are spare.
    """
    allowed = frozenset(os.sched_getaffinity(0)).union(*_affinities(os.getpid()))
    bound = frozenset[int]().union(*(cpus for cpus in _affinities_of_session() if cpus < allowed))
    return EngineCpus(allowed, allowed - bound or allowed)


def _affinities_of_session() -> Iterator[set[int]]:
    session = os.getsid(0)
    for process in map(int, filter(str.isdigit, _names("/proc"))):
        with suppress(OSError):  # it has ended, or is another user's
            if os.getsid(process) == session:
                yield from _affinities(process)


def _affinities(process: int) -> Iterator[set[int]]:
    """Of its threads."""
    for thread in _names(f"/proc/{process}/task"):
        with suppress(OSError):  # it has ended
            yield os.sched_getaffinity(int(thread))


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # the process has ended, or there is no /proc
        return []
