"""While requests wait in the engine's queue, what only the SSD has of their prompts comes to host memory."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from flexkv_core.cli.harness.client import VllmClient
from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, KV_TRANSFER_CONFIG, VllmServer
from tests.e2e.engine import BLOCK_TOKENS, RECOMPUTE_BOUND, Answer, Engine, _Running, prompt_tokens
from tests.e2e.test_ssd import config, written

PROMPTS = [prompt_tokens(3000 + i, 10 * BLOCK_TOKENS + 5) for i in range(6)]
LONG = [prompt_tokens(3100 + i, 100) for i in range(4)]
"""Each is asked once, so that nothing of it is on the SSD."""
ONE_AT_A_TIME = {"max_num_seqs": 1}


@pytest.fixture(scope="module")
def stored(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Answer]]:
    """A directory with all prompts' blocks, and their answers."""
    directory = tmp_path_factory.mktemp("ssd")
    with Engine(llama, config(directory)) as engine:
        answers = [engine.ask(prompt) for prompt in PROMPTS]
        written(engine, 10 * len(PROMPTS))
    return directory, answers


def step_until(engine: Engine, running: dict[str, _Running], prefetched: int) -> None:
    deadline = time.monotonic() + 20
    while engine.manager.counters().prefetched_blocks < prefetched:
        engine.step(running)
        assert time.monotonic() < deadline, engine.manager.counters()


def test_blocks_are_there_before_the_request_is_scheduled(
    llama: Path, stored: tuple[Path, list[Answer]]
) -> None:
    directory, expected = stored
    with Engine(llama, {**config(directory), "prefetch_queued": True}, ONE_AT_A_TIME) as engine:
        running = {engine.add(LONG[0], 600): _Running()}
        engine.step(running)
        running |= {engine.add(prompt): _Running() for prompt in PROMPTS}
        first, *waiting = running
        step_until(engine, running, 10 * len(PROMPTS))
        assert running[first].final is None
        assert all(not engine.scheduler.requests[request].num_computed_tokens for request in waiting)
        while any(request.final is None for request in running.values()):
            engine.step(running)
        engine.settle()
        for request, wanted in zip(waiting, expected, strict=True):
            assert running[request].external_tokens == 10 * BLOCK_TOKENS
            assert tuple(running[request].final.outputs[0].token_ids) == wanted.token_ids
        counters = engine.manager.counters()
        assert counters.prefetched_blocks == counters.ssd_read_blocks == 10 * len(PROMPTS), (
            "none was read twice"
        )
        assert not engine.connector._scheduler._prefetcher._waiting
        engine.check_integrity()


def test_request_that_is_scheduled_at_once_loads_directly(
    llama: Path, stored: tuple[Path, list[Answer]]
) -> None:
    directory, expected = stored
    with Engine(llama, {**config(directory), "prefetch_queued": True}) as engine:
        for prompt, wanted in zip(PROMPTS, expected, strict=True):
            answer = engine.ask(prompt)
            assert (answer.external_tokens, answer.token_ids) == (10 * BLOCK_TOKENS, wanted.token_ids)
            assert answer.logprob_error(wanted) <= RECOMPUTE_BOUND
        assert engine.manager.counters().prefetched_blocks == 0


def test_abort_and_bound(
    llama: Path, stored: tuple[Path, list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 24 slots half may be filled for those that wait; who leaves the queue is not read for any more."""
    monkeypatch.setattr("flexkv_core.prefetch.PIECE_BYTES", 2 * 2 * 65536)  # two blocks
    directory, expected = stored
    with Engine(llama, {**config(directory, 24), "prefetch_queued": True}, ONE_AT_A_TIME) as engine:
        running = {engine.add(LONG[1], 600): _Running()}
        engine.step(running)
        queued = [engine.add(prompt) for prompt in PROMPTS]
        step_until(engine, running, 12)
        for _ in range(50):
            engine.step(running)
        assert engine.manager.counters().prefetched_blocks == 12
        for request in queued[:4]:
            engine.abort(request)
        step_until(engine, running, 24)
        last = {queued[5]: _Running()}
        for request in [*running, queued[4]]:
            engine.abort(request)
        while last[queued[5]].final is None:
            engine.step(last)
        engine.settle()
        assert tuple(last[queued[5]].final.outputs[0].token_ids) == expected[5].token_ids
        assert not engine.connector._scheduler._prefetcher._waiting
        engine.check_integrity()


def test_off_by_default(llama: Path, stored: tuple[Path, list[Answer]]) -> None:
    with Engine(llama, config(stored[0]), ONE_AT_A_TIME) as engine:
        engine.ask_all([LONG[2], *PROMPTS], tokens=40)
        assert engine.manager.counters().prefetched_blocks == 0


def test_real_server(llama: Path, stored: tuple[Path, list[Answer]], tmp_path: Path) -> None:
    directory, expected = stored
    extra = {**config(directory), "prefetch_queued": True}
    transfer = json.dumps({**json.loads(KV_TRANSFER_CONFIG), "kv_connector_extra_config": extra})
    arguments = [
        *CPU_ARGUMENTS,
        "--max-num-seqs",
        "1",
        "--max-model-len",
        "4096",
        "--kv-transfer-config",
        transfer,
    ]
    environment = {**CPU_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with VllmServer(llama, arguments, environment, tmp_path / "server.log") as server:

        def ask(prompt: list[int]) -> tuple[int, ...]:
            with VllmClient(server.base_url) as client:
                return client.complete(prompt, 8).token_ids

        with ThreadPoolExecutor(len(PROMPTS)) as pool, VllmClient(server.base_url) as client:
            # More tokens than the test waits for; the server aborts it when the connection is closed.
            body = {"prompt": LONG[3], "max_tokens": 3900, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{server.base_url}/v1/completions", json=body, timeout=60) as running:
                lines = running.iter_lines()  # held on to: with it the connection would be closed
                assert next(lines).startswith("data: {"), "it is scheduled: what follows waits"
                answers = [pool.submit(ask, prompt) for prompt in PROMPTS]
                deadline = time.monotonic() + 30
                while True:
                    metrics = client.metrics()
                    assert metrics.total("vllm:request_success_total") == 0, "the first request still runs"
                    found = metrics.total("vllm:flexkv_prefetched_blocks_total")
                    if found == 60:
                        break
                    assert time.monotonic() < deadline, found
                    time.sleep(0.1)
            assert [answer.result() for answer in answers] == [wanted.token_ids for wanted in expected]
            assert client.metrics().total("vllm:flexkv_ssd_read_blocks_total") == 60
