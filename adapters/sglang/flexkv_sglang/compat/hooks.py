"""The places in SGLang where FlexKV listens, beside the interface that it has there. Put in when FlexKV is chosen, never before.

With SGLang 0.5.23 that interface is the linker. A linker hears of pages that SGLang wants to keep and to find by hash. What it does not hear of, and what each hook is for:

- who drives it (the name ``UnifiedCacheLinkerWrapper`` in the tree's module, which SGLang looks up after it has imported a linker; a hook on
  ``init_cache_linker`` comes too late for the linker's own flags): SGLang's driver knows tails of prompts, FlexKV needs requests;
- a request's checkpoints and its end (``checkpoint``, ``on_release``): stores begin and states end there;
- an eviction that finds too little (``_evict``), because nodes that are being stored are locked for some milliseconds;
- KV events are taken (``take_events``): FlexKV's go with SGLang's;
- requests that wait (``_add_request_to_queue``, ``_get_new_batch_prefill_raw``): their blocks are read from the SSD meanwhile;
- each round of the scheduler (``_process_hicache_events``): behind ``--radix-cache-backend`` SGLang does not drive a linker by itself;
- new weights (``_observe_weight_load``): what was cached under the old ones must not be found.

Before 0.5.23 it is a radix cache of FlexKV's own, which needs those of the scheduler and of new weights only.

Upstream has no interface for these that we know of; each goes when a version offers one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from flexkv_sglang.driver import Driver

if TYPE_CHECKING:
    from flexkv_sglang.linker import FlexKVLinkerWrapper

_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"


_Hook = tuple[str, Callable[..., Any], HookType]


def install_for_linker() -> None:
    """Put in all that a linker needs; a second call does nothing."""
    if _install(
        (f"{_TREE}.checkpoint", _checkpoint, HookType.AFTER),
        (f"{_TREE}.on_release", _on_release, HookType.AFTER),
        (f"{_TREE}._evict", _evict, HookType.AROUND),
        (f"{_TREE}.take_events", _take_events, HookType.AFTER),
        (f"{_SCHEDULER}._process_hicache_events", _process_hicache_events, HookType.BEFORE),
    ):
        _drive_own_linkers()


def install_for_radix_cache() -> None:
    """Put in all that a radix cache needs; a second call does nothing."""
    _install()


def _install(*hooks: _Hook) -> bool:
    """Put in ``hooks`` and those of the scheduler, the first time; whether this was the first."""
    if hasattr(_install, "done"):
        return False
    _install.done = True  # type: ignore[attr-defined]
    for target, hook, kind in (
        *hooks,
        (f"{_SCHEDULER}._add_request_to_queue", _add_request_to_queue, HookType.AFTER),
        (f"{_SCHEDULER}._get_new_batch_prefill_raw", _get_new_batch_prefill_raw, HookType.AROUND),
        (f"{_WEIGHTS}._observe_weight_load", _observe_weight_load, HookType.BEFORE),
    ):
        HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()
    return True


def _driver(tree: Any) -> Driver | None:
    """FlexKV's driver: what drives the linker in ``tree``, or ``tree`` itself; None where there is none."""
    linker = getattr(tree, "linker", None)
    return next((candidate for candidate in (linker, tree) if isinstance(candidate, Driver)), None)


def _wrapper(tree: Any) -> FlexKVLinkerWrapper | None:
    """What drives FlexKV's linker in ``tree``, if it has one."""
    linker = getattr(tree, "linker", None)
    return linker if isinstance(linker, Driver) else None  # type: ignore[return-value]


def _drive_own_linkers() -> None:
    from sglang.srt.mem_cache import unified_radix_cache

    original = unified_radix_cache.UnifiedCacheLinkerWrapper

    def driver_of(tree: Any, linker: Any) -> Any:
        from flexkv_sglang.linker import FlexKVLinker, FlexKVLinkerWrapper

        return (FlexKVLinkerWrapper if isinstance(linker, FlexKVLinker) else original)(tree, linker)

    unified_radix_cache.UnifiedCacheLinkerWrapper = driver_of


def _checkpoint(result: None, tree: Any, req: Any, **options: Any) -> None:
    driver = _wrapper(tree)
    if driver is not None:
        driver.checkpointed(req)


def _on_release(result: None, tree: Any, req: Any, **options: Any) -> None:
    driver = _wrapper(tree)
    if driver is not None:
        driver.released(req)


def _evict(original: Callable[..., Any], tree: Any, params: Any, *arguments: Any, **options: Any) -> Any:
    result = original(tree, params, *arguments, **options)
    driver = _wrapper(tree)
    missing = params.num_tokens - result.num_tokens_evicted
    if driver is None or missing <= 0 or not driver.make_room():
        return result
    more = original(tree, replace(params, num_tokens=missing), *arguments, **options)
    return replace(result, num_tokens_evicted=result.num_tokens_evicted + more.num_tokens_evicted)


def _take_events(taken: list[Any], tree: Any) -> list[Any]:
    driver = _wrapper(tree)
    return taken if driver is None else [*taken, *driver.take_events()]


def _add_request_to_queue(result: None, scheduler: Any, req: Any, *arguments: Any, **options: Any) -> None:
    driver = _driver(scheduler.tree_cache)
    if driver is not None:
        driver.queued(req)


def _get_new_batch_prefill_raw(
    original: Callable[..., Any], scheduler: Any, *arguments: Any, **options: Any
) -> Any:
    """Schedule without the requests whose blocks are on their way; they keep their places in the queue."""
    driver = _driver(scheduler.tree_cache)
    held: set[str] = set()
    if driver is not None:
        driver.round_begins()
        held = driver.held(scheduler.waiting_queue)
    if not held:
        return original(scheduler, *arguments, **options)
    queue = list(scheduler.waiting_queue)
    scheduler.waiting_queue = [req for req in queue if req.rid not in held]
    try:
        return original(scheduler, *arguments, **options)
    finally:
        left = {req.rid for req in scheduler.waiting_queue}
        known = {req.rid for req in queue}
        added = [req for req in scheduler.waiting_queue if req.rid not in known]  # preempted meanwhile
        scheduler.waiting_queue = [req for req in queue if req.rid in held or req.rid in left] + added


def _process_hicache_events(scheduler: Any, *arguments: Any, **options: Any) -> None:
    if _wrapper(scheduler.tree_cache) is not None:
        scheduler.enable_unified_cache_external_linker = True


def _observe_weight_load(updater: Any, source: str) -> None:
    driver = _driver(getattr(updater.scheduler, "tree_cache", None))
    if driver is not None:
        driver.weights_change()
