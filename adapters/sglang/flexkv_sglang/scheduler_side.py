"""What the adapter decides in each scheduler's process: what to load, what to store, and until when a node of SGLang's tree is locked.

In SGLang every rank runs a scheduler of its own, and all must decide alike. Each rank has a BlockManager of its own for its part of the
KV; wherever the outcome could differ, the ranks take the smallest (``agree``), as SGLang's own tiers do. A load is copied and checked
before SGLang hears of it, so that one that fails is recomputed like any miss. A store holds a lock on the tree's node until the copy has
ended on every rank. All methods run on the scheduler's thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from flexkv_core.block_manager import ModelConfig
from flexkv_core.config import FlexKVConfig
from flexkv_core.fetches import Fetches
from flexkv_core.keys import KeyChain, namespace_root
from flexkv_core.prefetch import Prefetcher
from flexkv_core.serve.choice import open_blocks
from flexkv_core.tasks import KVResponseStatus, TaskDone
from flexkv_core.transfer.cpus import EngineCpus
from flexkv_core.transfer.engine import TransferEngine
from flexkv_core.transfer.plan import DeviceCopier
from flexkv_core.types import KEY_BYTES
from flexkv_sglang.events import EventLog

if TYPE_CHECKING:
    from sglang.srt.disaggregation.kv_events import KVCacheEvent

logger = logging.getLogger(__name__)

REQUESTS_MAX = 65536
"""Requests that are remembered; the oldest is forgotten first, which costs it a second hashing of its tokens."""

HELP_S = 0.02
"""How long the scheduler's thread lends itself to a load before it looks whether the load has ended."""

POLL_S = 0.0002
"""Between two looks, where there is nothing to help with."""

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RequestView:
    """What FlexKV needs to know of a request.

    ``tokens``: all that are known, prompt and output; may grow between calls, never changes. ``namespace``: what separates its blocks
    from those of equal tokens. ``salt``: the cache salt among it, for KV events.
    """

    request_id: str
    tokens: Sequence[int]
    namespace: tuple[str, ...] = ()
    salt: str | None = None


@dataclass(frozen=True)
class Held:
    """Device slots of a sequence's first tokens, int64 [tokens], and how to let go of them."""

    slots: Slots
    release: Callable[[], None]


@dataclass
class _Request:
    chain: KeyChain
    hit_blocks: int = 0
    stored_blocks: int = 0
    load_failed: bool = False


@dataclass
class _Store:
    release: Callable[[], None]
    ended: threading.Event = field(default_factory=threading.Event)


class SchedulerSide:
    """See the module's text.

    Args:
        model: what this rank's bytes are.
        copier: of this rank's device.
        agree: the smallest of all ranks' values, by a collective call; the value itself where there is one rank.
        is_alone: there is one rank.
        events: collects what came to the tiers and left them; None: nobody asks.
        behind_forward: a context in which the device's work, as the copier sees it, is that of the engine's forward.
        cpus: of an engine that computes on CPUs.

    Raises:
        ConfigError: a setting or directory that cannot be used.
        CapacityError: memory or disk cannot be had.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: FlexKVConfig,
        copier: DeviceCopier,
        agree: Callable[[int], int],
        is_alone: bool,
        events: EventLog | None = None,
        behind_forward: Callable[[], AbstractContextManager[object]] = nullcontext,
        cpus: EngineCpus | None = None,
    ) -> None:
        self._config = config
        self._agree = agree
        self._is_alone = is_alone
        self._behind_forward = behind_forward
        self._block_tokens = model.layout.tokens_per_block
        self._page_tokens = model.layout.device_block_tokens
        self._engine = TransferEngine(
            copier,
            queue_ops_max=config.queue_ops_max,
            timeout_s=config.transfer_timeout_s,
            verify=config.verify_checksums,
        )
        self._events = events
        self.manager = open_blocks(model, config, self._engine, events is not None, cpus)
        self.manager.start()
        self._root = self.manager.root
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        self._stores: deque[_Store] = deque()
        self._is_paused = False
        self._calls: deque[Callable[[], None]] = deque()  # of other threads, for the scheduler's
        self._prefetcher = (
            Prefetcher(self.manager, self._calls.append, config.transfer_timeout_s)
            if config.ssd_dirs or config.server
            else None
        )
        self._fetches = (
            Fetches(self.manager, self._calls.append, config) if config.remote_url or config.server else None
        )

    # A request's way in

    def queued(self, request: RequestView) -> None:
        """The engine has put the request into its queue: what of it lies in lower tiers only is read ahead."""
        if not self.reads_ahead or self._is_paused:
            return
        state = self._state(request)

        def keys() -> bytes:
            return self._keys(state, request, len(request.tokens) - 1)

        if self._fetches is not None:
            self._fetches.begin(request.request_id, keys)
        if self._prefetcher is not None:
            self._prefetcher.add(request.request_id, keys)
            self._prefetcher.start()

    @property
    def reads_ahead(self) -> bool:
        """Whether requests may have to wait for blocks from a lower tier; the same on every rank."""
        return self._prefetcher is not None or self._fetches is not None

    def waiting(self, request_ids: Sequence[str]) -> list[bool]:
        """Which requests should stay in the queue, because blocks are on their way from a lower tier. Not agreed among the ranks."""
        while self._calls:
            self._calls.popleft()()
        due: set[str] = set()
        if self._prefetcher is not None:
            self._prefetcher.start()
            due = self._prefetcher.due()
        fetches = self._fetches
        return [
            request_id in due or (fetches is not None and fetches.is_pending(request_id))
            for request_id in request_ids
        ]

    def matched_tokens(self, request: RequestView, limit: int, device_tokens: int) -> int:
        """Tokens that a load would add to the ``device_tokens`` that the device holds, of the request's first ``limit``. Pins nothing."""
        state = self._state(request)
        hit_blocks = 0
        if not state.load_failed and not self._is_paused:
            hit_blocks = self.manager.match_keys(self._keys(state, request, limit))
        hit_blocks = self._agree(hit_blocks)
        gain = hit_blocks * self._block_tokens - device_tokens
        if gain < max(1, self._config.load_tokens_min):
            return 0
        state.hit_blocks = hit_blocks
        return gain

    def load(self, request_id: str, slots: Slots) -> bool:
        """Copy what :meth:`matched_tokens` promised into ``slots``, the places of the promise's tokens; the same answer on every rank.

        False: nothing of it may be used, and the request is not asked for again.
        """
        state = self._requests.get(request_id)
        loaded = state is not None and self._load(state, slots)
        self._stop_reading(request_id)
        loaded = bool(self._agree(int(loaded)))
        if state is not None and not loaded:
            state.load_failed = True
        return loaded

    # A request's way out

    def store(self, request: RequestView, tokens: int, prompt_tokens: int, hold: Callable[[], Held]) -> None:
        """Store the full blocks of the request's first ``tokens``, whose KV the tree holds. ``hold`` locks them."""
        if self._is_paused:
            return
        state = self._state(request)
        if not self._config.store_decode:
            tokens = min(tokens, prompt_tokens)
        if tokens // self._block_tokens <= state.stored_blocks:
            return
        state.stored_blocks = tokens // self._block_tokens
        keys = self._keys(state, request, tokens)
        ended = threading.Event()
        task_id, start, count = self.manager.put_keys(keys, lambda done: ended.set())
        if not count:
            ended.set()
            if self._is_alone:
                return
        held = hold()
        self._stores.append(_Store(held.release, ended))
        if count:
            first, stop = start * self._block_tokens, (start + count) * self._block_tokens
            if self._events is not None:
                stored = keys[start * KEY_BYTES : (start + count) * KEY_BYTES]
                self._events.storing(stored, list(request.tokens[first:stop]), request.salt)
            assert stop <= len(held.slots), (stop, len(held.slots))
            self._launch(task_id, self._pages(held.slots[first:stop]))

    def left_queue(self, request_id: str) -> None:
        """The request waits no more: nothing is read ahead for it."""
        self._stop_reading(request_id)

    def forget(self, request_id: str) -> None:
        """The request has ended or gives up its place; what is being stored of it goes on."""
        self._requests.pop(request_id, None)
        self._stop_reading(request_id)

    # Locks

    def ended_stores(self) -> int:
        """How many of the oldest stores have ended on this rank; the ranks agree before :meth:`release_stores`."""
        ended = 0
        for store in self._stores:
            if not store.ended.is_set():
                break
            ended += 1
        return ended

    @property
    def pending_stores(self) -> int:
        """Stores whose nodes are locked."""
        return len(self._stores)

    def release_stores(self, count: int) -> None:
        """Unlock the nodes of the oldest ``count`` stores."""
        for _ in range(count):
            self._stores.popleft().release()

    def finish_stores(self) -> bool:
        """Wait for all stores and unlock their nodes, for an eviction that finds too little; whether there were any."""
        count = len(self._stores)
        self._drain()
        self.release_stores(count)
        return count > 0

    # Life

    def take_events(self) -> list[KVCacheEvent]:
        """What came to the tiers and left them since the last call, in SGLang's types."""
        return [] if self._events is None else self._events.of(self.manager.take_events())

    def reset(self) -> None:
        """The engine's tree is emptied. What is cached stays, unless the weights changed; no copy runs any more when this returns."""
        self._drain()
        self._stores.clear()
        for request_id in list(self._requests):
            self.forget(request_id)
        if self._is_paused:
            # Nobody knows whether these weights were seen before, so nothing older is found, and none of this after a restart.
            self._root = namespace_root(self.manager.root, ("weights", uuid4().hex))
            self._is_paused = False

    def weights_change(self) -> None:
        """The weights are about to change: nothing is loaded or stored until the engine has emptied its tree of the old ones' KV."""
        self._is_paused = True

    def close(self) -> None:
        """Give the memory back."""
        self.manager.shutdown()

    # Inside

    def _state(self, request: RequestView) -> _Request:
        state = self._requests.get(request.request_id)
        if state is None:
            root = namespace_root(self._root, request.namespace)
            state = _Request(KeyChain(root, self._block_tokens))
            self._requests[request.request_id] = state
            if len(self._requests) > REQUESTS_MAX:
                self._requests.popitem(last=False)
        return state

    def _stop_reading(self, request_id: str) -> None:
        if self._prefetcher is not None:
            self._prefetcher.remove(request_id)
        if self._fetches is not None:
            self._fetches.remove(request_id)

    def _keys(self, state: _Request, request: RequestView, tokens: int) -> bytes:
        """Keys of the full blocks of the first ``tokens``; none where a token is no int32."""
        blocks = max(0, tokens) // self._block_tokens
        try:
            state.chain.extend(request.tokens, blocks * self._block_tokens)
        except ValueError as error:
            logger.warning("request %s is not cached: %s", request.request_id, error)
            return b""
        return state.chain.keys(blocks)

    def _load(self, state: _Request, slots: Slots) -> bool:
        stop = state.hit_blocks
        start_token = stop * self._block_tokens - len(slots)
        start = start_token // self._block_tokens
        ended: list[TaskDone] = []
        task_id, count = self.manager.get_keys(state.chain.keys(stop), start, ended.append)
        if count < stop - start:  # evicted since the match, or no room to read into
            if count:
                self.manager.cancel(task_id)
            return False
        per_block = self._block_tokens // self._page_tokens
        skipped = (
            start_token - start * self._block_tokens
        ) // self._page_tokens  # these the device holds already
        pages = np.concatenate([np.full(skipped, -1, np.int64), self._pages(slots)])
        assert len(pages) == count * per_block, (len(pages), count, per_block)
        self._launch(task_id, pages)
        return self._wait(task_id, ended)

    def _launch(self, task_id: int, pages: npt.NDArray[np.int64]) -> None:
        """Start a copy behind what the engine's forward may still write to or read from the pages."""
        with self._behind_forward():
            self.manager.launch_blocks(task_id, pages)

    def _wait(self, task_id: int, ended: list[TaskDone]) -> bool:
        """Wait until a load has ended; the engine gives up by itself what does not arrive in time."""
        deadline = time.monotonic() + 2 * self._config.transfer_timeout_s
        while not ended and time.monotonic() < deadline:
            self._engine.help(HELP_S)
            if not ended:
                time.sleep(POLL_S)
        if not ended:
            # The device does not answer. Its slots go back to the engine, so nothing may be copied into them later.
            logger.critical(
                "a load did not end in %.1f s: FlexKV is switched off", 2 * self._config.transfer_timeout_s
            )
            self.manager.shutdown()
            return False
        return ended[0].status is KVResponseStatus.SUCCESS

    def _pages(self, slots: Slots) -> npt.NDArray[np.int64]:
        """Device blocks, int64 [slots / page], of slots that follow pages."""
        firsts = slots[:: self._page_tokens]
        assert not (firsts % self._page_tokens).any(), "slots do not begin at pages"
        return np.ascontiguousarray(firsts // self._page_tokens)

    def _drain(self) -> None:
        deadline = time.monotonic() + self._config.transfer_timeout_s
        for store in self._stores:
            if not store.ended.wait(max(0.0, deadline - time.monotonic())):
                logger.critical(
                    "a store did not end in %.1f s: FlexKV is switched off", self._config.transfer_timeout_s
                )
                self.manager.shutdown()
                return
