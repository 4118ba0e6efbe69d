"""What a bad store costs an engine: two real vLLM servers with FlexKV, one of them with a remote tier, asked in turns.

The store is a real one behind a proxy, which is dead, answers nothing, or delays each answer. Each fault strikes a store that has worked
until then, and servers of its own: a circuit breaker that one fault has opened would hide the next. Prompts are new each time: each is looked
up in the store, computed, and would be written. As in ``overhead``, both compute on the same cores, one idles while the other answers, and
both are started more than once, in alternating order. Store and proxy stand for another machine: they have the least weight.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flexkv_core.cli.bench.overhead import compute_cpus, compute_dtype
from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.client import Completion, VllmClient
from flexkv_core.cli.harness.proxy import Fault
from flexkv_core.cli.harness.proxy_process import LEAST_WEIGHT, ProxyProcess, proxy_process
from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, TURN_PAUSE_S, VllmServer
from flexkv_core.cli.harness.stores import redis_server

REQUESTS, QUICK_REQUESTS = 200, 10
TURN_REQUESTS = 5  # before the other server has its turn
PROMPT_TOKENS = 130
ANSWER_TOKENS = 2
LAYERS = 10
"""Of the demo's model, which has 30, with weights of no meaning: what a store costs depends on neither, and 1,200 requests of all layers take
more than twenty minutes on a processor without AVX-512. The shorter a request, the more of it a delay is."""
SLOW_S = 0.05
"""Of each answer: more than 100 times what this store takes on loopback (0.3 ms)."""
STARTS = 2
FAULTS = {"dead": Fault.DEAD, "black_hole": Fault.BLACK_HOLE, "slow": Fault.SLOW}
_COUNTERS = ("lookups", "late_lookups", "failures", "breaker_openings", "written_blocks")
_WARM_UP_REQUESTS = 6
_SEED = 77
_TOKEN_IDS = range(100, 40_000)


def run(quick: bool = False) -> dict[str, float | bool]:
    """For each fault ``throughput_ratio_<fault>`` (requests a second with the bad store / without a remote tier),
    ``ttft_ratio_<fault>`` (median time to first token without / with), and what FlexKV counted. About twenty minutes."""
    starts = 1 if quick else STARTS
    requests = QUICK_REQUESTS if quick else REQUESTS
    rng = random.Random(_SEED)
    results: dict[str, float | bool] = {}
    for name, fault in FAULTS.items():
        bad: list[Completion] = []
        good: list[Completion] = []
        counted = Counter[str]()
        for start in range(starts):
            with _servers(store_first=start % 2 == 0) as (proxy, with_store, without):
                _in_turns(with_store, without, _WARM_UP_REQUESTS, rng)
                before = _remote_counters(with_store)
                proxy.set(fault, SLOW_S)
                answers = _in_turns(with_store, without, requests // starts, rng)
                bad += answers[0]
                good += answers[1]
                counted.update(_remote_counters(with_store))
                counted.subtract(before)
        results |= _figures(name, bad, good)
        results |= {f"{counter}_{name}": count for counter, count in counted.items()}
    results["requests"] = requests
    results["starts"] = starts
    return results


def _remote_counters(client: VllmClient) -> dict[str, int]:
    metrics = client.metrics()
    return {name: int(metrics.total(f"vllm:flexkv_remote_{name}_total")) for name in _COUNTERS}


def _figures(name: str, bad: list[Completion], good: list[Completion]) -> dict[str, float | bool]:
    def seconds(answers: list[Completion]) -> float:
        return sum(answer.total_ms for answer in answers) / 1e3

    def ttft_ms(answers: list[Completion]) -> float:
        return statistics.median(answer.ttft_ms for answer in answers)

    return {
        f"throughput_ratio_{name}": seconds(good) / seconds(bad),
        f"ttft_ratio_{name}": ttft_ms(good) / ttft_ms(bad),
        f"ttft_with_{name}_ms": ttft_ms(bad),
        f"ttft_without_{name}_ms": ttft_ms(good),
        f"ttft_max_with_{name}_ms": max(answer.ttft_ms for answer in bad),
        f"ttft_max_without_{name}_ms": max(answer.ttft_ms for answer in good),
    }


def _in_turns(
    first: VllmClient, second: VllmClient, count: int, rng: random.Random
) -> tuple[list[Completion], list[Completion]]:
    """Answers of both to the same ``count`` prompts."""
    answers: tuple[list[Completion], list[Completion]] = ([], [])
    for turn, start in enumerate(range(0, count, TURN_REQUESTS)):
        prompts = [rng.choices(_TOKEN_IDS, k=PROMPT_TOKENS) for _ in range(min(TURN_REQUESTS, count - start))]
        for side in (0, 1) if turn % 2 else (1, 0):
            time.sleep(TURN_PAUSE_S)
            client = (first, second)[side]
            answers[side].extend(client.complete(prompt, tokens_max=ANSWER_TOKENS) for prompt in prompts)
    return answers


@contextmanager
def _servers(store_first: bool) -> Iterator[tuple[ProxyProcess, VllmClient, VllmClient]]:
    """The proxy in front of the store, a client of the server that has it, and one of the server without."""
    model = ensure_demo_model()
    fewer = ["--load-format", "dummy", "--hf-overrides", json.dumps({"num_hidden_layers": LAYERS})]
    arguments = [*CPU_ARGUMENTS, *fewer, "--dtype", compute_dtype()]  # the last --dtype counts
    environment = {**CPU_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": compute_cpus()}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flexkv-faults-")))
        proxy = stack.enter_context(proxy_process(stack.enter_context(redis_server(nice=LEAST_WEIGHT))))
        clients = {}
        sides = {
            "with": {"remote_url": f"valkey://127.0.0.1:{proxy.port}", "remote_read_tokens_min": 64},
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
