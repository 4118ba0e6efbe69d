"""When loads may take blocks of the device, where vLLM starts every one that fits.

A request that was loaded waits for the blocks of its other tokens, and while it waits nothing takes its blocks away: only running requests
are preempted. When such requests hold so much that neither the first of the queue nor any of them fits, nothing ever runs again. So there
must always be room for the rest of whichever of them comes next, and whoever takes blocks anew must fit beside all that they hold, to its
very last token. Otherwise it is asked again in the next step, when some of them have run.

Blocks are counted over all KV cache groups, which take them from one pool. A sliding window gives back what has left it; it is counted
as if it kept everything, which makes loads wait a little longer than they must.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flexkv_vllm.compat.reserves import RESERVES_BLOCKS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class LoadAdmission:
    """Knows every request from its first lookup to its end. On the scheduler's thread. Admits everything where vLLM does this itself."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._is_needed = not RESERVES_BLOCKS
        self._blocks_tokens: list[int] = [
            group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups
        ]
        self._model_config = vllm_config.model_config
        speculative = vllm_config.speculative_config
        self._draft_tokens: int = 0 if speculative is None else speculative.num_speculative_tokens or 0
        self._room = kv_cache_config.num_blocks - 1  # vLLM keeps block 0 for itself
        self._needed: dict[str, int] = {}  # blocks of each request with all that it may generate
        self._held: dict[str, int] = {}  # blocks of those that wait with loaded ones
        self._refused: set[str] = set()  # may not enter yet

    def may_enter(self, request: Request) -> bool:
        """Whether a request that holds no blocks now may take some, to load into or to compute."""
        if not self._is_needed:
            return True
        self._held.pop(request.request_id, None)
        needed = self._needed[request.request_id] = self._blocks_of(request)
        if self._held and needed + sum(self._held.values()) > self._room:
            self._refused.add(request.request_id)
            return False
        self._refused.discard(request.request_id)
        return True

    def admits(self, request: Request, tokens: int) -> bool:
        """Whether a load may start for a request that may enter; ``tokens``: what it has then, what the device held included.

        Not while another may not enter, which would otherwise wait for one load after the other; and where nothing is held, always.
        """
        if self._refused:
            return False
        if not self._held:
            return True
        loaded = sum(tokens // size for size in self._blocks_tokens)
        held = {**self._held, request.request_id: loaded}
        missing = max(self._needed[name] - blocks for name, blocks in held.items())
        return sum(held.values()) + missing <= self._room

    def holds(self, request_id: str, blocks: int) -> None:
        """The load was given its blocks, so many of all groups together."""
        if self._is_needed:
            self._held[request_id] = blocks

    def ran(self, request_ids: Iterable[str]) -> None:
        """These are in a step: from now on vLLM can take their blocks away."""
        for request_id in request_ids if self._held else ():
            self._held.pop(request_id, None)

    def left(self, request_id: str) -> None:
        """The request has ended."""
        self._needed.pop(request_id, None)
        self._held.pop(request_id, None)
        self._refused.discard(request_id)

    def _blocks_of(self, request: Request) -> int:
        """Of all groups, in each with a block more than its tokens, for what vLLM looks ahead."""
        tokens = min(request.num_prompt_tokens + (request.max_tokens or 0), self._model_config.max_model_len)
        return sum(-(-(tokens + self._draft_tokens) // size) + 1 for size in self._blocks_tokens)
