"""The remote process: owns the client of the store that many machines share. Run by the supervisor, never by hand.

The main thread takes commands and never calls the store. Lookups, reads and writes have threads of their own, so that a lookup never waits
for a transfer; writes go in small batches and let reads go first. What a command asked for is reported when the client is done with the
memory that it was given, not when somebody stopped waiting for it. A client that hangs well beyond its deadline ends the process: only
so is it certain that it writes nowhere any more.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flexkv_core.storage.base import BlockStatus, Statuses
from flexkv_core.storage.memory import HostSegment
from flexkv_core.storage.remote import open_store
from flexkv_core.storage.remote.base import RemoteSpec, RemoteStore, statuses_of
from flexkv_core.storage.remote.search import longest_prefix
from flexkv_core.storage.remote.values import ValueBuffers, names_of, regions_of
from flexkv_core.transfer.child import PARENT_POLL_S, Child, Completer, run_child, watch
from flexkv_core.transfer.rate import Rate
from flexkv_core.transfer.ring import Array, CommandKind, Ring

logger = logging.getLogger(__name__)

BATCH_BYTES = 16 << 20
BATCH_BLOCKS_MAX = 1024
"""One call: enough values to keep the client's connections busy, few enough that a deadline means something."""
LOOKUP_LANES = 2
READ_LANES = 2  # one batch is verified while the next is on its way
READS_FIRST_S = 0.05
"""A write batch waits at most this long for reads, so that a steady stream of reads does not starve it."""
HANGS_AFTER = 3.0
"""Times the timeout of a call: a client that is not back by then does not come back."""


class Lane:
    """A thread that runs commands of one kind, batch by batch. ``buffers``: headers of its batches; None if it moves no values."""

    def __init__(
        self, name: str, work: Callable[[Array, ValueBuffers | None], None], buffers: ValueBuffers | None
    ) -> None:
        self.buffers = buffers
        self._work = work
        self._since = 0.0  # when the batch that runs began, 0 for none
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, waiting: queue.SimpleQueue[Array | None]) -> None:
        """Begin to take batches from ``waiting``, which lanes may share; None ends one of them."""
        self._waiting = waiting
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the end."""
        self._thread.join(timeout_s)

    def hangs_since(self) -> float:
        """When the batch that runs began (time.monotonic()); infinite when none runs."""
        return self._since or float("inf")

    def _run(self) -> None:
        while (commands := self._waiting.get()) is not None:
            self._since = time.monotonic()
            self._work(commands, self.buffers)
            self._since = 0.0


class RemoteWorker:
    """Serves one manager until it is told to stop. ``run`` is the main thread's."""

    def __init__(self, spec: RemoteSpec, child: Child) -> None:
        host = child.attach_host(spec.layout)
        self._spec = spec
        self._commands: Ring = child.commands
        self._complete: Completer = child.complete
        self._parent_pid = child.spec.parent_pid
        self._stop_at: float | None = None
        self._batch_blocks = _batch_blocks(spec)
        self._lookups: queue.SimpleQueue[Array | None] = queue.SimpleQueue()
        self._reads: queue.SimpleQueue[Array | None] = queue.SimpleQueue()
        self._writes: queue.SimpleQueue[Array | None] = queue.SimpleQueue()
        self._reading = 0  # batches, queued or under way
        self._counting = threading.Lock()
        self._read_rate, self._write_rate = Rate(spec.read_bytes_per_s), Rate(spec.write_bytes_per_s)
        self._lanes = [
            *((Lane(f"lookup-{i}", self._lookup, None), self._lookups) for i in range(LOOKUP_LANES)),
            *((Lane(f"read-{i}", self._read, self._buffers(host)), self._reads) for i in range(READ_LANES)),
            (Lane("write", self._write, self._buffers(host)), self._writes),
        ]
        buffers = [lane.buffers for lane, _ in self._lanes if lane.buffers is not None]
        self._store: RemoteStore = open_store(spec, regions_of(host, buffers))

    def run(self) -> None:
        """Serve until STOP, SIGTERM or the parent's end."""
        for lane, waiting in self._lanes:
            lane.start(waiting)
        poll = select.poll()
        parent = watch(self._parent_pid)
        for fd in (self._commands.fileno(), *([] if parent is None else [parent])):
            poll.register(fd, select.POLLIN)
        while self._stop_at is None and os.getppid() == self._parent_pid:
            poll.poll(PARENT_POLL_S * 1000)
            self._take(self._commands.take())
            self._end_if_hung()
        self._finish()

    def stop(self, deadline: float) -> None:
        """Have :meth:`run` return; ``deadline`` (time.monotonic()) bounds what is still written. For a signal handler."""
        self._stop_at = deadline

    def _buffers(self, host: HostSegment) -> ValueBuffers:
        return ValueBuffers(host, self._batch_blocks)

    # The main thread

    def _take(self, commands: Array) -> None:
        for stop in commands[commands["kind"] == CommandKind.STOP]:
            self.stop(time.monotonic() + int(stop["index"]) / 1000)
        commands = commands[commands["kind"] != CommandKind.STOP]
        if not len(commands):
            return
        changes = (np.diff(commands["kind"]) != 0) | (np.diff(commands["op"]) != 0)
        for part in np.split(commands, np.flatnonzero(changes) + 1):
            kind = CommandKind(part["kind"][0])
            if kind is CommandKind.EXISTS:
                self._lookups.put(part)
                continue
            for start in range(0, len(part), self._batch_blocks):
                batch = part[start : start + self._batch_blocks]
                if kind is CommandKind.READ:
                    with self._counting:
                        self._reading += 1
                    self._reads.put(batch)
                else:
                    self._writes.put(batch)

    def _end_if_hung(self) -> None:
        limit_s = HANGS_AFTER * self._spec.timeout_s
        if time.monotonic() - min(lane.hangs_since() for lane, _ in self._lanes) > limit_s:
            logger.error("a call of the store's client has not come back for %.0f s; ending", limit_s)
            os._exit(1)

    def _finish(self) -> None:
        """Write what is queued until the stop's deadline, and end. A client that hangs is left behind."""
        for _, waiting in self._lanes:
            waiting.put(None)
        deadline = self._stop_at or time.monotonic()
        for lane, _ in self._lanes:
            lane.join(max(0.0, deadline - time.monotonic()))
        if all(lane.hangs_since() == float("inf") for lane, _ in self._lanes):
            self._store.close()
        os._exit(0)  # threads of a client may still wait for the network

    # The lanes' threads

    def _lookup(self, commands: Array, _: ValueBuffers | None) -> None:
        deadline = time.monotonic() + self._spec.timeout_s
        found = self._prefix(commands, deadline)
        statuses = statuses_of(len(commands), BlockStatus.IO_ERROR if found is None else BlockStatus.DROPPED)
        if found:
            statuses[:found] = BlockStatus.OK
        self._complete(commands["op"], commands["index"], statuses)

    def _read(self, commands: Array, buffers: ValueBuffers | None) -> None:
        assert buffers is not None
        self._read_rate.wait(len(commands) * self._spec.layout.slot_bytes)
        keys, slots = np.ascontiguousarray(commands["key"]), np.ascontiguousarray(commands["host_slot"])
        epoch = int(commands["epoch"][0])
        found = self._store.read(
            names_of(self._spec.prefix, keys, epoch),
            buffers.places(keys, slots),
            time.monotonic() + self._spec.timeout_s,
        )
        statuses = buffers.verify(keys, slots, epoch, found)
        with self._counting:
            self._reading -= 1
        self._complete(commands["op"], commands["index"], statuses)

    def _write(self, commands: Array, buffers: ValueBuffers | None) -> None:
        assert buffers is not None
        if commands["kind"][0] == CommandKind.FORGET:
            names = names_of(self._spec.prefix, commands["key"], int(commands["epoch"][0]))
            self._store.delete(names, time.monotonic() + self._spec.timeout_s)
            return
        self._let_reads_go_first()
        if self._stop_at is not None and time.monotonic() > self._stop_at:
            statuses = statuses_of(len(commands), BlockStatus.DROPPED)
        else:
            statuses = self._write_new(commands, buffers)
        self._complete(commands["op"], commands["index"], statuses)

    def _write_new(self, commands: Array, buffers: ValueBuffers) -> Statuses:
        """Write but what the store has already."""
        deadline = time.monotonic() + self._spec.timeout_s
        found = self._prefix(commands, deadline)
        if found is None:
            return statuses_of(len(commands), BlockStatus.IO_ERROR)
        statuses = statuses_of(len(commands), BlockStatus.OK)
        new = commands[found:]
        if len(new):
            self._write_rate.wait(len(new) * self._spec.layout.slot_bytes)
            keys, slots = np.ascontiguousarray(new["key"]), np.ascontiguousarray(new["host_slot"])
            epoch = int(new["epoch"][0])
            buffers.fill(keys, slots, epoch)
            names = names_of(self._spec.prefix, keys, epoch)
            deadline = time.monotonic() + self._spec.timeout_s
            statuses[found:] = self._store.write(names, buffers.values(slots), deadline)
        return statuses

    def _prefix(self, commands: Array, deadline: float) -> int | None:
        """How many blocks the store has from the first on; None when it does not say."""
        names = names_of(self._spec.prefix, commands["key"], int(commands["epoch"][0]))
        failed = False

        def ask(places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
            nonlocal failed
            statuses = self._store.exists([names[place] for place in places.tolist()], deadline)
            failed |= bool((statuses == BlockStatus.IO_ERROR).any())
            there: npt.NDArray[np.bool_] = (statuses == BlockStatus.OK) & (not failed)
            return there

        found = longest_prefix(len(names), ask, self._store.probes_max)
        return None if failed else found

    def _let_reads_go_first(self) -> None:
        waited_until = time.monotonic() + READS_FIRST_S
        while self._reading and self._stop_at is None and time.monotonic() < waited_until:
            time.sleep(0.001)


def _batch_blocks(spec: RemoteSpec) -> int:
    """Blocks of a batch: also no more than the bandwidth bounds let through in about a second."""
    bounds = [bound for bound in (spec.read_bytes_per_s, spec.write_bytes_per_s) if bound]
    return min(BATCH_BLOCKS_MAX, max(1, min(BATCH_BYTES, *bounds, BATCH_BYTES) // spec.layout.slot_bytes))


def main() -> None:
    """Entry point of the process."""
    run_child("flexkv-remote", _serve)


def _serve(child: Child) -> Callable[[], None]:
    worker = RemoteWorker(RemoteSpec.from_dict(child.spec.settings), child)
    child.on_terminate(worker.stop)
    return worker.run
