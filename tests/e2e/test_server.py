"""The real ``vllm serve`` with the one line that a user types: many clients, clients that leave, metrics, every kind of stop."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from flexkv_core.cli.demo.acts import first_and_second_act, ssd_settings
from flexkv_core.cli.demo.measure import Course
from flexkv_core.cli.harness.client import Completion, VllmClient
from flexkv_core.cli.harness.server import (
    CPU_ARGUMENTS,
    CPU_ENVIRONMENT,
    KV_TRANSFER_CONFIG,
    VllmServer,
    transfer_config,
)
from tests.e2e.engine import BLOCK_TOKENS, prompt_tokens

CLIENTS = 64
ENVIRONMENT = {**CPU_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
SABOTAGED = '{"kv_connector":"SabotagedConnector","kv_connector_module_path":"tests.e2e.sabotaged_connector","kv_role":"kv_both"}'
IS_SABOTAGED = "SABOTAGED_LOADS" in os.environ
ONE_LINE = ("--kv-transfer-config", SABOTAGED if IS_SABOTAGED else KV_TRANSFER_CONFIG)
EXTERNAL_HITS = "vllm:external_prefix_cache_hits_total"
SEGMENT_NAME = "flexkv-host-tier"
BY_LAYERS = {"FLEXKV_LAYERWISE_STORE_BYTES_MIN": "1"}
"""Every store is planned layer by layer, and so copied where a rank has more than one layer (`test_layerwise.py` sees it happen)."""


def _server(model: Path, folder: Path, *arguments: str, **environment: str) -> VllmServer:
    return VllmServer(
        model, [*CPU_ARGUMENTS, *arguments], {**ENVIRONMENT, **environment}, folder / "server.log"
    )


@pytest.fixture(scope="module")
def server(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with _server(llama, tmp_path_factory.mktemp("vllm"), *ONE_LINE, "--max-num-seqs", "64") as running:
        yield running


@pytest.fixture
def client(server: VllmServer) -> Iterator[VllmClient]:
    with VllmClient(server.base_url) as connected:
        yield connected


def _hits(
    client: VllmClient, prompt: list[int], tokens: int = 8
) -> tuple[Completion, Completion, Completion]:
    """The prompt recomputed, from the engine's own cache, and from FlexKV."""
    client.reset_prefix_cache(external=True)
    cold = client.complete(prompt, tokens, logprobs=True)
    device = client.complete(prompt, tokens, logprobs=True)
    client.reset_prefix_cache()
    before = client.metrics().total(EXTERNAL_HITS)
    host = client.complete(prompt, tokens, logprobs=True)
    assert client.metrics().total(EXTERNAL_HITS) - before == host.cached_tokens
    return cold, device, host


def _assert_equal_hits(cold: Completion, device: Completion, host: Completion) -> None:
    assert cold.cached_tokens == 0
    assert (
        host.cached_tokens == device.cached_tokens == (host.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    )
    assert (host.token_ids, host.logprobs) == (device.token_ids, device.logprobs)
    assert host.token_ids == cold.token_ids


@pytest.mark.hit
def test_hit_equals_device_hit(client: VllmClient) -> None:
    _assert_equal_hits(*_hits(client, prompt_tokens(900, 3000)))


def test_metrics_count_what_happened(client: VllmClient) -> None:
    before = client.metrics()
    _, _, host = _hits(client, prompt_tokens(910, 1000))
    blocks = host.cached_tokens // BLOCK_TOKENS

    def grew(name: str) -> float:
        return client.metrics().total(f"vllm:flexkv_{name}") - before.total(f"vllm:flexkv_{name}")

    deadline = time.monotonic() + 10
    while grew("stored_blocks_total") < blocks and time.monotonic() < deadline:
        client.complete(prompt_tokens(911, 10), 2)  # counts come with the next step's output
    assert grew("stored_blocks_total") >= blocks
    assert grew("loaded_blocks_total") == blocks
    assert grew("hit_tokens_total") == host.cached_tokens
    assert grew("corrupt_blocks_total") == 0
    assert (
        client.metrics().total("vllm:flexkv_host_blocks")
        > client.metrics().total("vllm:flexkv_host_blocks_used")
        > 0
    )


@pytest.mark.hit
def test_many_clients_at_once(server: VllmServer, client: VllmClient) -> None:
    """96 prompts with 8 common prefixes from 64 clients: first new, then from the device, then from FlexKV."""
    prefixes = [prompt_tokens(1000 + i, 400) for i in range(8)]
    prompts = [[*prefixes[i % 8], *prompt_tokens(1100 + i, 30 + 5 * i)] for i in range(96)]

    def ask(prompt: list[int]) -> Completion:
        with VllmClient(server.base_url) as own:
            return own.complete(prompt, 8)

    client.reset_prefix_cache(external=True)
    rounds = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        rounds.append(list(pool.map(ask, prompts)))
        rounds.append(list(pool.map(ask, prompts)))
        client.reset_prefix_cache()
        before = client.metrics().total(EXTERNAL_HITS)
        rounds.append(list(pool.map(ask, prompts)))
    assert client.metrics().total(EXTERNAL_HITS) - before > 8 * len(prefixes[0]) // 2
    assert all(answer.cached_tokens >= 6 * BLOCK_TOKENS for answer in rounds[2])
    for first, *others in zip(*rounds, strict=True):
        assert len(first.token_ids) == 8 or first.finish_reason == "stop"
        assert all(other.token_ids == first.token_ids for other in others)


def test_clients_that_leave_hold_nothing(server: VllmServer, client: VllmClient) -> None:
    """Half of the prompts are in FlexKV. Clients leave at once, while their prompt is loaded or computed, and after tokens."""
    prompts = [prompt_tokens(1300 + i, 1500) for i in range(12)]
    client.reset_prefix_cache(external=True)
    expected = [client.complete(prompt, 8) for prompt in prompts[::2]]
    client.reset_prefix_cache()

    def leave(turn: int) -> None:
        body = {
            "model": client.model,
            "prompt": prompts[turn],
            "max_tokens": 500,
            "stream": True,
            "ignore_eos": True,
        }
        timeout = httpx.Timeout(30.0, read=0.02 * turn + 0.01)
        try:
            with httpx.stream(
                "POST", f"{server.base_url}/v1/completions", json=body, timeout=timeout
            ) as reply:
                next(reply.iter_lines())
        except httpx.ReadTimeout:
            pass  # left before the first token

    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(leave, range(len(prompts))))
    client.reset_prefix_cache()  # refused as long as a block is held
    metrics = client.metrics()
    assert metrics.total("vllm:num_requests_running") + metrics.total("vllm:num_requests_waiting") == 0
    for prompt, wanted in zip(prompts[::2], expected, strict=True):
        assert client.complete(prompt, 8).token_ids == wanted.token_ids


@pytest.mark.hit
def test_tensor_parallel_and_sigkill(llama: Path, tmp_path: Path) -> None:
    """Both ranks write their shard of each slot. Killed outright, the server leaves no host memory behind."""
    cpus = sorted(os.sched_getaffinity(0))
    binding = f"{cpus[0]}|{cpus[-1]}"  # vLLM would ask for a NUMA node a rank
    ranks = ("--tensor-parallel-size", "2")
    environment = {"VLLM_CPU_OMP_THREADS_BIND": binding, **BY_LAYERS}
    with _server(llama, tmp_path, *ONE_LINE, *ranks, **environment) as server:
        with VllmClient(server.base_url) as client:
            _assert_equal_hits(*_hits(client, prompt_tokens(1400, 1500)))
            assert client.metrics().total("vllm:flexkv_layerwise_stores_total") > 0
        segments = _segments_of_group(server.pid)
        assert segments, "the server maps the host tier"
        server.kill()
        _assert_gone(segments)


@pytest.mark.hit
def test_uneven_pipeline_and_the_death_of_a_rank(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Stages of three layers and one. A worker that dies takes the engine with it, as without FlexKV, and no host memory is left."""
    cpus = sorted(os.sched_getaffinity(0))
    stages = (
        *("--pipeline-parallel-size", "2"),
        *(
            "--compilation-config",
            '{"mode":1,"backend":"eager"}',
        ),  # or vLLM's CPU worker never makes its buffers
        # FlexKV sees to it itself, by its connector's name.
        *(("--disable-hybrid-kv-cache-manager",) if IS_SABOTAGED else ()),
    )
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[-1]}",
        "VLLM_PP_LAYER_PARTITION": "3,1",
        **BY_LAYERS,
    }
    arguments = [name for name in CPU_ARGUMENTS if name != "--enforce-eager"]
    server = VllmServer(
        tiny_model("hybrid"),
        [*arguments, *ONE_LINE, *stages],
        {**ENVIRONMENT, **environment},
        tmp_path / "server.log",
    )
    with server:
        with VllmClient(server.base_url) as client:
            _assert_equal_hits(*_hits(client, prompt_tokens(1400, 1501)))
            assert client.metrics().total("vllm:flexkv_layerwise_stores_total") > 0
        segments = _segments_of_group(server.pid)
        assert segments
        os.kill(_worker_of(server.pid), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while server.alive:
            assert time.monotonic() < deadline, "the engine outlived its worker"
            time.sleep(0.2)
    _assert_gone(segments)


@pytest.mark.extended
def test_latent_cache_of_two_ranks_is_stored_once(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    ranks = ("--tensor-parallel-size", "2")
    binding = f"{cpus[0]}|{cpus[-1]}"
    arguments = [*CPU_ARGUMENTS, *ONE_LINE, *ranks]
    environment = {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": binding}
    server = VllmServer(tiny_model("mla"), arguments, environment, tmp_path / "server.log")
    with server, VllmClient(server.base_url) as client:
        prompt = prompt_tokens(1000, 1502)
        cold = client.complete(prompt, 8)
        client.reset_prefix_cache()
        first = client.complete(prompt, 8)
        client.reset_prefix_cache()
        second = client.complete(prompt, 8)
        assert cold.cached_tokens == 0
        assert first.cached_tokens == second.cached_tokens > 900
        assert first.token_ids == second.token_ids
        metrics = client.metrics()
        blocks = metrics.total("vllm:flexkv_stored_blocks_total")
        # 16 tokens of 576 float32 numbers in two layers
        assert metrics.total("vllm:flexkv_stored_bytes_total") == blocks * 16 * 576 * 4 * 2


@pytest.mark.extended
@pytest.mark.hit
def test_data_parallel_engines_have_tiers_of_their_own(llama: Path, tmp_path: Path) -> None:
    """Two engines behind one address and under one setting: each fills and reads its own host tier, and its own files in ``ssd_dirs``."""
    cpus = sorted(os.sched_getaffinity(0))
    (tmp_path / "ssd").mkdir()
    settings = {"host_bytes": "128MiB", "ssd_dirs": [str(tmp_path / "ssd")], "ssd_bytes": "256MiB"}
    config = json.dumps({**json.loads(ONE_LINE[1]), "kv_connector_extra_config": settings})
    arguments = ("--kv-transfer-config", config, "--data-parallel-size", "2")
    server = _server(llama, tmp_path, *arguments, VLLM_CPU_OMP_THREADS_BIND=f"{cpus[0]}|{cpus[-1]}")
    prompt = prompt_tokens(1450, 1500)
    with server:
        first, second = (VllmClient(server.base_url, data_parallel_rank=rank) for rank in (0, 1))
        with first, second:
            cold, device, host = _hits(first, prompt)
            _assert_equal_hits(cold, device, host)
            other = second.complete(prompt, 8, logprobs=True)
            assert (other.cached_tokens, other.token_ids) == (0, cold.token_ids)
            again = _hit_of_rank(second, prompt)
            assert (again.token_ids, again.logprobs) == (host.token_ids, host.logprobs)
            assert again.cached_tokens == host.cached_tokens
            segments = _segments_of_group(server.pid)
        assert len(segments) == 2
        assert len(list((tmp_path / "ssd").glob("flexkv-*/lock"))) == 2
    _assert_gone(segments)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU leaves none")
def test_the_remote_process_keeps_off_the_cpus_that_vllm_binds(llama: Path, tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    store = transfer_config({"host_bytes": "64MiB", "remote_url": f"dir:{tmp_path}/store"})
    binding = {"VLLM_CPU_OMP_THREADS_BIND": str(cpus[0])}
    with _server(llama, tmp_path, "--kv-transfer-config", store, **binding) as server:
        with VllmClient(server.base_url) as client:
            _assert_equal_hits(*_hits(client, prompt_tokens(1470, 1503)))
        children = psutil.Process(server.pid).children(recursive=True)
        (remote,) = (
            child for child in children if "flexkv_core.transfer.remote_worker" in str(child.cmdline())
        )
        for thread in remote.threads():
            assert sorted(os.sched_getaffinity(thread.id)) == cpus[1:]


def test_real_model_through_a_stop_and_a_kill(demo_model: Path, tmp_path: Path) -> None:
    """The first two acts of the demo, once and with shorter documents; the host tier is gone after each end of a server."""
    config = transfer_config(ssd_settings(tmp_path / "ssd"))
    server = _server(demo_model, tmp_path, "--kv-transfer-config", config, "--max-model-len", "1000")
    segments: set[tuple[str, str]] = set()

    def say(text: str) -> None:
        print(text)
        if "the server and starting it again" in text:
            segments.update(_segments_of_group(server.pid))

    course = Course(questions=1, rounds=1, progress=say)
    first_and_second_act(server, course, say)
    assert segments
    _assert_gone(segments)
    assert course.report.faults() == []


def _hit_of_rank(client: VllmClient, prompt: list[int]) -> Completion:
    """The prompt from FlexKV. Of several engines vLLM tells of one whether it was reset, so this one is asked until it was."""
    deadline = time.monotonic() + 20
    while True:
        client.reset_prefix_cache()
        before = client.metrics().total(EXTERNAL_HITS)
        answer = client.complete(prompt, 8, logprobs=True)
        if client.metrics().total(EXTERNAL_HITS) > before:
            return answer
        assert time.monotonic() < deadline, "no hit"


def _segments_of_group(group: int) -> set[tuple[str, str]]:
    """Device and inode of every host tier that a process of the group maps."""
    return _mapped_segments(lambda pid: _group_of(pid) == group)


def _worker_of(group: int) -> int:
    """A process of the group that is one of the engine's workers, by the name that vLLM gives them."""
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "Worker_PP" in name and _group_of(pid) == group:
            return pid
    raise AssertionError("the server has no worker process")


def _assert_gone(segments: set[tuple[str, str]]) -> None:
    """Nobody maps these any more, so the kernel has freed them: an unnamed segment ends with its last user."""
    deadline = time.monotonic() + 10
    while _mapped_segments(lambda pid: True) & segments:
        assert time.monotonic() < deadline, "a process still maps the host tier"
        time.sleep(0.1)
    assert not [name for name in os.listdir("/dev/shm") if "flexkv" in name]


def _mapped_segments(wanted: Callable[[int], bool]) -> set[tuple[str, str]]:
    found = set()
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines() if wanted(pid) else []
        except (OSError, ProcessLookupError):
            continue  # it ended meanwhile, or is not ours to read
        found |= {(line.split()[3], line.split()[4]) for line in lines if SEGMENT_NAME in line}
    return found


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1
