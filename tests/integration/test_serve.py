"""``flexkv serve``: several clients, real processes, and what happens when one of them or the server stops or dies."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flexkv_core.block_manager import ModelConfig
from flexkv_core.cli.torture.device import LAYOUT, NumpyDevice
from flexkv_core.cli.torture.load import CHAIN_BLOCKS_MAX, Client, Load, chain_keys, leaked_slots
from flexkv_core.config import FlexKVConfig
from flexkv_core.manager import KVManager
from flexkv_core.serve.address import connect
from flexkv_core.serve.client import SharedBlocks
from flexkv_core.serve.link import ask_status
from flexkv_core.serve.session import RELEASE_GRACE_S
from flexkv_core.tasks import KVResponseStatus
from flexkv_core.types import KEY_BYTES
from tests.integration.serving import (
    DEADLINE_MS,
    MODEL,
    ROOT,
    ClientProcess,
    ServerProcess,
    client_here,
    device_of,
    environment,
    manager_of,
    server_here,
    wait_until,
)


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "run" / "serve.sock"


def settings(socket: Path) -> FlexKVConfig:
    return FlexKVConfig(server=str(socket), server_deadline_ms=DEADLINE_MS)


def test_one_client_finds_what_another_has_stored(socket: Path) -> None:
    with server_here(socket) as server:
        first, second = client_here(socket), client_here(socket)
        keys = chain_keys(first.root, 0)
        Client(first, device_of(first), 0).put(keys)  # type: ignore[arg-type]
        loader = Client(second, device_of(second), 0)  # type: ignore[arg-type]
        assert loader.get(keys).all()
        assert (loader.tally.blocks, loader.tally.wrong) == (CHAIN_BLOCKS_MAX, 0)
        assert (first.counters().stored_blocks, second.counters().stored_blocks) == (CHAIN_BLOCKS_MAX, 0)
        assert second.counters().hit_tokens == CHAIN_BLOCKS_MAX * LAYOUT.tokens_per_block
        wait_until(lambda: second.usage()[0] == CHAIN_BLOCKS_MAX)
        first.reset()
        assert second.match_keys(keys) == 0
        for client in (first, second):
            client.shutdown()
        assert leaked_slots(manager_of(server)) == 0


def test_tokens_over_a_server(socket: Path) -> None:
    with server_here(socket):
        device = NumpyDevice(64)
        manager = KVManager.over(SharedBlocks(MODEL, settings(socket), device))
        manager.start()
        tokens = np.arange(5 * LAYOUT.tokens_per_block + 3)
        places = np.arange(len(tokens) + 13)[: len(tokens)]
        task = manager.put_async(tokens, places)
        assert manager.wait(task)[task].return_mask.sum() == 5 * LAYOUT.tokens_per_block
        for ahead in (manager.prefetch_async(tokens), manager.get_async(tokens, places)):
            response = manager.wait(ahead)[ahead]
            assert (response.status, response.return_mask.sum()) == (KVResponseStatus.SUCCESS, 80)
        task, mask = manager.get_match(tokens)
        assert mask.sum() == 80
        manager.cancel(task)
        manager.shutdown()


def test_killed_and_stopped_clients_leave_nothing_behind(socket: Path) -> None:
    """Small tier, so that slots are used anew all the time: what a dead client's process still wrote would be found."""
    rng = random.Random(7)
    with server_here(socket, slots=150) as server:
        clients = [ClientProcess(socket, seed) for seed in range(2)]
        clients[0].process.send_signal(signal.SIGSTOP)
        for seed in range(3):
            victim = ClientProcess(socket, 10 + seed)
            time.sleep(rng.uniform(0.05, 0.4))
            victim.kill()
        clients[0].process.send_signal(signal.SIGCONT)
        tallies = [client.end() for client in clients]
        assert all(blocks > 0 for blocks, _ in tallies)
        assert [wrong for _, wrong in tallies] == [0, 0]
        wait_until(lambda: not server._sessions)
        assert leaked_slots(manager_of(server)) == 0


@pytest.mark.parametrize("holds", [True, False])
def test_slots_stay_taken_while_a_worker_of_a_dead_client_can_write(
    socket: Path, tmp_path: Path, holds: bool
) -> None:
    """And would not, if the worker did not hold the lifeline: then this test notices the reuse."""
    with server_here(socket, slots=150) as server:
        folder = tmp_path / "worker"
        folder.mkdir()
        command = [sys.executable, "-m", "tests.integration.serving", "scheduler", str(socket), str(folder)]
        scheduler = subprocess.Popen(
            [*command, "holds" if holds else "drops"],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert scheduler.stdout is not None
        slots = set(json.loads(scheduler.stdout.readline()))
        assert len(slots) == CHAIN_BLOCKS_MAX
        scheduler.kill()
        scheduler.communicate()
        time.sleep(RELEASE_GRACE_S + 0.5)
        device = RecordingDevice()
        client = client_here(socket, device)
        load = Load(client, device, 1)  # type: ignore[arg-type]
        wait_until(lambda: len(device.written) >= 150 - CHAIN_BLOCKS_MAX)
        time.sleep(0.3)
        (folder / "go").touch()
        wait_until((folder / "go.done").exists)
        time.sleep(0.3)
        tally = load.stop()
        assert tally.wrong == 0  # without the lifeline the checksums turn what was overwritten into misses
        assert device.written.isdisjoint(slots) == holds
        (folder / "end").touch()
        if holds:
            wait_until(lambda: len(server._sessions) == 1)
            Load(client, device, 2).stop()  # type: ignore[arg-type]
        client.shutdown()
        wait_until(lambda: not server._sessions)
        assert leaked_slots(manager_of(server)) == 0


class RecordingDevice(NumpyDevice):
    """Remembers which slots were written."""

    def __init__(self) -> None:
        super().__init__(3 * CHAIN_BLOCKS_MAX)
        self.written: set[int] = set()

    def gather(self, op: object, after: object, layers: range | None = None) -> None:
        self.written.update(op.slots.tolist())  # type: ignore[attr-defined]
        super().gather(op, after, layers)  # type: ignore[arg-type]


def test_server_that_is_killed_is_found_again(socket: Path) -> None:
    with ServerProcess(socket) as server:
        client = client_here(socket)
        device = device_of(client)
        for round_number in range(2):
            load = Load(client, device, round_number)  # type: ignore[arg-type]
            wait_until(lambda load=load: load.tally.blocks > 20)
            if round_number < 1:
                server.process.kill()
                server.process.wait()
                time.sleep(0.1)
                assert client.match_keys(chain_keys(client.root, 0)) == 0
                assert not client.is_ready()
                server.start()
                wait_until(lambda: client.match_keys(chain_keys(client.root, 0)) == 0 and client.is_ready())
            assert load.stop().wrong == 0
        assert len(client._hosts) == 1, "segments of dead servers are still mapped"
        client.shutdown()


def test_stopped_server_costs_one_deadline(socket: Path) -> None:
    with ServerProcess(socket) as server:
        client = client_here(socket, server_deadline_ms=50)
        keys = chain_keys(client.root, 0)
        user = Client(client, device_of(client), 0)  # type: ignore[arg-type]
        user.put(keys)
        wait_until(lambda: client.match_keys(keys) == CHAIN_BLOCKS_MAX)
        server.process.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        assert [client.match_keys(keys) for _ in range(1000)] == [0] * 1000
        assert client.put_keys(chain_keys(client.root, 1), lambda done: None)[2] == 0
        assert time.monotonic() - begin < 1.0, "each call waited for a server that does not answer"
        server.process.send_signal(signal.SIGCONT)
        wait_until(lambda: client.match_keys(keys) == CHAIN_BLOCKS_MAX)
        assert user.get(keys).all()
        assert user.tally.wrong == 0
        client.shutdown()


def test_late_plan_is_given_back(socket: Path) -> None:
    with server_here(socket) as server:
        client = client_here(socket, server_deadline_ms=100)
        keys = chain_keys(client.root, 0)
        Client(client, device_of(client), 0).put(keys)  # type: ignore[arg-type]
        manager = manager_of(server)
        with manager._changed:  # the server cannot answer
            assert client.get_keys(keys, 0, lambda done: None)[1] == 0
            assert client.put_keys(chain_keys(client.root, 1), lambda done: None)[2] == 0
        wait_until(lambda: client.match_keys(keys) == CHAIN_BLOCKS_MAX)
        wait_until(lambda: not manager._cache.lease_count)
        assert leaked_slots(manager) == 0
        client.shutdown()


def test_server_stops_within_its_time_and_is_warm_again(socket: Path, tmp_path: Path) -> None:
    disk = tmp_path / "ssd"
    disk.mkdir()
    arguments = ("--ssd-dirs", str(disk), "--ssd-bytes", "64MiB")
    with ServerProcess(socket, 100, *arguments) as server:
        client = client_here(socket)
        user = Client(client, device_of(client), 0)  # type: ignore[arg-type]
        keys = chain_keys(client.root, 0)
        user.put(keys)
        wait_until(lambda: client.match_keys(keys) == CHAIN_BLOCKS_MAX)
        begin = time.monotonic()
        server.process.terminate()
        assert server.process.wait(30) == 0
        assert time.monotonic() - begin < 12
        assert not socket.exists()
        server.start()
        wait_until(lambda: client.match_keys(keys) == CHAIN_BLOCKS_MAX)
        assert user.get(keys).all()  # read by the server, copied here as it arrives
        assert user.tally.wrong == 0
        client.shutdown()


def test_stopped_client_keeps_nobody_from_storing(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_core.serve.session.OVERDUE_S", 0.2)
    with server_here(socket) as server:
        stopped, other = client_here(socket), client_here(socket)
        keys = chain_keys(other.root, 0)
        task, _, count = stopped.put_keys(keys, lambda done: None)
        assert count == CHAIN_BLOCKS_MAX
        user = Client(other, device_of(other), 0)  # type: ignore[arg-type]
        user.put(keys)
        assert other.match_keys(keys) == 0  # it is being stored, as far as anybody knows

        def stores() -> bool:
            user.put(keys)
            return other.match_keys(keys) == CHAIN_BLOCKS_MAX

        wait_until(stores)
        stopped.launch_blocks(
            task, np.arange(CHAIN_BLOCKS_MAX)
        )  # it goes on: into slots that are still its own
        wait_until(lambda: not stopped._tasks)
        assert user.get(keys).all()
        assert user.tally.wrong == 0
        for client in (stopped, other):
            client.shutdown()
        wait_until(lambda: not server._sessions)
        assert leaked_slots(manager_of(server)) == 0


def test_store_that_takes_long_is_kept(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's store begins when its step has computed, which takes longer than OVERDUE_S on a CPU. Neither the same request's next step
    nor what others store meanwhile ends it."""
    monkeypatch.setattr("flexkv_core.serve.session.OVERDUE_S", 0.0)
    with server_here(socket) as server:
        slow, other = client_here(socket), client_here(socket)
        keys, device = chain_keys(slow.root, 0), device_of(slow)
        half = CHAIN_BLOCKS_MAX // 2
        first, _, count = slow.put_keys(keys[: KEY_BYTES * half], lambda done: None)
        (tenant,) = server._tenants.all.values()
        wait_until(lambda: first in tenant.overdue)
        second, start, rest = slow.put_keys(keys, lambda done: None)
        assert (count, start, rest) == (half, half, CHAIN_BLOCKS_MAX - half)
        Client(other, device_of(other), 0).put(chain_keys(other.root, 1))  # type: ignore[arg-type]
        device.fill(np.arange(CHAIN_BLOCKS_MAX), keys)
        slow.launch_blocks(first, np.arange(half))
        slow.launch_blocks(second, np.arange(half, CHAIN_BLOCKS_MAX))
        wait_until(lambda: not slow._tasks)
        user = Client(other, device_of(other), 0)  # type: ignore[arg-type]
        assert user.get(keys).all()
        assert user.tally.wrong == 0
        for client in (slow, other):
            client.shutdown()


def test_first_request_finds_what_the_store_has(
    socket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has only just begun does not take its client in before it can ask its store."""
    monkeypatch.setattr("flexkv_core.serve.tenants.REMOTE_START_S", 50.0)
    monkeypatch.setattr("flexkv_core.serve.client.START_WAIT_S", 60.0)
    patient = {"remote_lookup_deadline_ms": 10_000, "remote_read_deadline_ms": 10_000}
    settings = {"remote_url": f"dir:{tmp_path}/store", **patient}
    with server_here(socket, **settings) as server:
        client = client_here(socket)
        keys = chain_keys(client.root, 0)
        Client(client, device_of(client), 0).put(keys)  # type: ignore[arg-type]
        wait_until(lambda: manager_of(server).counters().remote_written_blocks == CHAIN_BLOCKS_MAX)
        client.shutdown()
    with server_here(socket, **settings):
        client = client_here(socket)
        ended = threading.Event()
        assert client.fetch_keys(keys, ended.set)
        assert ended.wait(30)
        assert client.match_keys(keys) == CHAIN_BLOCKS_MAX
        client.shutdown()


def test_server_without_descriptors_waits_for_one(socket: Path) -> None:
    """A connection that cannot be taken in is reported again at once; the server must not do nothing but fail to take it in."""
    with ServerProcess(socket) as server:
        pid = server.process.pid
        open_files = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        lowest_free = min(set(range(len(open_files) + 1)) - open_files)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, before[1]))
        waiting = connect(socket, 5.0)
        begin = time.monotonic(), processor_s(pid)
        with pytest.raises(TimeoutError):
            ask_status(socket, 2.0)
        took = time.monotonic() - begin[0], processor_s(pid) - begin[1]
        assert took[1] < took[0] / 4
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert ask_status(socket, 20.0)["pid"] == pid
        waiting.close()


def processor_s(pid: int) -> float:
    """What the process has used of a processor, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_models_are_told_apart(socket: Path) -> None:
    other = ModelConfig({"model": "another"}, LAYOUT)
    for models, expected in ((1, 0), (2, CHAIN_BLOCKS_MAX)):
        with server_here(socket, models=models):
            first = client_here(socket)
            refused = SharedBlocks(other, settings(socket), NumpyDevice(CHAIN_BLOCKS_MAX))
            refused._found.set()  # do not wait for what may not come
            refused.start()
            if expected:
                wait_until(lambda refused=refused: refused.match_keys(b"") == 0 and refused.is_ready())
            keys = chain_keys(refused.root, 0)
            Client(refused, device_of(refused), 0).put(keys)  # type: ignore[arg-type]
            assert refused.match_keys(keys) == expected
            assert first.match_keys(chain_keys(first.root, 0)) == first.match_keys(keys) == 0
            refused.shutdown()
            first.shutdown()


def test_more_tasks_than_allowed_are_misses(socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_core.serve.session.TASKS_MAX", 3)
    with server_here(socket) as server:
        client = client_here(socket)
        tasks = [
            client.put_keys(chain_keys(client.root, chain)[: KEY_BYTES * (20 + chain)], lambda done: None)
            for chain in range(5)
        ]
        assert [count > 0 for _, _, count in tasks] == [True, True, True, False, False]
        for task, _, _ in tasks:
            client.cancel(task)
        wait_until(lambda: not manager_of(server)._cache.lease_count)
        client.shutdown()


def test_status_command(socket: Path) -> None:
    command = [sys.executable, "-m", "flexkv_core.cli", "status", "--socket", str(socket)]
    run = lambda *more: subprocess.run([*command, *more], env=environment(), capture_output=True, text=True)  # noqa: E731
    assert run().returncode == 1
    with server_here(socket):
        client = client_here(socket)
        found = json.loads(run("--json").stdout)
        assert found["pid"] == os.getpid()
        assert [model["clients"][0]["connected"] for model in found["models"]] == [True]
        assert "host tier" in run().stdout
        client.shutdown()
