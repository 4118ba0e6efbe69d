"""The connector's scheduler side: what to load, what to store, and which blocks must not be freed yet.

It knows requests and steps; what is cached and where is the BlockManager's business. All methods run on the scheduler's thread. A load is
asynchronous: the request waits outside the batch. A store of a step's full blocks starts after the step's forward; the blocks stay
the request's until it has ended, because a finished request is held back and a preemption waits. Blocks that leave a window may
become another's at once: the step that gives them away waits.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from flexkv_core.block_manager import ModelConfig
from flexkv_core.config import FlexKVConfig
from flexkv_core.fetches import Fetches
from flexkv_core.keys import KeyChain, namespace_root
from flexkv_core.prefetch import Prefetcher
from flexkv_core.serve.choice import open_blocks
from flexkv_core.tasks import KVResponseStatus, Purpose, TaskDone, prefix_length
from flexkv_core.transfer.cpus import engine_cpus
from flexkv_core.transfer.plan import Delivery, TransferOp
from flexkv_core.types import KEY_BYTES, BlockIds, Direction
from flexkv_core.verify import HitSampler
from flexkv_vllm.admission import LoadAdmission
from flexkv_vllm.compat.hybrid import block_tables
from flexkv_vllm.compat.preemptions import preempted_ids, resumed_ids
from flexkv_vllm.compat.request import is_cacheable, loadable_tokens, namespace_of, salts_of, token_list
from flexkv_vllm.compat.settings import data_parallel_index
from flexkv_vllm.drafts import unsettled_tokens, withheld_blocks
from flexkv_vllm.events import EventLog, publishes_events
from flexkv_vllm.groups import Groups, Tables, of_engine, of_lists
from flexkv_vllm.in_step import InStepPolicy
from flexkv_vllm.in_step_stores import InStepStorePolicy
from flexkv_vllm.layout import check_supported, identity, ranks_of, slot_layout
from flexkv_vllm.metadata import StepMetadata, WorkerResults
from flexkv_vllm.stats import FlexKVStats
from flexkv_vllm.step_executor import StepExecutor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

DECODE_STORE_BLOCKS = 8
"""While a request generates, full blocks are stored in batches of this many (the rest when it ends): fewer, larger transfers."""


@dataclass
class _Check:
    """Blocks ``next_block`` … ``stop`` - 1 of a request are compared once the engine has computed them."""

    next_block: int
    stop: int


@dataclass
class _RequestState:
    request: Request
    chain: KeyChain
    device_blocks: list[list[int]] = field(
        default_factory=list
    )  # a list a group, where the engine does not show its own
    local_tokens: int = 0  # what the device held at the last lookup
    hit_blocks: int = 0  # what was promised then
    planned_blocks: int = 0  # blocks that were looked at for storing
    unanswered: int | None = (
        None  # from which block on no server said that it knows them, or where to store them
    )
    stores: dict[int, int] = field(default_factory=dict)  # store or check under way -> its first block
    is_sampled: bool | None = None  # None: it had no hit yet
    check: _Check | None = None
    loading: int | None = None  # the load under way
    loading_blocks: tuple[int, ...] | None = None  # where to, while no worker knows of it
    load_failed: bool = False
    is_in_step: bool = False  # the load that was promised last is within its step
    restore_from: int | None = None  # after such a load failed: what was stored in its step is not there


class SchedulerSide:
    """See the module's text.

    Raises:
        ConfigError: a model, layout or setting that cannot be served.
        CapacityError: the host tier's memory cannot be had.
    """

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: FlexKVConfig) -> None:
        check_supported(vllm_config, kv_cache_config, config)
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        self._may_load, self._may_store = transfer.is_kv_consumer, transfer.is_kv_producer
        if not self._may_store:  # nor may it write again what the store has lost since
            config = config.model_copy(update={"remote_write": "never"})
        self._config = config
        layout = slot_layout(vllm_config, kv_cache_config, config)
        self._block_tokens = layout.tokens_per_block
        self._unsettled_tokens = unsettled_tokens(vllm_config)
        self._withheld_blocks = withheld_blocks(vllm_config)
        self._groups = Groups.of(kv_cache_config, config.tokens_per_block)
        self._kv_cache_manager: KVCacheManager | None = None
        self._losable: dict[int, frozenset[int]] = {}  # store or check -> blocks that its request may lose
        self._given: set[int] = set()  # blocks that were taken for loads since the last step
        self._executor = StepExecutor(ranks_of(vllm_config, kv_cache_config).count, config.queue_ops_max)
        self.events = EventLog(
            layout.tokens_per_block, enabled=config.events and publishes_events(vllm_config)
        )
        self._in_step = InStepPolicy(vllm_config, config)
        self._admission = LoadAdmission(vllm_config, kv_cache_config)
        self._loads_in_step: set[str] = set()  # since the last step
        self._stores_in_step = InStepStorePolicy(vllm_config, config)
        self._sampler = HitSampler(config.verify_sample)
        self._checks: set[int] = set()  # planned since the last step
        model = ModelConfig(
            identity(vllm_config, kv_cache_config, config),
            layout,
            replica=data_parallel_index(vllm_config.parallel_config),
        )
        cpus = engine_cpus() if current_platform.is_cpu() else None  # the workers are ready
        self.manager = open_blocks(model, config, self._executor, self.events.enabled, cpus)
        self.manager.start()
        self._counters = self.manager.counters()
        self._requests: dict[str, _RequestState] = {}
        self._releases: dict[str, frozenset[int]] = {}
        self._unloadable: dict[str, tuple[int, ...]] = {}
        self._ended: deque[Callable[[], None]] = (
            deque()
        )  # what tasks report, on any thread, until the next call
        self._prefetcher = (
            Prefetcher(self.manager, self._ended.append, config.transfer_timeout_s)
            if config.prefetch_queued and (config.ssd_dirs or config.server)
            else None
        )
        self._fetches = (
            Fetches(self.manager, self._ended.append, config)
            if (config.remote_url or config.server) and self._may_load
            else None
        )

    # A request's way in

    def bind(self, kv_cache_manager: KVCacheManager) -> None:
        """The engine's cache manager, with its block tables, where the version shows it."""
        self._kv_cache_manager = kv_cache_manager
        self._in_step.bind(kv_cache_manager)

    def arrived(self, request: Request) -> None:
        """The engine has taken the request in, and will look it up later. Versions that do not say so are heard of with the lookup."""
        self._in_step.arrived(request.request_id)
        self.queued(request)

    def queued(self, request: Request) -> None:
        """Read ahead for a request that the engine will look up later."""
        if not self._may_load or (self._prefetcher is None and self._fetches is None):
            return
        state = self._state(request)
        if state is None:
            return
        if self._fetches is not None:
            self._fetches.begin(request.request_id, partial(self._prompt_keys, state))
        if self._prefetcher is not None:
            self._prefetcher.add(request.request_id, partial(self._prompt_keys, state))

    def matched_tokens(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """Tokens that a load would add to the ``local_tokens`` that the device holds. Pins nothing; may be called every step.

        None: ask again in the next step; the request's blocks are on their way from a lower tier to host memory, or others that hold
        blocks of the device must run first.
        """
        if not self._admission.may_enter(request):
            return None, False
        state = self._state(request)
        if state is None or not self._may_load or state.load_failed:
            return 0, False
        self.queued(request)
        if self._is_on_its_way(request.request_id):
            return None, False
        state.local_tokens = local_tokens
        state.hit_blocks = max(0, self.manager.match_keys(self._prompt_keys(state)) - self._withheld_blocks)
        gain = state.hit_blocks * self._block_tokens - local_tokens
        if gain < max(1, self._config.load_tokens_min):
            state.hit_blocks = 0
            return 0, False
        if not self._admission.admits(request, state.hit_blocks * self._block_tokens):
            state.hit_blocks = 0
            return None, False
        if self._is_sampled(state):
            state.check = _Check(local_tokens // self._block_tokens, state.hit_blocks)
            state.hit_blocks = 0
            return 0, False
        state.is_in_step = self._is_loaded_in_step(state)
        return gain, not state.is_in_step

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """Start the load that :meth:`matched_tokens` promised into the blocks that the engine took for it."""
        if self._prefetcher is not None:
            self._prefetcher.remove(request.request_id)
        state = self._requests.get(request.request_id)
        if state is None or not external_tokens:
            return
        state.device_blocks = [list(table) for table in blocks.get_block_ids()]
        self._admission.holds(request.request_id, sum(map(len, state.device_blocks)))
        start = state.local_tokens // self._block_tokens
        wanted = self._groups.blocks(of_lists(state.device_blocks), start, state.hit_blocks)
        self._given.update(wanted.tolist())
        self._groups.leave_out_held(wanted, start, state.local_tokens)  # maybe shared with others
        task_id, count = self.manager.get_keys(
            state.chain.keys(state.hit_blocks),
            start,
            lambda done: self._ended.append(partial(self._load_ended, request.request_id, done)),
        )
        is_short = count < state.hit_blocks - start
        if is_short and self._groups.fail_as_one:
            self.manager.cancel(task_id)
            count = 0
        found = wanted[: count * self._groups.per_slot]
        if state.is_in_step:
            self._loads_in_step.add(request.request_id)
        if count:
            state.loading = task_id
            state.loading_blocks = tuple(int(block) for block in found if block >= 0)
            delivery = Delivery.TENTATIVE if state.is_in_step else Delivery.WHOLE
            self.manager.launch_blocks(task_id, found, delivery)
        if is_short:
            # Less than was promised: host memory has no room for what the SSD holds. The rest counts as failed and is computed.
            self._load_failed(state)
            self._unloadable[request.request_id] = tuple(
                int(block) for block in wanted[len(found) :] if block >= 0
            )

    # Each step

    def build_metadata(self, output: SchedulerOutput) -> StepMetadata:
        """Plan the stores of what this step computes, and pack everything for the workers."""
        self._take_ended()
        wait_before = self._take_back_preempted(output) | self._stores_that_lose(output)
        self._follow_blocks(output)
        self._admission.ran(output.num_scheduled_tokens)
        for request_id, scheduled in output.num_scheduled_tokens.items():
            state = self._requests.get(request_id)
            if state is not None:
                self._store(state, state.request.num_computed_tokens + scheduled, finished=False)
        if self._prefetcher is not None:
            self._prefetcher.start()
        loads, stores, checks = self._ops()
        self._take_ended()  # another server drops loads that no worker knows of: this step must not compute on them
        is_used = loads or stores or checks or self.manager.is_ready()
        metadata = StepMetadata(
            segment=self._executor.segment if is_used else None,
            loads=loads,
            stores=tuple(stores),
            checks=tuple(checks),
            wait_before=wait_before,
            releases=self._releases,
            unloadable=self._unloadable,
            in_step=frozenset(self._loads_in_step),
            idle=output.total_num_scheduled_tokens == 0,
        )
        self._releases, self._unloadable = {}, {}
        self._loads_in_step.clear()
        return metadata

    def take_results(self, results: WorkerResults) -> None:
        """What the workers reported."""
        for op_id, of_ranks in results.results.items():
            self._executor.report(op_id, of_ranks)
        self._take_ended()

    # A request's way out

    def finished(self, request: Request, device_blocks: Sequence[list[int]]) -> bool:
        """Store what is left; True when the blocks must be kept until the workers have named the request. ``device_blocks``: a list
        a group."""
        self._take_ended()
        self._in_step.left(request.request_id)
        self._admission.left(request.request_id)
        if self._prefetcher is not None:
            self._prefetcher.remove(request.request_id)
        if self._fetches is not None:
            self._fetches.remove(request.request_id)
        state = self._requests.get(request.request_id)
        if state is None:
            return False
        if state.loading is not None:
            return False  # the engine keeps the blocks of an aborted load until the workers have named it
        if any(device_blocks):
            state.device_blocks = list(device_blocks)
            self._store(state, request.num_computed_tokens, finished=True)
        del self._requests[request.request_id]
        if not state.stores:
            return False
        self._releases[request.request_id] = frozenset(state.stores)
        return True

    def reset(self) -> bool:
        """Forget what is cached."""
        self.manager.reset()
        self.events.cleared()
        return True

    def take_events(self) -> Iterable[KVCacheEvent]:
        """What was stored and removed since the last call."""
        happened = self.manager.take_events()
        self._take_ended()  # the requests of what was stored
        self.events.happened(happened)
        return self.events.take()

    def take_stats(self) -> FlexKVStats | None:
        """What was counted since the last call; None if nothing."""
        before, self._counters = self._counters, self.manager.counters()
        if before == self._counters:
            return None
        return FlexKVStats.between(before, self._counters, *self.manager.usage())

    def shutdown(self) -> None:
        """Give the memory back."""
        self.manager.shutdown()

    # Inside

    def _state(self, request: Request) -> _RequestState | None:
        state = self._requests.get(request.request_id)
        if state is None and is_cacheable(request):
            root = namespace_root(self.manager.root, namespace_of(request))
            state = _RequestState(request, KeyChain(root, self._block_tokens, salts_of(request)))
            self._requests[request.request_id] = state
        return state

    def _is_on_its_way(self, request_id: str) -> bool:
        if self._fetches is not None:
            self._take_ended()  # no step may come between the report and this question
            if self._fetches.is_pending(request_id):
                return True
        return self._prefetcher is not None and self._prefetcher.is_reading(request_id)

    def _prompt_keys(self, state: _RequestState) -> bytes:
        """Keys of the blocks that a load may bring."""
        limit = loadable_tokens(state.request) // self._block_tokens
        state.chain.extend(token_list(state.request), limit * self._block_tokens)
        return state.chain.keys(limit)

    def _take_ended(self) -> None:
        while self._ended:
            self._ended.popleft()()

    def _take_back_preempted(self, output: SchedulerOutput) -> frozenset[int]:
        """Stores of requests that were preempted: their blocks may be overwritten by this very step."""
        pending: set[int] = set()
        for request_id in preempted_ids(output, (state.request for state in self._requests.values())):
            state = self._requests.get(request_id)
            if state is not None:
                pending.update(state.stores)
                state.planned_blocks = 0
        return frozenset(pending)

    def _stores_that_lose(self, output: SchedulerOutput) -> frozenset[int]:
        """Stores under way of blocks that left a window and that this step gives to others."""
        given, self._given = self._given, set()
        if not self._losable:
            return frozenset()
        for new in output.scheduled_new_reqs:
            given.update(*new.block_ids)
        for block_ids in output.scheduled_cached_reqs.new_block_ids:
            given.update(*block_ids or ())
        return frozenset(task for task, blocks in self._losable.items() if not blocks.isdisjoint(given))

    def _follow_blocks(self, output: SchedulerOutput) -> None:
        """Keep each request's device blocks as the engine's workers do; what has left a window stays in, see :meth:`_tables`."""
        for new in output.scheduled_new_reqs:
            state = self._requests.get(new.req_id)
            if state is not None:
                state.device_blocks = [list(group) for group in new.block_ids]
        cached = output.scheduled_cached_reqs
        resumed = resumed_ids(cached)
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            state = self._requests.get(request_id)
            if state is None or block_ids is None:
                continue
            if request_id in resumed:
                state.device_blocks = [list(group) for group in block_ids]
                continue
            for table, new_blocks in zip(state.device_blocks, block_ids, strict=True):
                table.extend(new_blocks)

    def _store(self, state: _RequestState, computed_tokens: int, finished: bool) -> None:
        """Plan a store of the full blocks among the first ``computed_tokens``, of which only tokens that are known for sure count."""
        request = state.request
        if state.check is not None:
            self._compare(state, state.check, computed_tokens // self._block_tokens, finished)
        if not self._may_store:
            return
        known = request.num_tokens if self._config.store_decode else request.num_prompt_tokens
        full = max(0, min(computed_tokens, known) - self._unsettled_tokens) // self._block_tokens
        if finished and state.unanswered is not None:
            state.planned_blocks = state.unanswered  # once more: the server may only have been slow
        generating = computed_tokens > request.num_prompt_tokens
        batch = min(DECODE_STORE_BLOCKS, self._groups.store_batch_max or DECODE_STORE_BLOCKS)
        if full - state.planned_blocks < (batch if generating and not finished else 1):
            return
        state.chain.extend(token_list(request), full * self._block_tokens)
        planned, state.planned_blocks = state.planned_blocks, full
        tables = self._tables(state, finished)
        task_id, start, count = self.manager.put_keys(
            state.chain.keys(full),
            lambda done: self._ended.append(partial(self._store_ended, state, done)),
            self._groups.first_whole(tables, planned, full),
        )
        state.unanswered = planned if task_id < 0 else None
        if count:
            delivery = self._stores_in_step.delivery(count * self.manager.layout.slot_bytes)
            blocks = self._groups.blocks(tables, start, start + count)
            self._launch(state, task_id, start, blocks, delivery)

    def _tables(self, state: _RequestState, finished: bool) -> Tables:
        """The request's device blocks as they are now. Those of one that has ended came with the news."""
        manager = self._kv_cache_manager
        if manager is None or finished or not self._groups.lose_blocks:
            return of_lists(state.device_blocks)
        return of_engine(block_tables(manager, state.request.request_id))

    def _launch(
        self,
        state: _RequestState,
        task_id: int,
        start: int,
        blocks: BlockIds,
        delivery: Delivery = Delivery.WHOLE,
    ) -> None:
        """Start a store or a check, from FlexKV block ``start`` on; what it needs is held until it has ended."""
        state.stores[task_id] = start
        if self._groups.lose_blocks:
            self._losable[task_id] = self._groups.losable(blocks)
        self.manager.launch_blocks(task_id, blocks, delivery)

    def _is_sampled(self, state: _RequestState) -> bool:
        """Whether the request's hit is computed again and compared; decided once a request."""
        if state.is_sampled is None:
            last_key = state.chain.keys(state.hit_blocks)[-KEY_BYTES:]
            state.is_sampled = self._sampler.take(last_key)
        return state.is_sampled

    def _compare(self, state: _RequestState, check: _Check, full: int, finished: bool) -> None:
        """Have the sampled blocks among the first ``full`` compared. They are held like blocks that are being stored."""
        stop = min(full, check.stop)
        if stop <= check.next_block:
            return
        start, check.next_block = check.next_block, stop
        task_id, count = self.manager.get_keys(
            state.chain.keys(stop),
            start,
            lambda done: self._ended.append(partial(self._check_ended, state, done)),
            Purpose.CHECK,
        )
        if count:
            self._checks.add(task_id)
            blocks = self._groups.blocks(self._tables(state, finished), start, start + count)
            self._launch(state, task_id, start, blocks)

    def _ops(self) -> tuple[dict[str, TransferOp], list[TransferOp], list[TransferOp]]:
        ops = self._executor.take()
        loads_by_task = {
            state.loading: request_id
            for request_id, state in self._requests.items()
            if state.loading is not None
        }
        checks = [op for op in ops if op.op_id in self._checks]
        copies = [op for op in ops if op.op_id not in self._checks]
        self._checks.clear()
        loads = {loads_by_task[op.op_id]: op for op in copies if op.direction is Direction.LOAD}
        for request_id in loads:
            self._requests[request_id].loading_blocks = None
        return loads, [op for op in copies if op.direction is Direction.STORE], checks

    def _load_ended(self, request_id: str, done: TaskDone) -> None:
        state = self._requests.get(request_id)
        if state is None or state.loading != done.task_id:
            return
        state.loading = None
        if (
            state.loading_blocks is not None
        ):  # it never got to the workers, and the engine waits for them to name it
            self._unloadable[request_id] = self._unloadable.get(request_id, ()) + state.loading_blocks
            state.loading_blocks = None
        if done.status is not KVResponseStatus.SUCCESS:
            self._load_failed(state)
        if state.request.is_finished():
            del self._requests[request_id]

    def _load_failed(self, state: _RequestState) -> None:
        """What failed once is recomputed, not asked for again."""
        state.load_failed = True
        if state.is_in_step:
            state.restore_from = state.local_tokens // self._block_tokens
            self._in_step.failed(state.device_blocks[0])

    def _is_loaded_in_step(self, state: _RequestState) -> bool:
        start = state.local_tokens // self._block_tokens
        size = (state.hit_blocks - start) * self.manager.layout.slot_bytes
        if (
            self._groups.fail_as_one
        ):  # vLLM takes such a failure only of a request that waits outside the batch
            return False
        return self._in_step.allows(state.request.request_id, size) and self.manager.is_in_host(
            state.chain.keys(state.hit_blocks), start
        )

    def _check_ended(self, state: _RequestState, done: TaskDone) -> None:
        del state.stores[done.task_id]
        self._losable.pop(done.task_id, None)
        if not done.mismatches:
            return
        first = done.mismatches[0]
        logger.error(
            "verification: block %d of request %s is not what the engine computes (tier %s, key %s; %d such blocks); dropped",
            first.block,
            state.request.request_id,
            first.tier.name,
            first.key.hex(),
            len(done.mismatches),
        )
        # The right bytes are still on the device, unless the request has ended: they are stored anew.
        state.planned_blocks = min(state.planned_blocks, first.block)

    def _store_ended(self, state: _RequestState, done: TaskDone) -> None:
        start = state.stores.pop(done.task_id)
        self._losable.pop(done.task_id, None)
        count = prefix_length(done.ok)
        if state.restore_from is not None:
            # The step that the store belongs to had a load that failed. What it computed is being computed again.
            state.planned_blocks, state.restore_from = min(state.planned_blocks, state.restore_from), None
        if count and self.events.enabled:
            self.events.stored(state.chain.keys(start + count), start, state.request)
