"""RemoteLink: what a BlockManager does for the store that it shares with other machines, apart from the manager's tasks.

Read path, a fetch: which prefix the store has beyond the local tiers is asked, or known; then host slots are taken as for
a put, filled from the store in pieces, verified, and published, after which they are ordinary hits. Nobody waits for a fetch beyond its
deadlines: its request is told then, and what arrives later serves the next one. Lookups that no request may wait for (see ``Patience``)
are sent by the supervisor's thread, one after the other: neither a step that is being scheduled nor another lookup shall wait for them. With
``remote_wait_ms`` a fetch that finds less than the whole sequence looks again for so long, because another engine may be writing the rest.
Write path: sequences that the policy chooses wait in a bounded queue, see :mod:`flexkv_core.remote_writes`.

The store is key-addressed and holds no record of ours, so nothing here must agree with other machines. The manager's lock guards every
call; the remote process reports on a thread of its own, which takes that lock.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from flexkv_core.cache.engine import GlobalCacheEngine
from flexkv_core.cache.plans import PutPlan
from flexkv_core.config import FlexKVConfig, child_environment
from flexkv_core.layout import KVLayout
from flexkv_core.remote_policy import RemotePolicy
from flexkv_core.remote_writes import RemoteWrites
from flexkv_core.storage.base import BlockStatus, Statuses
from flexkv_core.storage.memory import HostSegment
from flexkv_core.storage.remote import check_usable, client_environment
from flexkv_core.storage.remote.base import RemoteSpec
from flexkv_core.storage.remote.breaker import Allow, Breaker
from flexkv_core.storage.remote.patience import Patience
from flexkv_core.storage.remote.presence import Presence
from flexkv_core.storage.remote.values import deployment_prefix
from flexkv_core.tasks import prefix_length
from flexkv_core.transfer.remote_process import RemoteProcess
from flexkv_core.transfer.ring import CommandKind
from flexkv_core.transfer.supervisor import Progress
from flexkv_core.types import KEY_BYTES, Tier

PIECE_BYTES = 64 << 20
"""Read at a time for one request, and published when it is there."""
HOST_SHARE = 2
"""One fetch fills at most one in this many slots of the host tier: it must not evict its own beginning."""
FETCHES_MAX = 64
"""Under way at a time; a request beyond it does without."""
DEFERRED_MAX = 16
"""Lookups that nobody waits for, and that wait for their turn; beyond it the oldest is not asked."""
MISSING_S = 1.0
"""How long the store is believed not to have a block. Other machines write all the time."""
LOOK_AGAIN_S, LOOK_AGAIN_SHARE = 0.02, 0.25
"""A sequence that is being written is looked for again after this share of the time that it was waited for, not before LOOK_AGAIN_S."""


class _Phase(Enum):
    """Where a fetch stands."""

    LOOKING = "looking"
    READING = "reading"


@dataclass(eq=False)
class _Fetch:
    """The blocks of one sequence on their way from the store to the host tier.

    ``on_end``: told once, when the fetch has ended or its request has waited long enough; None if nobody waits (any more). ``found`` counts
    blocks from the sequence's first on, as ``next_block`` does, the first that was not asked for. ``deadline`` (time.monotonic()) is of
    the phase.
    """

    keys: bytes
    epoch: int
    on_end: Callable[[], None] | None
    phase: _Phase = _Phase.LOOKING
    next_block: int = 0
    found: int = 0
    deadline: float = 0.0
    begun: float = field(default_factory=time.monotonic)
    look_at: float = 0.0  # when it is looked for again, time.monotonic()
    is_late: bool = False
    is_probe: bool = False  # of a store that failed: nobody waits
    read_blocks: int = 0
    followers: list[Callable[[], None]] = field(default_factory=list)

    @property
    def block_count(self) -> int:
        """Of the sequence."""
        return len(self.keys) // KEY_BYTES

    def tell(self) -> None:
        """Whoever waits need not any more."""
        waiting = [] if self.on_end is None else [self.on_end]
        waiting += self.followers
        self.on_end = None
        self.followers.clear()
        for on_end in waiting:
            on_end()


@dataclass
class _Op:
    """A batch that the remote process was given. ``statuses``: uint32 [blocks]. ``plan``: of a read."""

    fetch: _Fetch
    statuses: Statuses
    plan: PutPlan | None = None
    is_lost: bool = False


class RemoteLink:
    """See the module's text.

    Args:
        lock: the manager's.
        new_id: numbers for batches, of the same series as the manager's tasks.
        on_commit: called under the lock when blocks have come to the host tier.
        cpus: of the remote process; None: of the thread that calls :meth:`start`.
    """

    def __init__(
        self,
        spec: RemoteSpec,
        config: FlexKVConfig,
        policy: RemotePolicy,
        host: HostSegment,
        cache: GlobalCacheEngine,
        lock: threading.Condition,
        new_id: Callable[[], int],
        on_commit: Callable[[], None],
        cpus: Collection[int] | None = None,
    ) -> None:
        self._config = config
        self._policy = policy
        self._cache = cache
        self._lock = lock
        self._new_id = new_id
        self._on_commit = on_commit
        self._tokens = host.layout.tokens_per_block
        self._piece_blocks = max(1, PIECE_BYTES // host.layout.slot_bytes)
        self._fetch_blocks_max = max(1, cache.capacity(Tier.HOST) // HOST_SHARE)
        self._ops: dict[int, _Op] = {}
        self._watched: list[_Fetch] = []  # between two looks
        self._deferred: deque[_Fetch] = deque()  # looked for later, for the requests to come
        self._by_first_missing: dict[bytes, _Fetch] = {}
        self._epoch = 0
        self._presence = Presence(config.remote_known_s, MISSING_S)
        self._lookup_breaker, self._read_breaker = Breaker(), Breaker()
        self._patience = Patience()
        self._lookups = self._late_lookups = self._read_blocks = self._late_reads = 0
        self._failures = self._corrupt_blocks = 0
        self._process = RemoteProcess(
            spec,
            child_environment(client_environment(spec)),
            host,
            self._on_progress,
            self._on_tick,
            cpus,
        )
        queue_blocks = max(1, int(config.remote_queue_bytes) // host.layout.slot_bytes)
        self._writes = RemoteWrites(self._process, cache, self._presence, new_id, queue_blocks, host.layout)

    def counters(self) -> dict[str, int]:
        """What happened since the link was made, by its name in :class:`~flexkv_core.metrics.Counters`."""
        breakers = (self._lookup_breaker, self._read_breaker, self._writes.breaker)
        return {
            "remote_lookups": self._lookups,
            "remote_late_lookups": self._late_lookups,
            "remote_read_blocks": self._read_blocks,
            "remote_late_reads": self._late_reads,
            "remote_written_blocks": self._writes.written_blocks,
            "remote_dropped_blocks": self._writes.dropped_blocks,
            "remote_corrupt_blocks": self._corrupt_blocks,
            "remote_failures": self._failures + self._writes.failures,
            "remote_breaker_openings": sum(breaker.openings for breaker in breakers),
            "remote_restarts": self._process.restarts,
        }

    @property
    def pid(self) -> int:
        """Of the remote process; -1 while there is none."""
        return self._process.pid

    def start(self) -> None:
        """Start the remote process, and wait for nothing."""
        self._process.start()

    def wait_up(self, timeout_s: float) -> bool:
        """Wait until the remote process takes commands; whether it does."""
        with self._lock:
            return self._lock.wait_for(lambda: self._process.is_up, timeout_s)

    # Read path

    def fetch(self, keys: bytes, on_end: Callable[[], None]) -> bool:
        """Bring what only the store has of a sequence to the host tier. True: something may come, and ``on_end`` is called once, under
        the lock, when it has come or when it has been waited for long enough. False: there is nothing to wait for."""
        local, asked = self._cache.match(keys), len(keys) // KEY_BYTES
        if not self._process.is_up or not self._policy.reads((asked - local) * self._tokens):
            return False
        leader = self._by_first_missing.get(_key(keys, local))
        if leader is not None:
            # Another request's fetch brings the same blocks, or finds out that there are none.
            if leader.on_end is not None:
                leader.followers.append(on_end)
            return leader.on_end is not None
        if len(self._ops) + len(self._watched) >= FETCHES_MAX:
            return False
        fetch = _Fetch(bytes(keys), self._epoch, on_end, next_block=local)
        fetch.found = self._presence.prefix(keys, local)
        is_missing = not self._config.remote_wait_ms and self._presence.is_missing(_key(keys, fetch.found))
        is_known = fetch.found == asked or is_missing
        if not is_known and not self._may_wait():
            self._defer(fetch)
            return False
        begun = self._begin_reading(fetch) if is_known else self._look_up(fetch)
        if not begun:
            self._forget(fetch)
            return False
        self._process.wake(fetch.deadline)
        if fetch.is_probe:
            fetch.on_end = None
        return not fetch.is_probe

    def _defer(self, fetch: _Fetch) -> None:
        fetch.on_end, fetch.is_probe = None, True
        self._by_first_missing[_key(fetch.keys, fetch.next_block)] = fetch
        self._deferred.append(fetch)
        if len(self._deferred) > DEFERRED_MAX:
            self._forget(self._deferred.popleft())

    def _look_up_deferred(self) -> None:
        """The next one, if none is under way."""
        while self._deferred and not any(op.plan is None and op.fetch.is_probe for op in self._ops.values()):
            fetch = self._deferred.popleft()
            if fetch.epoch != self._epoch or not self._look_up(fetch):
                self._forget(fetch)

    def _look_up(self, fetch: _Fetch) -> bool:
        allowed = self._lookup_breaker.ask()
        if allowed is Allow.NO:
            return False
        op = self._new_id()
        unknown = fetch.keys[KEY_BYTES * fetch.found :]
        if not self._process.lookup(op, unknown, fetch.epoch):
            return False
        self._lookups += 1
        fetch.is_probe |= allowed is Allow.PROBE
        fetch.phase, fetch.deadline = _Phase.LOOKING, _in_ms(self._config.remote_lookup_deadline_ms)
        self._ops[op] = _Op(fetch, _dropped(len(unknown) // KEY_BYTES))
        self._by_first_missing[_key(fetch.keys, fetch.next_block)] = fetch
        return True

    def _may_wait(self) -> bool:
        """Whether a request may wait for a lookup. One that is to wait for what another engine writes may, whatever was found before."""
        return self._config.remote_wait_ms > 0 or self._patience.is_left

    def _begin_reading(self, fetch: _Fetch) -> bool:
        """Read what was found, if that is worth it; whether anything is read."""
        if not self._policy.reads((fetch.found - fetch.next_block) * self._tokens):
            return False
        allowed = self._read_breaker.ask()
        if allowed is Allow.NO:
            return False
        fetch.is_probe |= allowed is Allow.PROBE
        fetch.phase, fetch.deadline = _Phase.READING, _in_ms(self._config.remote_read_deadline_ms)
        self._by_first_missing.setdefault(_key(fetch.keys, fetch.next_block), fetch)
        return self._read_piece(fetch)

    def _read_piece(self, fetch: _Fetch) -> bool:
        """Take slots for the next blocks and have them filled; False when there is nothing more to read."""
        last = min(fetch.found, fetch.next_block + self._fetch_blocks_max - fetch.read_blocks)
        while fetch.next_block < last:
            stop = min(last, fetch.next_block + self._piece_blocks)
            plan = self._cache.plan_put(fetch.keys[: KEY_BYTES * stop])
            if not plan.count:
                if plan.start_block < stop:
                    return False  # no room
                fetch.next_block = plan.start_block  # somebody else stores these just now
                continue
            op = self._new_id()
            if not self._process.read(op, plan.keys, plan.slots, fetch.epoch):
                self._cache.abort_put(plan)
                return False
            fetch.next_block = plan.start_block + plan.count
            # Whoever comes now has what the pieces before brought, and follows from here.
            self._by_first_missing.setdefault(_key(fetch.keys, plan.start_block), fetch)
            self._ops[op] = _Op(fetch, _dropped(plan.count), plan)
            return True
        return False

    def _take_lookup(self, op: _Op) -> None:
        fetch = op.fetch
        if prefix_length(op.statuses == BlockStatus.OK):
            self._patience.restore()
        elif not fetch.is_probe:
            self._patience.spend(min(time.monotonic(), fetch.deadline) - fetch.begun)
        if (op.statuses == BlockStatus.IO_ERROR).any() or op.is_lost:
            self._failures += 1
            self._lookup_breaker.failed()
            self._end(fetch)
            return
        if time.monotonic() > fetch.deadline:
            self._note_late(fetch)
        else:
            self._lookup_breaker.succeeded()
        if fetch.epoch != self._epoch:
            self._end(fetch)
            return
        fetch.found += prefix_length(op.statuses == BlockStatus.OK)
        self._presence.note_found(fetch.keys[: KEY_BYTES * fetch.found])
        if fetch.found < fetch.block_count:
            if self._watch(fetch):
                return
            self._presence.note_missing(_key(fetch.keys, fetch.found))
        self._take_found(fetch)

    def _take_found(self, fetch: _Fetch) -> None:
        # A late answer serves the next request: nothing is read for one that went without.
        if fetch.is_late or not self._begin_reading(fetch):
            self._end(fetch)
        elif fetch.is_probe:
            fetch.tell()

    def _watch(self, fetch: _Fetch) -> bool:
        """Have the rest of the sequence looked for again soon, if its request still waits for that; whether it is."""
        now = time.monotonic()
        fetch.look_at = now + max(LOOK_AGAIN_S, LOOK_AGAIN_SHARE * (now - fetch.begun))
        left_s = fetch.begun + self._config.remote_wait_ms / 1000 - fetch.look_at
        if left_s < 0 or fetch.is_late or fetch.is_probe or fetch.on_end is None:
            return False
        self._watched.append(fetch)
        self._process.wake(fetch.look_at)
        return True

    def _look_again(self, now: float) -> None:
        """Look for what is due; where that cannot be asked, go on with what was found."""
        due = [fetch for fetch in self._watched if fetch.look_at <= now]
        self._watched = [fetch for fetch in self._watched if fetch.look_at > now]
        for fetch in due:
            if fetch.epoch != self._epoch:
                self._end(fetch)
            elif not self._look_up(fetch):
                self._take_found(fetch)
            elif fetch.is_probe:
                fetch.tell()

    def _take_read(self, op: _Op) -> None:
        fetch, plan = op.fetch, op.plan
        assert plan is not None
        arrived = prefix_length(op.statuses == BlockStatus.OK)
        if arrived:
            self._cache.commit_put(plan, arrived)
        else:
            self._cache.abort_put(plan)
        fetch.read_blocks += arrived
        self._read_blocks += arrived
        self._judge_read(fetch, plan, op)
        if arrived:
            self._on_commit()
        whole = arrived == plan.count and fetch.epoch == self._epoch
        if not whole or fetch.on_end is None or not self._read_piece(fetch):
            self._end(fetch)

    def _judge_read(self, fetch: _Fetch, plan: PutPlan, op: _Op) -> None:
        statuses = op.statuses
        corrupt, failed = statuses == BlockStatus.CORRUPT, statuses == BlockStatus.IO_ERROR
        keys = np.frombuffer(plan.keys, "V16")
        if corrupt.any():
            self._corrupt_blocks += int(corrupt.sum())
            self._process.forget(keys[corrupt].tobytes(), fetch.epoch)
        good = prefix_length(statuses == BlockStatus.OK)
        if good < plan.count:
            self._presence.forget_found(fetch.keys, plan.start_block + good)
            # A write of the whole sequence begins behind this: a search from its first block could miss the hole.
            self._presence.note_found(fetch.keys[: KEY_BYTES * (plan.start_block + good)])
            self._presence.note_missing(keys[good].tobytes())
        if failed.any() or corrupt.all() or op.is_lost:
            self._failures += 1
            self._read_breaker.failed()
        elif time.monotonic() > fetch.deadline:
            self._note_late(fetch)
        else:
            self._read_breaker.succeeded()

    def _note_late(self, fetch: _Fetch) -> None:
        """Its request goes without; counted once a fetch."""
        if fetch.is_late:
            return
        fetch.is_late = True
        fetch.tell()
        if fetch.phase is _Phase.LOOKING:
            self._late_lookups += 1
            self._lookup_breaker.failed()
        else:
            self._late_reads += 1
            self._read_breaker.failed()

    def _end(self, fetch: _Fetch) -> None:
        self._forget(fetch)
        fetch.tell()

    def _forget(self, fetch: _Fetch) -> None:
        """Nobody follows it any more."""
        for key in [key for key, other in self._by_first_missing.items() if other is fetch]:
            del self._by_first_missing[key]

    # Write path

    def stored(self, keys: bytes, start_block: int) -> None:
        """A sequence's blocks from ``start_block`` on have come to the host tier, computed by this engine."""
        if self._policy.writes_stored(len(keys) // KEY_BYTES * self._tokens):
            self._writes.offer(keys, start_block)

    def used(self, keys: bytes) -> None:
        """A sequence that was stored before is used again."""
        if self._policy.writes_used(len(keys) // KEY_BYTES * self._tokens):
            self._writes.offer_again(keys)

    def expel(self, keys: bytes) -> None:
        """These blocks' bytes are not what their keys say, whatever their checksums: their values are removed."""
        self._presence.clear()
        self._process.forget(keys, self._epoch)

    # All of it

    def clear(self) -> None:
        """Forget everything: what was written until now is not found any more, by this manager. The store is shared, so nothing is
        removed there; a manager that was reset shares with no other, because only the engine knows why it was reset."""
        self._epoch = secrets.randbits(63) + 1
        self._presence.clear()
        self._writes.clear(self._epoch)

    def close(self, timeout_s: float) -> None:
        """Write what waits, within ``timeout_s``, and end the process. Called without the lock."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while self._writes.pump() and time.monotonic() < deadline:
                self._lock.wait(0.01)
        self._process.close(max(0.1, deadline - time.monotonic()))

    # On the supervisor's thread

    def _on_tick(self) -> None:
        with self._lock:
            now = time.monotonic()
            fetches = [op.fetch for op in self._ops.values() if not op.fetch.is_late]
            for fetch in fetches:
                if now >= fetch.deadline:
                    self._note_late(fetch)
            self._look_again(now)
            self._look_up_deferred()
            left = [op.fetch.deadline for op in self._ops.values() if not op.fetch.is_late]
            left += [fetch.look_at for fetch in self._watched]
            if left:
                self._process.wake(min(left))
            self._writes.pump()
            self._lock.notify_all()  # the process may have come up

    def _on_progress(self, progress: Progress) -> None:
        with self._lock:
            if progress.kind is CommandKind.WRITE:
                self._writes.take(progress)
            else:
                self._take(progress)
            self._writes.pump()
            self._lock.notify_all()

    def _take(self, progress: Progress) -> None:
        op = self._ops[progress.op]
        op.statuses[progress.indexes] = progress.statuses
        op.is_lost |= progress.is_lost
        if not progress.finished:
            return
        del self._ops[progress.op]
        if progress.kind is CommandKind.EXISTS:
            self._take_lookup(op)
            self._look_up_deferred()
        else:
            self._take_read(op)


def remote_spec(config: FlexKVConfig, layout: KVLayout, root: bytes) -> RemoteSpec | None:
    """What the configuration says of the remote tier; None if there is none.

    Raises:
        ConfigError: no such store, its library is not installed, or an option that cannot be used.
    """
    if config.remote_url is None:
        return None
    spec = RemoteSpec(
        url=config.remote_url,
        prefix=deployment_prefix(root),
        layout=layout,
        options=dict(config.remote_options),
        timeout_s=config.remote_timeout_s,
        username=config.remote_username,
        password_file=config.remote_password_file,
        write_bytes_per_s=int(config.remote_write_bytes_per_s),
        read_bytes_per_s=int(config.remote_read_bytes_per_s),
    )
    check_usable(spec)
    return spec


def _key(keys: bytes, block: int) -> bytes:
    return keys[KEY_BYTES * block : KEY_BYTES * (block + 1)]


def _dropped(count: int) -> Statuses:
    return np.full(count, BlockStatus.DROPPED, np.uint32)


def _in_ms(milliseconds: float) -> float:
    return time.monotonic() + milliseconds / 1000
