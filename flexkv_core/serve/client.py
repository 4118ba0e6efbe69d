"""SharedBlocks: the methods of a BlockManager, of which a server does the work and this process's executor the copies.

While there is no server, or it does not answer in time, everything is a miss; a thread looks for one again and again. A call waits for the
server at most ``server_deadline_ms``.

When the connection breaks, the slots of what is under way stay this client's until none of its processes maps the segment, whatever happens
to the server (see ``session.py``); so copies go on and report, and loads that came through are good. What is new belongs to the next
connection, which brings a segment of its own: a copy is only ever given to an executor that was started with its segment.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from flexkv_core.block_manager import ModelConfig, executor_for, root_key
from flexkv_core.cache.tier_events import TierEvent
from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import FlexKVError
from flexkv_core.metrics import Counters
from flexkv_core.quantised import check_store_dtype
from flexkv_core.serve.link import Link, Refused, open_link
from flexkv_core.serve.tenants import Greeting
from flexkv_core.serve.wire import (
    Kind,
    Planned,
    WireError,
    pack_result,
    unpack_count,
    unpack_done,
    unpack_usage,
)
from flexkv_core.storage.memory import HostSegment, arrival_mark
from flexkv_core.tasks import KVResponseStatus, OnDone, Purpose, TaskDone
from flexkv_core.transfer.backoff import Backoff
from flexkv_core.transfer.layers import LayerStatus
from flexkv_core.transfer.plan import (
    Delivery,
    DeviceCopier,
    Executor,
    LayerwiseExecutor,
    OpResult,
    OpStatus,
    TransferOp,
)
from flexkv_core.types import KEY_BYTES, BlockIds, Direction, Slots

logger = logging.getLogger(__name__)

RESET_DEADLINE_S = 1.0
"""For a reset, which an operator has asked for."""
START_WAIT_S = 10.0
"""How long :meth:`SharedBlocks.start` waits for the first connection, so that the first requests find what there is."""
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 5.0
EARLY_MAX = 1024
"""Ends of unknown tasks that are kept. The plan of one that ends so soon is taken in within a moment, or given up."""


@dataclass
class _Task:
    """A task under way. ``link`` is the one that it belongs to."""

    task_id: int
    link: Link
    direction: Direction
    keys: bytes  # of exactly its blocks
    slots: Slots
    reads: Slots
    on_done: OnDone
    purpose: Purpose
    blocks: int
    launched: bool = False
    result: OpResult | None = None


class SharedBlocks:
    """See the module's text; what is not said here is as with :class:`~flexkv_core.block_manager.BlockManager`.

    Args:
        model_config, cache_config, device, track_events: as there; ``cache_config.server`` is the socket. Events are not collected: the
            tiers are the server's.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        cache_config: FlexKVConfig,
        device: DeviceCopier | Executor,
        track_events: bool = False,
    ) -> None:
        assert cache_config.server is not None
        if track_events:
            logger.info("KV events of the tiers of a server are not published by its engines")
        check_store_dtype(cache_config.store_dtype, model_config.layout)
        self.layout, self.config = model_config.layout, cache_config
        self.root = root_key(model_config, cache_config.namespace)
        self._path = Path(cache_config.server)
        self._deadline_s = cache_config.server_deadline_ms / 1e3
        self._model = model_config
        self._executor = executor_for(device, cache_config)
        self._switch = threading.RLock()  # the link in use, and what is submitted for it
        self._lock = threading.Lock()  # the tables; nothing is called under it
        self._link: Link | None = None
        self._fresh: Link | None = None
        self._hosts: dict[Link, HostSegment] = {}  # mapped, because it is in use or its copies have not ended
        self._tasks: dict[int, _Task] = {}
        self._fetches: dict[int, tuple[Link, Callable[[], None]]] = {}
        self._last_fetch = 0
        self._counters = Counters()
        self._usage = (0, 0)
        self._reset_owed = False
        self._last_refused_id = 0
        self._early: OrderedDict[int, TaskDone] = (
            OrderedDict()
        )  # ends of tasks whose plans are not taken in yet
        self._closed = threading.Event()
        self._seek = threading.Event()
        self._found = threading.Event()
        self._thread = threading.Thread(target=self._look_for_server, name="flexkv-serve-link", daemon=True)

    # Life

    def start(self) -> None:
        """Look for the server; goes on without one after START_WAIT_S."""
        self._seek.set()
        self._thread.start()
        if not self._found.wait(START_WAIT_S):
            logger.warning("server %s: not found yet; requests are computed until it is", self._path)
        self._adopt()

    def is_ready(self) -> bool:
        """Whether there is a server."""
        link = self._link
        return not self._closed.is_set() and link is not None and not link.is_broken

    def shutdown(self) -> None:
        """Leave. Copies that run end when their processes do, and the server waits for that."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._seek.set()
        for link in (self._link, self._fresh):
            if link is not None:
                link.close()  # before the executor reports as cancelled what may still run elsewhere
        if self._thread.is_alive():
            self._thread.join()
        with self._switch:
            self._executor.close()
        for task in list(self._tasks.values()):
            self._finish(task, _cancelled(task))
        for host in self._hosts.values():
            host.close()
        self._hosts.clear()

    def reset(self) -> None:
        """Forget everything that is cached, for all clients of the server. Until it has, nothing is found here."""
        self._reset_owed = True
        link = self._link
        if link is not None and link.call(Kind.RESET, b"", RESET_DEADLINE_S, unpack_count) is not None:
            self._reset_owed = False
        elif link is not None:
            link.close()  # the next one begins with it

    @property
    def host(self) -> HostSegment:
        """The memory of the server's host tier, as long as it is in use."""
        assert self._link is not None
        return self._link.host

    def counters(self) -> Counters:
        """Of this client's own requests; what concerns the tiers is counted by the server, see ``flexkv status``."""
        with self._lock:
            return replace(self._counters)

    def usage(self) -> tuple[int, int]:
        """Slots of the host tier that are taken, and all, as the server said within the last second; zeros without one."""
        return self._usage if self.is_ready() else (0, 0)

    def take_events(self, blocks_max: int = 16384) -> list[TierEvent]:
        """None are collected."""
        return []

    # By keys

    def match_keys(self, keys: bytes) -> int:
        """Blocks of the longest cached prefix of ``keys``; pins nothing, changes nothing."""
        link = self._link if self._fresh is None else self._usable_link()  # one that is broken has no answer
        found = link.match(keys, self._deadline_s) if link is not None else None
        return min(found or 0, len(keys) // KEY_BYTES)

    def is_in_host(self, keys: bytes, start_block: int) -> bool:
        """Whether a load could be done within a step: never said of a server's memory."""
        return False

    def get_keys(
        self, keys: bytes, start_block: int, on_done: OnDone, purpose: Purpose = Purpose.GET
    ) -> tuple[int, int]:
        """Pin the cached prefix of ``keys`` from ``start_block`` on; the task and how many blocks it is for."""
        _, task = self._plan(Kind.GET, keys, start_block, on_done, purpose)
        blocks = 0 if task is None else task.blocks
        with self._lock:
            self._count_lookup(len(keys) // KEY_BYTES, start_block, blocks, purpose)
        return (task.task_id if task else self._refused_id()), blocks

    def prefetch_keys(self, keys: bytes, start_block: int, on_done: OnDone) -> tuple[int, int]:
        """Bring blocks ``start_block`` … of the cached prefix of ``keys`` to the host tier; the task and how many are read."""
        _, task = self._plan(Kind.PREFETCH, keys, start_block, on_done, Purpose.PREFETCH)
        return (task.task_id, task.blocks) if task else (self._refused_id(), 0)

    def fetch_keys(self, keys: bytes, on_end: Callable[[], None]) -> bool:
        """Bring what only the server's remote tier has of ``keys`` to the host tier; whether ``on_end`` will be called."""
        link = self._usable_link()
        if link is None or not link.has_remote:
            return False
        with self._lock:
            self._last_fetch = number = self._last_fetch % 0xFFFFFFFF + 1
            self._fetches[number] = (link, on_end)
        waits = link.call(Kind.FETCH, keys, self._deadline_s, unpack_count, number)
        if not waits:
            with self._lock:
                self._fetches.pop(number, None)
        return bool(waits)

    def put_keys(self, keys: bytes, on_done: OnDone, first: int = 0) -> tuple[int, int, int]:
        """Reserve slots for what is new in ``keys``, for nothing when a block before ``first`` is; the task (below 0: the server did not
        answer in time), its first block and how many."""
        planned, task = self._plan(Kind.PUT, keys, first, on_done, Purpose.GET)
        if planned is None:
            return self._refused_id(), 0, 0
        if planned.start_block >= first:
            with self._lock:
                left = len(keys) // KEY_BYTES - planned.start_block - len(planned.slots)
                self._counters.dropped_blocks += max(0, left)
        return planned.task_id, planned.start_block, task.blocks if task else 0

    def launch_blocks(self, task_id: int, blocks: BlockIds, delivery: Delivery = Delivery.WHOLE) -> None:
        """Start a task's copy. ``blocks``: int64 [blocks of the task * blocks_per_slot], device blocks in order."""
        with self._switch:
            task = self._tasks.get(task_id)
            if task is None:
                return
            assert not task.launched
            assert len(blocks) == task.blocks * self.layout.blocks_per_slot
            task.launched = True
            if task.link is self._link and not task.link.is_broken:
                awaited = np.zeros(task.blocks, np.bool_)
                awaited[task.reads] = True
                op = TransferOp(
                    task_id,
                    task.direction,
                    task.keys,
                    task.slots,
                    blocks,
                    awaited if len(task.reads) else None,
                    delivery,
                )
                task.link.tell(Kind.LAUNCH, task_id)
                self._executor.submit(op)
                return
        self._finish(task, _cancelled(task))

    def wait_layers(self, task_id: int, count: int, timeout_s: float) -> LayerStatus:
        """Wait for the first ``count`` layers of a get with LAYERWISE delivery."""
        executor = self._executor
        if not isinstance(executor, LayerwiseExecutor):
            return LayerStatus.FAILED
        return executor.wait_layers(task_id, count, timeout_s)

    def cancel(self, task_id: int) -> None:
        """Give up a task. One that was not launched is forgotten and reports nothing; a copy that runs already ends first."""
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None:
                return
            if not task.launched:
                del self._tasks[task_id]
        if not task.launched:
            task.link.tell(Kind.CANCEL, task_id)
        elif task.purpose is not Purpose.PREFETCH:
            self._executor.cancel(task_id)

    # Inside

    def _plan(
        self, kind: Kind, keys: bytes, asked_from: int, on_done: OnDone, purpose: Purpose
    ) -> tuple[Planned | None, _Task | None]:
        """Ask for a plan; and its task, where there is something to do."""
        link = self._usable_link()
        if link is None:
            return None, None
        unpack = partial(Planned.unpack, blocks_max=len(keys) // KEY_BYTES, slots_max=link.host.slot_count)
        planned = link.call(kind, keys, self._deadline_s, unpack, asked_from, purpose)
        if planned is None:
            return None, None
        blocks = len(planned.reads if kind is Kind.PREFETCH else planned.slots)
        start, stop = planned.start_block, planned.start_block + blocks
        if not blocks:
            if kind is Kind.PREFETCH and start:  # all in host memory already: the answer says how many
                done = TaskDone(planned.task_id, KVResponseStatus.SUCCESS, np.ones(start, np.bool_))
                on_done(done)
            return planned, None
        task = _Task(
            planned.task_id,
            link,
            Direction.STORE if kind is Kind.PUT else Direction.LOAD,
            keys[KEY_BYTES * start : KEY_BYTES * stop],
            planned.slots,
            planned.reads,
            on_done,
            purpose,
            blocks,
            launched=kind is Kind.PREFETCH,
        )
        with self._lock:
            self._tasks[task.task_id] = task
            early = self._early.pop(task.task_id, None)
        if early is not None:
            self._finish(task, early)
        elif link.is_broken and task.launched:
            self._finish(task, _cancelled(task))
        return planned, task

    def _usable_link(self) -> Link | None:
        if self._fresh is not None:
            self._adopt()
        link = self._link
        return None if link is None or link.is_broken or self._closed.is_set() else link

    def _adopt(self) -> None:
        """Turn to the connection that was found. What the executor still has of the one before is dropped or ends there."""
        with self._switch:
            link, self._fresh = self._fresh, None
            if link is None or link.is_broken or self._closed.is_set():
                return
            if self._reset_owed and link.call(Kind.RESET, b"", RESET_DEADLINE_S, unpack_count) is None:
                link.close()
                return
            self._reset_owed = False
            try:
                self._executor.start(link.host, self._on_result)
            except FlexKVError:
                logger.exception("server %s: its memory cannot be used; requests are computed", self._path)
                link.close()
                return
            self._link = link

    def _on_result(self, result: OpResult) -> None:
        """A copy has ended; called by the executor on any thread."""
        with self._lock:
            task = self._tasks.get(result.op_id)
            if task is None or self._closed.is_set():
                return  # with the client gone, the end of its processes says when the slots are free
            task.result = result
            if task.purpose is Purpose.GET:
                self._count_copy(task, result)
        task.link.tell(Kind.RESULT, task.task_id, *pack_result(result))
        if task.link.is_broken:
            self._finish(task, _outcome(task))

    def _on_event(self, link: Link, kind: Kind, number: int, payload: memoryview) -> None:
        """The server says something; called on the link's thread."""
        if kind is Kind.USAGE:
            self._usage = unpack_usage(payload)
            return
        if kind is Kind.FETCHED:
            with self._lock:
                _, on_end = self._fetches.pop(number, (link, None))
            if on_end is not None:
                on_end()
            return
        if kind is not Kind.DONE:
            raise WireError(f"{kind.name} may not come from a server")
        done = unpack_done(number, payload)
        with self._lock:
            task = self._tasks.get(number)
            if task is None:  # its answer is not taken in yet, or came too late
                self._early[number] = done
                while len(self._early) > EARLY_MAX:
                    self._early.popitem(last=False)
                return
            if len(done.ok) != task.blocks and task.purpose is not Purpose.PREFETCH:
                raise WireError(f"the end of a task of {task.blocks} blocks speaks of {len(done.ok)}")
            if task.purpose is not Purpose.GET:
                self._count_done(task, done)
        self._finish(task, done)

    def _on_broken(self, link: Link) -> None:
        """End what only the server could end; copies that run report by themselves. Called on any thread."""
        with self._lock:
            tasks = [task for task in self._tasks.values() if task.link is link and task.launched]
            fetches = [number for number, (of, _) in self._fetches.items() if of is link]
            ends = [self._fetches.pop(number)[1] for number in fetches]
        for on_end in ends:
            on_end()
        for task in tasks:
            if task.result is not None or task.purpose is Purpose.PREFETCH:
                self._finish(task, _outcome(task))
            elif len(task.reads) and link in self._hosts:
                # What the server was to read will not be announced: a worker shall not wait for it until its deadline.
                slots = task.slots[task.reads]
                link.host.arrivals[slots] = arrival_mark(task.task_id, ok=False)
        self._seek.set()

    def _finish(self, task: _Task, done: TaskDone) -> None:
        """Forget a task and tell its caller, once."""
        with self._lock:
            if self._tasks.pop(task.task_id, None) is None:
                return
        task.on_done(done)

    def _refused_id(self) -> int:
        """For a task that was never made."""
        with self._lock:
            self._last_refused_id -= 1
            return self._last_refused_id

    # Counting, under the lock

    def _count_lookup(self, blocks: int, start: int, found: int, purpose: Purpose) -> None:
        counters, tokens = self._counters, self.layout.tokens_per_block
        if purpose is Purpose.GET:
            counters.lookups += 1
            counters.lookup_tokens += blocks * tokens
            counters.hit_tokens += found * tokens
        elif purpose is Purpose.CHECK:
            counters.verify_skipped += blocks - start - found

    def _count_copy(self, task: _Task, result: OpResult) -> None:
        is_done = result.status is OpStatus.DONE
        self._counters.add_copy(task.direction, result, self.layout.shard_bytes * self.layout.shard_count)
        if task.direction is Direction.LOAD and is_done:
            bad = ~result.ok
            bad[task.reads] = False
            self._counters.corrupt_blocks += int(bad.sum())

    def _count_done(self, task: _Task, done: TaskDone) -> None:
        if task.purpose is Purpose.PREFETCH:
            self._counters.prefetched_blocks += min(task.blocks, int(done.ok.sum()))
            return
        result = task.result
        checked = 0
        if result is not None and result.status is OpStatus.DONE:
            wrong = np.zeros_like(done.ok) if result.wrong is None else result.wrong
            checked = int((done.ok | wrong).sum())
        self._counters.verify_checked += checked
        self._counters.verify_skipped += task.blocks - checked
        self._counters.verify_mismatches += len(done.mismatches)

    # The thread that looks for a server

    def _look_for_server(self) -> None:
        pause = Backoff(RETRY_FIRST_S, RETRY_MAX_S)
        said = ""
        while not self._closed.is_set():
            self._seek.wait(RETRY_MAX_S)
            self._seek.clear()
            self._retire()
            if self._closed.is_set() or self._has_link():
                continue
            if not pause.is_over:
                self._closed.wait(RETRY_FIRST_S)
                self._seek.set()
                continue
            try:
                greeting = Greeting(self._model, self.config.namespace, self.root, f"process {os.getpid()}")
                link = open_link(self._path, greeting, self._on_event, self._on_broken)
            except (OSError, FlexKVError) as error:
                pause.failed()
                if str(error) != said:
                    level = logging.ERROR if isinstance(error, Refused) else logging.INFO
                    logger.log(level, "server %s: %s", self._path, said := str(error))
                self._seek.set()
                continue
            pause.succeeded()
            said = ""
            logger.info("server %s: connected", self._path)
            with self._lock:
                self._hosts[link] = link.host
            self._fresh = link
            self._found.set()

    def _has_link(self) -> bool:
        return any(link is not None and not link.is_broken for link in (self._link, self._fresh))

    def _retire(self) -> None:
        """Unmap the segments of broken connections whose copies have ended."""
        with self._lock:
            busy = {task.link for task in self._tasks.values()}
            unused = [link for link in self._hosts if link.is_broken and link not in busy]
        for link in unused:
            with self._switch:
                if self._link is link:
                    self._link = None
                    if isinstance(self._executor, LayerwiseExecutor):  # it maps the segment in this process
                        self._executor.close()
                if self._fresh is link:
                    self._fresh = None
            with self._lock:
                host = self._hosts.pop(link)
            link.close()
            host.close()


def _cancelled(task: _Task) -> TaskDone:
    return TaskDone(task.task_id, KVResponseStatus.CANCELLED, np.zeros(task.blocks, np.bool_))


def _outcome(task: _Task) -> TaskDone:
    """Of a task whose server is gone: a load that came through is good, nothing else is known to be."""
    result = task.result
    if task.direction is Direction.STORE or task.purpose is not Purpose.GET or result is None:
        return _cancelled(task)
    is_whole = result.status is OpStatus.DONE and bool(result.ok.all())
    status = KVResponseStatus.SUCCESS if is_whole else KVResponseStatus.FAILED
    return TaskDone(task.task_id, status, result.ok)
