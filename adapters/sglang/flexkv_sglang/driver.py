"""What both ways into SGLang share, the linker (``linker.py``) and the radix cache (``radix.py``): its requests in FlexKV's words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from flexkv_core.config import FlexKVConfig
from flexkv_core.transfer.cpus import engine_cpus
from flexkv_kernels import copier_over
from flexkv_sglang.compat.engine import Engine
from flexkv_sglang.compat.request import is_cacheable, view_of
from flexkv_sglang.events import EventLog
from flexkv_sglang.layout import device_segments
from flexkv_sglang.scheduler_side import RequestView, SchedulerSide
from flexkv_sglang.shares import model_config
from flexkv_sglang.stats import PromMetrics

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams


class Driver(ABC):
    """Mixed into what SGLang drives. All methods run on the scheduler's thread.

    Whoever mixes it in sets ``_side`` and ``_lora_weights`` and knows how the ranks are asked.
    """

    _side: SchedulerSide
    _lora_weights: Mapping[str, str]
    _waiting: frozenset[str] = frozenset()

    @abstractmethod
    def smallest(self, values: torch.Tensor) -> None:
        """Give each of ``values``, int64, the smallest that any rank has; a collective call."""

    def agree(self, value: int) -> int:
        """The smallest of all ranks' values."""
        shared = torch.tensor([value], dtype=torch.int64)
        self.smallest(shared)
        return int(shared.item())

    def view(self, req: Req) -> RequestView:
        """The request as FlexKV sees it."""
        return view_of(req, self._lora_weights)

    def queued(self, req: Req) -> None:
        """The request waits for its first prefill."""
        if is_cacheable(req):
            self._side.queued(self.view(req))

    def held(self, queue: Sequence[Req]) -> set[str]:
        """Requests of the queue that should stay there, because blocks are on their way from the SSD; the same on every rank."""
        if not self._side.reads_ahead:
            return set()
        rids = [req.rid for req in queue]
        for rid in self._waiting.difference(rids):  # scheduled, or given up
            self._side.left_queue(rid)
        self._waiting = frozenset(rids)
        if not rids:
            return set()
        is_ready = torch.tensor([not waits for waits in self._side.waiting(rids)], dtype=torch.int64)
        self.smallest(is_ready)
        return {rid for rid, ready in zip(rids, is_ready.tolist(), strict=True) if not ready}

    def round_begins(self) -> None:
        """The scheduler is about to choose what runs next; nothing to do where SGLang gives a turn of its own."""
        return

    def weights_change(self) -> None:
        """The engine is about to take other weights."""
        self._side.weights_change()

    def make_room(self) -> bool:
        """An eviction found too little: wait for the stores and unlock what they hold; whether that gave anything."""
        return self._side.finish_stores()


def open_side(
    engine: Engine,
    config: FlexKVConfig,
    params: CacheInitParams,
    agree: Callable[[int], int],
    forward_stream: Any,
) -> tuple[SchedulerSide, PromMetrics | None]:
    """Take this rank's tiers; and what publishes its counters, if SGLang publishes any.

    Raises:
        ConfigError: a setting or directory that cannot be used.
        CapacityError: memory or disk cannot be had.
    """
    device = torch.device(engine.pool.device)
    model = model_config(engine, config)
    # One rank publishes events for all of them.
    has_events = params.enable_kv_cache_events and config.events and not engine.tp_rank
    side = SchedulerSide(
        model,
        config,
        copier_over(device_segments(engine), device, engine.pool, model.layout.scales),
        agree,
        is_alone=engine.tp_size == 1,
        events=EventLog(model.layout.tokens_per_block) if has_events else None,
        behind_forward=partial(_on_stream, device, forward_stream),
        cpus=engine_cpus() if device.type == "cpu" else None,
    )
    if not params.enable_metrics:
        return side, None
    labels = {
        "model_name": engine.server_args.model_path,
        "tp_rank": str(engine.tp_rank),
        "dp_rank": str(engine.dp_rank),
    }
    return side, PromMetrics(side.manager, labels)


def _on_stream(device: torch.device, stream: Any) -> AbstractContextManager[object]:
    """Makes ``stream``, on which the engine runs its forward, the current one; a CPU has none."""
    if stream is None or device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device).stream(stream)
