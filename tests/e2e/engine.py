"""vLLM in the test's own process: every step, block id and byte of the KV cache can be looked at."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

from flexkv_core.cli.harness.server import KV_TRANSFER_CONFIG

BLOCK_TOKENS = 64
LOGPROBS = 5
RECOMPUTE_BOUND = 2.1e-5
"""Largest difference of a log-probability between a hit and a recomputation in float32, as measured for vLLM itself."""

_STEPS_MAX = 20_000
_SETTLE_S = 20.0


@dataclass(frozen=True)
class Answer:
    """What came of one request. ``tables`` are the engine's block ids that held it while it ran, a table a group; 0 stands for a block
    that has left its window."""

    token_ids: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, float], ...], ...]
    """For each token the (id, log-probability) pairs of the likeliest ids and of the chosen one, by id."""
    cached_tokens: int
    external_tokens: int
    """Those of the cached tokens that the engine took from FlexKV."""
    preemptions: int
    finish_reason: str | None
    tables: tuple[tuple[int, ...], ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """The first table, for a model with one group."""
        return self.tables[0]

    def logprob_error(self, other: Answer) -> float:
        """The largest difference of a log-probability; infinite when different ids are among the likeliest."""
        worst = 0.0
        for mine, theirs in zip(self.logprobs, other.logprobs, strict=True):
            a, b = dict(mine), dict(theirs)
            chosen_only = a.keys() & b.keys()
            if not chosen_only:
                return float("inf")
            worst = max(worst, *(abs(a[token] - b[token]) for token in chosen_only))
        return worst


@dataclass
class _Running:
    tables: tuple[tuple[int, ...], ...] = ((),)
    external_tokens: int | None = None
    preemptions: int = 0
    final: Any = None


@dataclass
class Engine:
    """An ``LLM`` under the one-line configuration, plus ``config`` as FlexKV's own keys.

    A context manager. vLLM keeps its state in the process, so one engine at a time may be alive.
    """

    model: Path
    config: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    with_flexkv: bool = True
    connector_name: str = "FlexKVConnector"
    role: str = "kv_both"

    def __enter__(self) -> Engine:
        transfer: dict[str, Any] | None = json.loads(KV_TRANSFER_CONFIG) if self.with_flexkv else None
        if transfer is not None:
            transfer["kv_connector"] = self.connector_name
            transfer["kv_role"] = self.role
        if transfer is not None and self.config:
            transfer["kv_connector_extra_config"] = dict(self.config)
        options: dict[str, Any] = {
            "dtype": "float32",
            "block_size": BLOCK_TOKENS,
            "enforce_eager": True,
            "max_model_len": 4096,
            "max_num_batched_tokens": 2048,
            "max_num_seqs": 16,
            "seed": 0,
            "disable_log_stats": False,
            "kv_transfer_config": transfer,
            **self.options,
        }
        try:
            self.llm = LLM(model=str(self.model), **options)
        except BaseException:
            _forget_engine()
            raise
        self._next_id = 0
        self._promised: dict[str, int] = {}
        if self.with_flexkv:
            self._note_promises()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        _forget_engine()

    @property
    def block_tokens(self) -> int:
        """Tokens of one of the engine's blocks."""
        return int(self.scheduler.block_size)

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def connector(self) -> Any:
        """The scheduler's side of the connector."""
        return self.scheduler.connector

    @property
    def manager(self) -> Any:
        """FlexKV's manager, behind the in-tree class too."""
        return getattr(self.connector, "_flexkv_connector", self.connector)._scheduler.manager

    @property
    def kv_tensors(self) -> list[Any]:
        """The engine's KV cache, one tensor a layer, block first."""
        worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        return list(worker.model_runner.kv_caches)

    def ask(self, prompt: Sequence[int], tokens: int = 8, salt: str | None = None) -> Answer:
        """One request, alone."""
        return self.ask_all([prompt], tokens, salt)[0]

    def ask_all(
        self, prompts: Sequence[Sequence[int]], tokens: int = 8, salt: str | None = None
    ) -> list[Answer]:
        """Requests that run together; returns their answers in order, once FlexKV has stored what it stores."""
        running = {self.add(prompt, tokens, salt): _Running() for prompt in prompts}
        for _ in range(_STEPS_MAX):
            self.step(running)
            if all(request.final is not None for request in running.values()):
                break
        else:
            raise TimeoutError(f"the requests did not end within {_STEPS_MAX} steps")
        self.settle()
        return [_answer(request) for request in running.values()]

    def add(self, prompt: Sequence[int], tokens: int = 8, salt: str | None = None) -> str:
        """Queues a request and returns its id."""
        self._next_id += 1
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=LOGPROBS, detokenize=False
        )
        body: dict[str, Any] = {"prompt_token_ids": list(prompt)}
        if salt is not None:
            body["cache_salt"] = salt
        request_id: str = self.llm.llm_engine.add_request(f"request-{self._next_id}", body, params)
        return request_id

    def step(self, running: dict[str, _Running] | None = None) -> None:
        """One step of the engine; notes finished requests and the blocks of the others in ``running``."""
        outputs = self.llm.llm_engine.step()
        for request_id, request in (running or {}).items():
            live = self.scheduler.requests.get(request_id)
            if live is not None and live.num_computed_tokens > 0 and not live.is_finished():
                tables = self.scheduler.kv_cache_manager.get_block_ids(request_id)
                if any(tables):
                    request.tables = tuple(map(tuple, tables))
                if live.prefill_stats is not None:  # handed over with the first token
                    request.external_tokens = live.prefill_stats.num_external_cached_tokens
                request.preemptions = live.num_preemptions
            for output in outputs:
                if output.finished and request_id.startswith(output.request_id):
                    request.final = output
                    if request.external_tokens is None:
                        request.external_tokens = self._promised.get(request_id, 0)
        if not outputs:
            time.sleep(0.0005)  # a load is on its way; the engine itself polls every 2 ms

    def _note_promises(self) -> None:
        """Remember what FlexKV was asked to load: of a load within the step the engine's own count is gone with the first token."""
        allocated = self.connector.update_state_after_alloc

        def noted(request: Any, blocks: Any, external_tokens: int) -> None:
            if external_tokens:
                self._promised[request.request_id] = external_tokens
            allocated(request, blocks, external_tokens)

        self.connector.update_state_after_alloc = noted

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is."""
        self.llm.llm_engine.abort_request([request_id], internal=True)

    def settle(self) -> None:
        """Steps until the engine has nothing left to do, stores included. Raises TimeoutError after 20 s."""
        deadline = time.monotonic() + _SETTLE_S
        while self.scheduler.has_requests():
            self.step()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the engine still holds {list(self.scheduler.requests)}")

    def reset(self, external: bool = False) -> None:
        """Empties the engine's prefix cache, with ``external`` FlexKV's as well; every block must be free by now."""
        assert self.llm.llm_engine.reset_prefix_cache(reset_connector=external), (
            "the engine refused: blocks are held"
        )

    def kv_bytes(self, blocks: Sequence[int]) -> npt.NDArray[np.uint8]:
        """The bytes of these blocks in the engine's KV cache, shape [layers, blocks, bytes of a block and layer]."""
        ids = list(blocks)
        return np.stack(
            [
                tensor[ids].contiguous().view(len(ids), -1).view(torch.uint8).numpy()
                for tensor in self.kv_tensors
            ]
        )

    def held_bytes(self, answer: Answer, tokens: int) -> dict[tuple[int, int], bytes]:
        """The bytes of what held the first ``tokens`` of a request, by group and place in its table; without what had left a window."""
        held = {}
        for group, (table, of_group) in enumerate(zip(answer.tables, self.groups, strict=True)):
            places = range(min(len(table), tokens // of_group.kv_cache_spec.block_size))
            held.update({(group, i): self.kv_bytes([table[i]]).tobytes() for i in places if table[i]})
        return held

    @property
    def groups(self) -> list[Any]:
        """vLLM's KV cache groups."""
        return list(self.scheduler.kv_cache_config.kv_cache_groups)

    def check_integrity(self) -> None:
        """Recounts FlexKV's index; nothing may be pinned once the engine has settled."""
        self.manager.check_integrity()

    def free_blocks(self) -> int:
        """Blocks that no request and no store holds."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def prompt_tokens(seed: int, length: int) -> list[int]:
    """Random token ids; different seeds share no block."""
    return [int(token) for token in np.random.default_rng(seed).integers(100, 40_000, length)]


def _forget_engine() -> None:
    """Clears what vLLM keeps in the process: one engine at a time may be alive in it."""
    ensure_kv_transfer_shutdown()
    cleanup_dist_env_and_memory()


def _answer(request: _Running) -> Answer:
    output = request.final.outputs[0]
    return Answer(
        token_ids=tuple(output.token_ids),
        logprobs=tuple(
            tuple(sorted((token, value.logprob) for token, value in position.items()))
            for position in output.logprobs
        ),
        cached_tokens=int(request.final.num_cached_tokens or 0),
        external_tokens=request.external_tokens or 0,
        preemptions=request.preemptions,
        finish_reason=output.finish_reason,
        tables=request.tables,
    )
