"""What every process that a manager starts has in common: how it is told what to do, how it answers, and when it ends.

The process gets its specification on stdin, which nobody else can read, and everything that is shared by inherited descriptor. It ends
when it is told to, when it gets SIGTERM, or when the manager's process has ended, however that ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import FlexKVError
from flexkv_core.layout import KVLayout
from flexkv_core.storage.memory import Descriptor, HostSegment, SegmentHandle
from flexkv_core.transfer.ring import COMMAND, COMPLETION, Ring, RingHandle

logger = logging.getLogger(__name__)

PARENT_POLL_S = 1.0
STOP_S = 10.0  # after SIGTERM
SWITCH_S = 0.0005
"""How long one of the threads keeps the interpreter while another waits for it. With Python's 5 ms the ring runs dry beside a thread that
computes: reads of 256 KiB kept 0.91 of their bandwidth, and 0.99 with this (medians of 7 turns, a shared disk of 1.5 GB/s, two cores, 2026)."""
COMPLETION_PUSH_S = (
    60.0  # the supervisor takes completions all the time; one that does not is as good as dead
)

Column = npt.NDArray[Any]
"""One number a block."""


@dataclass(frozen=True)
class WorkerSpec:
    """What the process is given on stdin, as JSON. ``*_fd`` and ``fds`` are inherited descriptors.

    ``settings``: of the tier, as its spec's ``as_dict`` gives them. ``host``: of the segment, with ``host_slots`` slots. ``table_fd``: memory
    for the SSD catalogue's records, -1 for other tiers. ``status_fd``: a pipe for one line of JSON that says "ready", or which error ended
    the start. ``cpus``: where the process runs; None: where the thread ran that started it.
    """

    settings: dict[str, Any]
    host_fd: int
    host_slots: int
    huge_pages: bool
    table_fd: int
    commands: tuple[int, int, int, int]
    completions: tuple[int, int, int, int]
    status_fd: int
    parent_pid: int
    log_level: int
    cpus: list[int] | None

    def to_json(self) -> bytes:
        """For the process's stdin."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()


class Completer:
    """Reports blocks that ended; called on any thread."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._lock = threading.Lock()

    def __call__(self, ops: Column, indexes: Column, statuses: Column) -> None:
        """In pieces, so that no number of blocks is larger than the ring."""
        records = np.zeros(len(ops), COMPLETION)
        records["op"], records["index"], records["status"] = ops, indexes, statuses
        piece = self._ring.handle.capacity
        with self._lock:
            for start in range(0, len(records), piece):
                if not self._ring.push(records[start : start + piece], COMPLETION_PUSH_S):
                    logger.error("nobody takes completions; ending")
                    os._exit(1)


class Child:
    """The process's ends of what it shares with its manager."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.commands = Ring(RingHandle(*spec.commands), COMMAND)
        self.complete = Completer(Ring(RingHandle(*spec.completions), COMPLETION))

    def attach_host(self, layout: KVLayout) -> HostSegment:
        """The host tier."""
        spec = self.spec
        handle = SegmentHandle(Descriptor.own(spec.host_fd), spec.host_slots, layout, spec.huge_pages)
        return HostSegment(spec.host_fd, handle)

    def on_terminate(self, stop: Callable[[float], None]) -> None:
        """Have SIGTERM call ``stop`` with the deadline (time.monotonic()) of what is still done."""
        signal.signal(signal.SIGTERM, lambda *_: stop(time.monotonic() + STOP_S))


def run_child(name: str, serve: Callable[[Child], Callable[[], None]]) -> None:
    """The process's whole life. ``serve`` starts it and returns what runs until the end; its errors end the start."""
    spec = WorkerSpec(**json.load(sys.stdin))
    logging.basicConfig(level=spec.log_level, format=f"%(levelname)s {name}[%(process)d] %(message)s")
    sys.setswitchinterval(SWITCH_S)
    _run_on(spec.cpus)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the manager decides when to stop
    try:
        run = serve(Child(spec))
    except (FlexKVError, OSError) as error:
        _say(spec.status_fd, {"error": type(error).__name__, "message": str(error)})
        sys.exit(1)
    _say(spec.status_fd, {"ready": True})
    run()


def _run_on(cpus: Collection[int] | None) -> None:
    """This process's threads: libraries have started some, and all others inherit it."""
    if cpus is not None:
        try:
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), cpus)
        except OSError as error:  # they went offline, or the container may not use them any more
            logger.warning("runs on other CPUs than %s: %s", sorted(cpus), error)


def watch(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the kernel refuses, then polling must do."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _say(fd: int, content: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the manager has ended meanwhile, and so will this process
        os.write(fd, json.dumps(content).encode() + b"\n")
    os.close(fd)
