"""What a bad store costs an engine: two real vLLM servers with FlexKV, one of them with a remote tier, asked in turns.

The store is a real one behind a proxy, which is dead, answers nothing, or delays each answer. Each fault strikes a store that has worked
until then, and servers of its own: a circuit breaker that one fault has opened would hide the next. Prompts are new each time: each is looked
up in the store, computed, and would be written. As in ``overhead``, both compute on the same cores, one idles while the other answers, and
both are started more than once, in alternating order. Even so two servers of one command differ by up to a tenth for as long as they live. So
every second turn is a control, of prompts that are too short for the store by a few tokens: it tells how much of a ratio is the servers' own.
Turns come in random order, and the standard error over them tells how much of a ratio is the machine's.
Store and proxy stand for another machine: they have the least weight, and run where the engines do not compute.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flexkv_core.cli.bench.overhead import compute_dtype
from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.client import Completion, VllmClient
from flexkv_core.cli.harness.cpus import compute_cpus, other_cpus, started_on
from flexkv_core.cli.harness.proxy import Fault
from flexkv_core.cli.harness.proxy_process import LEAST_WEIGHT, ProxyProcess, proxy_process
from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, TURN_PAUSE_S, VllmServer
from flexkv_core.cli.harness.stores import redis_server

REQUESTS, QUICK_REQUESTS = 200, 10
TURN_REQUESTS = 10  # before the other server has its turn
PROMPT_TOKENS = 130
CONTROL_TOKENS = 126
REMOTE_TOKENS_MIN = 128
"""Two blocks, which a prompt has and a control with its answer has not: FlexKV keeps that in host memory only."""
ANSWER_TOKENS = 2
LAYERS = 10
"""Of the demo's model, which has 30, with weights of no meaning: what a store costs depends on neither, and 1,200 requests of all layers take
more than twenty minutes on a processor without AVX-512. The shorter a request, the more of it a delay is."""
SLOW_S = 0.05
"""Of each answer: more than 100 times what this store takes on loopback (0.3 ms)."""
STARTS = 4
_STORE_OPTIONS = ("--maxmemory", "16mb", "--maxmemory-policy", "allkeys-lru")
"""Prompts are new each time, so what it forgets costs nothing. Memory that it takes anew does: 10 ms of a core per request in a virtual machine,
where both writes take 1, and next to the cores that the engines compute on."""
FAULTS = {"dead": Fault.DEAD, "black_hole": Fault.BLACK_HOLE, "slow": Fault.SLOW}
_COUNTERS = ("lookups", "late_lookups", "failures", "breaker_openings", "written_blocks")
_WARM_UP_REQUESTS = 6
_SEED = 77
_TOKEN_IDS = range(100, 40_000)


def run(quick: bool = False) -> dict[str, float | bool]:
    """For each fault ``throughput_ratio_<fault>`` (requests a second with the bad store / without a remote tier) and
    ``ttft_ratio_<fault>`` (median time to first token without / with); ``…_ratio_control_<fault>``, the same of prompts that have
    nothing to do with the store; ``…_error``, the standard error over the turns; and what FlexKV counted. Over half an hour."""
    starts = 1 if quick else STARTS
    requests = QUICK_REQUESTS if quick else REQUESTS
    rng = random.Random(_SEED)
    results: dict[str, float | bool] = {}
    for name, fault in FAULTS.items():
        struck, control = _Answers(), _Answers()
        counted = Counter[str]()
        for start in range(starts):
            with _servers(store_first=start % 2 == 0) as (proxy, with_store, without):
                clients = (with_store, without)
                _in_turns(clients, {PROMPT_TOKENS: _Answers()}, _WARM_UP_REQUESTS, rng)
                before = _remote_counters(with_store)
                proxy.set(fault, SLOW_S)
                _in_turns(clients, {PROMPT_TOKENS: struck, CONTROL_TOKENS: control}, requests // starts, rng)
                counted.update(_remote_counters(with_store))
                counted.subtract(before)
        results |= _figures(name, struck, control)
        results |= {f"{counter}_{name}": count for counter, count in counted.items()}
    results["requests"] = requests
    results["starts"] = starts
    return results


def _remote_counters(client: VllmClient) -> dict[str, int]:
    metrics = client.metrics()
    return {name: int(metrics.total(f"vllm:flexkv_remote_{name}_total")) for name in _COUNTERS}


@dataclass
class _Answers:
    """Of both servers to the same prompts."""

    with_store: list[Completion] = field(default_factory=list)
    without: list[Completion] = field(default_factory=list)

    @property
    def throughput_ratio(self) -> float:
        """With / without a store."""
        return _seconds(self.without) / _seconds(self.with_store)

    @property
    def ttft_ratio(self) -> float:
        """Without / with a store."""
        return _ttft_ms(self.without) / _ttft_ms(self.with_store)

    def error(self, value: Callable[[list[Completion]], float]) -> float:
        """Of the ratio of this value: the standard error over the turns; 0 of a single one."""
        turns = [
            value(self.without[at : at + TURN_REQUESTS]) / value(self.with_store[at : at + TURN_REQUESTS])
            for at in range(0, len(self.without), TURN_REQUESTS)
        ]
        return statistics.stdev(turns) / len(turns) ** 0.5 if len(turns) > 1 else 0.0


def _seconds(answers: list[Completion]) -> float:
    return sum(answer.total_ms for answer in answers) / 1e3


def _ttft_ms(answers: list[Completion]) -> float:
    return statistics.median(answer.ttft_ms for answer in answers)


def _figures(name: str, struck: _Answers, control: _Answers) -> dict[str, float | bool]:
    return {
        f"throughput_ratio_{name}": struck.throughput_ratio,
        f"throughput_ratio_{name}_error": struck.error(_seconds),
        f"ttft_ratio_{name}": struck.ttft_ratio,
        f"ttft_ratio_{name}_error": struck.error(_ttft_ms),
        f"throughput_ratio_control_{name}": control.throughput_ratio,
        f"ttft_ratio_control_{name}": control.ttft_ratio,
        f"ttft_with_{name}_ms": _ttft_ms(struck.with_store),
        f"ttft_without_{name}_ms": _ttft_ms(struck.without),
        f"ttft_max_with_{name}_ms": max(answer.ttft_ms for answer in struck.with_store),
        f"ttft_max_without_{name}_ms": max(answer.ttft_ms for answer in struck.without),
    }


def _in_turns(
    clients: tuple[VllmClient, VllmClient], answers: dict[int, _Answers], count: int, rng: random.Random
) -> None:
    """Adds the answers of both servers, with a store and without, to the same ``count`` prompts of each of these lengths."""
    for start in range(0, count, TURN_REQUESTS):
        turns: list[tuple[VllmClient, list[Completion], list[list[int]]]] = []
        for tokens, both in answers.items():
            size = min(TURN_REQUESTS, count - start)
            prompts = [rng.choices(_TOKEN_IDS, k=tokens) for _ in range(size)]
            turns += [(clients[0], both.with_store, prompts), (clients[1], both.without, prompts)]
        rng.shuffle(turns)
        for client, found, prompts in turns:
            time.sleep(TURN_PAUSE_S)
            found.extend(client.complete(prompt, tokens_max=ANSWER_TOKENS) for prompt in prompts)


@contextmanager
def _servers(store_first: bool) -> Iterator[tuple[ProxyProcess, VllmClient, VllmClient]]:
    """The proxy in front of the store, a client of the server that has it, and one of the server without."""
    model = ensure_demo_model()
    fewer = ["--load-format", "dummy", "--hf-overrides", json.dumps({"num_hidden_layers": LAYERS})]
    arguments = [*CPU_ARGUMENTS, *fewer, "--dtype", compute_dtype()]  # the last --dtype counts
    environment = {**CPU_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": compute_cpus()}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flexkv-faults-")))
        with started_on(other_cpus()):
            store = stack.enter_context(redis_server(*_STORE_OPTIONS, nice=LEAST_WEIGHT))
            proxy = stack.enter_context(proxy_process(store))
        clients = {}
        sides = {
            "with": {
                "remote_url": f"valkey://127.0.0.1:{proxy.port}",
                "remote_read_tokens_min": REMOTE_TOKENS_MIN,
                "remote_write_tokens_min": REMOTE_TOKENS_MIN,
            },
            "without": {},
        }
        for name, remote in sides.items() if store_first else reversed(sides.items()):
            transfer = {
                "kv_connector": "FlexKVConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"host_bytes": "1GiB", **remote},
            }
            more = ["--kv-transfer-config", json.dumps(transfer)]
            server = VllmServer(model, [*arguments, *more], environment, folder / f"{name}.log")
            stack.enter_context(server)
            clients[name] = stack.enter_context(VllmClient(server.base_url))
        yield proxy, clients["with"], clients["without"]
