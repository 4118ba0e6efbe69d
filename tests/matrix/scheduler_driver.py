"""Drives the scheduler of whatever vLLM is imported, with FlexKV's connector on both of its sides; only the model is a stand-in.

For versions whose kernels do not run here. ``python -m tests.matrix.scheduler_driver MODEL`` runs the checks below; ``MODEL`` is a folder
whose configuration vLLM reads. Scheduler, block manager, connector, host tier and copies are the real ones, and so is what the workers
do with the connector in a step. The stand-in writes a token's KV as numbers that follow from the token and its place, and takes as its
next token what follows from all KV of the request, so that one wrong byte makes another answer. Loads have the trouble of
``troubled_connector.py``.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import vllm
from vllm import SamplingParams
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_initialized
from vllm.forward_context import set_forward_context
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from flexkv_core.cli.harness.server import free_port
from flexkv_vllm.compat.preemptions import resumed_ids
from tests.matrix.turns import SLOW_S

try:
    from vllm.utils.hashing import sha256
except ImportError:
    from vllm.utils import sha256

BLOCK_TOKENS, BLOCKS, LAYERS, TOKENS_MAX = 16, 40, ("layers.0.attn", "layers.1.attn"), 1024
TOKENS = 6
SETTLE_S = 20.0


def called(kind: Any, **wanted: Any) -> Any:
    """``kind`` with those of ``wanted`` that its version takes, and None for what else it demands."""
    known = inspect.signature(kind).parameters
    demanded = {name: None for name, value in known.items() if value.default is inspect.Parameter.empty}
    return kind(**(demanded | {name: value for name, value in wanted.items() if name in known}))


def engine_config(model: str) -> VllmConfig:
    transfer = KVTransferConfig(
        kv_connector="TroubledConnector",
        kv_connector_module_path="tests.matrix.troubled_connector",
        kv_role="kv_both",
        kv_connector_extra_config={"host_bytes": "64MiB"},
    )
    cache = CacheConfig(
        block_size=BLOCK_TOKENS, gpu_memory_utilization=0.5, swap_space=0, enable_prefix_caching=True
    )
    cache.num_gpu_blocks = BLOCKS
    scheduling = called(
        SchedulerConfig,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        max_model_len=TOKENS_MAX,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        async_scheduling=False,
    )
    return VllmConfig(
        model_config=ModelConfig(
            model=model, dtype="float32", max_model_len=TOKENS_MAX, seed=0, skip_tokenizer_init=True
        ),
        cache_config=cache,
        scheduler_config=scheduling,
        kv_transfer_config=transfer,
    )


class Stand:
    """The worker: connector and KV cache are real. It follows block tables and tokens as vLLM's model runner does."""

    def __init__(self, config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._config = config
        shape = (BLOCKS, 2, BLOCK_TOKENS, 1, 8)
        self.kv = {name: torch.zeros(shape) for name in LAYERS}
        ensure_kv_transfer_initialized(config, kv_cache_config)
        get_kv_transfer_group().register_kv_caches(self.kv)
        self._tokens: dict[str, list[int]] = {}
        self._tables: dict[str, list[int]] = {}

    def run(self, output: Any) -> ModelRunnerOutput:
        """A step."""
        for request_id in output.finished_req_ids:
            self._tokens.pop(request_id, None)
        if not output.total_num_scheduled_tokens:
            return KVConnectorModelRunnerMixin.kv_connector_no_forward(output, self._config)
        computed = self._follow(output)
        with (
            set_forward_context(None, self._config),
            KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(output) as from_connector,
        ):
            sampled = [
                self._compute(name, computed[name], n) for name, n in output.num_scheduled_tokens.items()
            ]
        ids = list(output.num_scheduled_tokens)
        return called_output(
            req_ids=ids,
            req_id_to_index={name: i for i, name in enumerate(ids)},
            sampled_token_ids=sampled,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=from_connector,
        )

    def _follow(self, output: Any) -> dict[str, int]:
        computed = {}
        for new in output.scheduled_new_reqs:
            self._tokens[new.req_id], self._tables[new.req_id] = (
                list(new.prompt_token_ids),
                list(new.block_ids[0]),
            )
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        resumed = set(resumed_ids(cached))
        for name, blocks, count in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if name in resumed:
                self._tables[name] = []
            self._tables[name] += blocks[0] if blocks else []
            computed[name] = count
        return computed

    def _compute(self, name: str, start: int, count: int) -> list[int]:
        """Writes the KV of ``count`` tokens; the next token once all are known."""
        tokens, table = self._tokens[name], self._tables[name]
        stop = start + count
        assert stop <= len(tokens), (
            f"{name}: the engine wants {stop} tokens computed, the worker knows {len(tokens)}"
        )
        for place in range(start, stop):
            for layer, cache in enumerate(self.kv.values()):
                value = (tokens[place] * 31 + place * 7 + layer) % 4099
                cache[table[place // BLOCK_TOKENS], :, place % BLOCK_TOKENS] = value
        if stop < len(tokens):
            return []
        weights = torch.arange(1, stop + 1, dtype=torch.float64)
        total = 0
        for cache in self.kv.values():
            held = cache[table[: (stop - 1) // BLOCK_TOKENS + 1]].double().sum(dim=(1, 3, 4)).ravel()[:stop]
            total += int((held * weights).sum())
        tokens.append(100 + total % 20_011)
        return [tokens[-1]]


def called_output(**values: Any) -> ModelRunnerOutput:
    known = {field.name: str(field.type) for field in fields(ModelRunnerOutput)}
    if "ndarray" in known["sampled_token_ids"]:  # in 0.11.1 and 0.11.2
        values["sampled_token_ids"] = [np.array(tokens) for tokens in values["sampled_token_ids"]]
    given = {name: value for name, value in values.items() if name in known}
    return ModelRunnerOutput(**(dict.fromkeys(known.keys() & {"logprobs", "spec_token_ids"}) | given))


class Engine:
    """Scheduler and worker, step by step."""

    def __init__(self, model: str) -> None:
        config = engine_config(model)
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
            initialize_model_parallel(1, 1)
            spec = called(
                FullAttentionSpec, block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32, use_mla=False
            )  # fmt: skip
            tensors = [KVCacheTensor(size=spec.page_size_bytes * BLOCKS, shared_by=[name]) for name in LAYERS]
            kv_cache_config = KVCacheConfig(BLOCKS, tensors, [KVCacheGroupSpec(list(LAYERS), spec)])
            init_none_hash(sha256)
            self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
            self.scheduler = called(
                Scheduler,
                vllm_config=config,
                kv_cache_config=kv_cache_config,
                structured_output_manager=StructuredOutputManager(config),
                block_size=BLOCK_TOKENS,
                log_stats=False,
            )
            self._stand = Stand(config, kv_cache_config)
        self._numbers = itertools.count()
        self.preemptions = 0

    def add(self, prompt: Sequence[int], tokens: int = TOKENS, salt: str | None = None) -> Request:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        request: Request = called(
            Request,
            request_id=f"request-{next(self._numbers)}",
            prompt_token_ids=list(prompt),
            sampling_params=params,
            cache_salt=salt,
            block_hasher=self._hasher,
            client_index=0,
            arrival_time=time.time(),
            priority=0,
            resumable=False,
        )
        self.scheduler.add_request(request)
        return request

    def step(self) -> None:
        waiting = {
            name for name, each in self.scheduler.requests.items() if each.status is RequestStatus.PREEMPTED
        }
        output = self.scheduler.schedule()
        now = {
            name for name, each in self.scheduler.requests.items() if each.status is RequestStatus.PREEMPTED
        }
        self.preemptions += len(now - waiting)
        self.scheduler.update_from_output(output, self._stand.run(output))

    def ask_all(
        self, prompts: Sequence[Sequence[int]], tokens: int = TOKENS, salt: str | None = None
    ) -> list[Request]:
        requests = [self.add(prompt, tokens, salt) for prompt in prompts]
        self.settle()
        return requests

    def ask(self, prompt: Sequence[int]) -> Request:
        return self.ask_all([prompt])[0]

    def settle(self) -> None:
        """Until nothing is held any more: stores, and loads of requests that went away, included."""
        deadline = time.monotonic() + SETTLE_S
        while self.scheduler.requests or self.scheduler.has_requests():
            self.step()
            assert time.monotonic() < deadline, f"still held: {list(self.scheduler.requests)}"

    def reset(self, external: bool = False) -> None:
        assert self.scheduler.reset_prefix_cache(), "blocks are held"
        if external:
            assert self.scheduler.connector.reset_cache()

    def close(self) -> None:
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == BLOCKS - 1
        get_kv_transfer_group().shutdown()
        self.scheduler.shutdown()


def prompt(seed: int, length: int) -> list[int]:
    return [100 + (seed * 7919 + i * 37) % 20_000 for i in range(length)]


def answer(request: Request) -> list[int]:
    return list(request.output_token_ids)


LONG = 14 * BLOCK_TOKENS + 1


def check_failed_loads(engine: Engine) -> None:
    """The first load brings nothing, the second lacks its middle: both requests are computed, and what is published is right."""
    for seed, most in ((1, 0), (2, LONG // 2)):
        engine.reset()
        cold = engine.ask(prompt(seed, LONG))
        engine.reset()
        found, device = engine.ask(prompt(seed, LONG)), engine.ask(prompt(seed, LONG))
        print(
            f"cached after a failed load: {found.num_cached_tokens} of {LONG}, then {device.num_cached_tokens}"
        )
        assert answer(found) == answer(device) == answer(cold)
        assert 0 <= found.num_cached_tokens <= most
        assert device.num_cached_tokens == LONG - 1


def check_aborted_load(engine: Engine) -> None:
    """The third load takes its time. Its request goes away, and others compute in whatever blocks are free."""
    engine.reset(external=True)
    others = [prompt(10 + i, 10 * BLOCK_TOKENS) for i in range(3)]
    cold, wanted = engine.ask(prompt(3, LONG)), [answer(each) for each in engine.ask_all(others, 20)]
    engine.reset()
    loading = engine.add(prompt(3, LONG))
    engine.step()
    assert loading.status is RequestStatus.WAITING_FOR_REMOTE_KVS
    engine.scheduler.finish_requests(loading.request_id, RequestStatus.FINISHED_ABORTED)
    later = [engine.add(each, 20, "theirs") for each in others]
    for _ in range(8):  # enough to compute the prompts of all that fit, and not their answers
        engine.step()
    time.sleep(SLOW_S)
    engine.settle()
    assert [answer(each) for each in later] == wanted
    engine.reset()
    again = engine.ask(prompt(3, LONG))
    assert (answer(again), again.num_cached_tokens) == (answer(cold), LONG - 1)


def check_preemptions(engine: Engine) -> None:
    """Eight requests that grow do not fit; whoever is preempted comes back by a load."""
    engine.reset(external=True)
    prompts = [prompt(30 + i, 80 + 5 * i) for i in range(8)]
    wanted = [answer(engine.ask_all([each], 60)[0]) for each in prompts]
    for _ in range(2):
        engine.reset()
        assert [answer(each) for each in engine.ask_all(prompts, 60)] == wanted
    print(f"preemptions: {engine.preemptions}")
    assert engine.preemptions > 0


def main() -> None:
    engine = Engine(sys.argv[1])
    for check in (check_failed_loads, check_aborted_load, check_preemptions):
        check(engine)
        print(f"vLLM {vllm.__version__}: {check.__name__}")
    engine.close()


if __name__ == "__main__":
    main()
