"""Real servers and clients for the tests of ``flexkv serve``. Run as a program it is a client that puts, gets and compares until it is told to end."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from flexkv_core.block_manager import BlockManager, ModelConfig
from flexkv_core.cli.torture.device import LAYOUT, NumpyDevice
from flexkv_core.cli.torture.load import CHAIN_BLOCKS_MAX, THREADS, Load
from flexkv_core.config import FlexKVConfig
from flexkv_core.serve.address import connect
from flexkv_core.serve.client import SharedBlocks
from flexkv_core.serve.server import Server
from flexkv_core.storage.memory import HUGE_PAGE_BYTES, HostSegment
from flexkv_core.transfer.plan import OpResult, TransferOp

ROOT = Path(__file__).parents[2]
DEADLINE_MS = 1000
"""What is tested here is not how fast a busy machine answers."""
MODEL = ModelConfig({"model": "torture"}, LAYOUT)


def host_bytes(slots: int) -> int:
    """For a tier of so many slots."""
    return HUGE_PAGE_BYTES + slots * (LAYOUT.slot_bytes + 12)


def environment() -> dict[str, str]:
    """So that a child finds the packages."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


@contextlib.contextmanager
def server_here(socket: Path, slots: int = 100, models: int = 1, **settings: object) -> Iterator[Server]:
    """A server on a thread of this process, whose managers can be looked at."""
    server = Server(socket, FlexKVConfig(host_bytes=host_bytes(slots) * models, **settings), models)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()
        assert not socket.exists()


def manager_of(server: Server) -> BlockManager:
    """Of the one tenant."""
    (tenant,) = server._tenants.all.values()
    return tenant.manager


class ServerProcess:
    """``flexkv serve`` as a process."""

    def __init__(self, socket: Path, slots: int = 100, *arguments: str) -> None:
        size = str(host_bytes(slots))
        self._command = [sys.executable, "-m", "flexkv_core.cli", "serve", "--socket", str(socket)]
        self._command += ["--host-bytes", size, *arguments]
        self._socket = socket

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, env=environment())
        wait_until(lambda: self.process.poll() is not None or self._answers())
        assert self.process.poll() is None

    def _answers(self) -> bool:
        try:
            connect(self._socket, 1.0).close()
        except OSError:
            return False
        return True


def client_here(socket: Path, device: NumpyDevice | None = None, **settings: object) -> SharedBlocks:
    """A client in this process, connected."""
    config = FlexKVConfig(server=str(socket), **{"server_deadline_ms": DEADLINE_MS, **settings})
    client = SharedBlocks(MODEL, config, device or NumpyDevice((THREADS + 1) * CHAIN_BLOCKS_MAX))
    client.start()
    assert client.is_ready()
    return client


def device_of(client: SharedBlocks) -> NumpyDevice:
    """What :func:`client_here` was given."""
    device = client._executor._copier  # type: ignore[attr-defined]
    assert isinstance(device, NumpyDevice)
    return device


class ClientProcess:
    """A process that puts and gets without a pause and compares what it gets."""

    def __init__(self, socket: Path, seed: int) -> None:
        command = [sys.executable, "-m", "tests.integration.serving", str(socket), str(seed)]
        self.process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def end(self) -> tuple[int, int]:
        """Blocks that were compared, and wrong bytes."""
        out, _ = self.process.communicate("end\n", timeout=60)
        blocks, wrong = json.loads(out)
        return blocks, wrong

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class WorkerExecutor:
    """Runs each copy in a process of its own, as an engine's worker does, that waits for a file before it copies and for another before it
    ends: it outlives its scheduler. ``holds_lifeline``: as it must."""

    def __init__(self, folder: Path, holds_lifeline: bool = True) -> None:
        self._folder, self._holds = folder, holds_lifeline
        self.slots: list[int] = []

    def start(self, host: HostSegment, on_result: Callable[[OpResult], None]) -> None:
        self._handle = host.handle

    def submit(self, op: TransferOp) -> None:
        self.slots = op.slots.tolist()
        work = self._folder / "work"
        work.write_bytes(pickle.dumps((self._handle, op, self._holds)))
        command = [sys.executable, "-m", "tests.integration.serving", "worker", str(self._folder)]
        subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL)
        wait_until((self._folder / "mapped").exists)

    def cancel(self, op_id: int) -> None:
        pass

    def close(self) -> None:
        pass


def _work(folder: Path) -> None:
    """The worker: maps, and once ``go`` is there writes what no checksum would pass."""
    from dataclasses import replace

    handle, op, holds = pickle.loads((folder / "work").read_bytes())
    host = HostSegment.attach(handle if holds else replace(handle, lifeline=None))
    (folder / "mapped").touch()
    for name, action in (("go", lambda: _scribble(host, op)), ("end", lambda: None)):
        wait_until((folder / name).exists, 60)
        action()
        (folder / f"{name}.done").touch()


def _scribble(host: HostSegment, op: TransferOp) -> None:
    import ctypes

    for slot in op.slots.tolist():
        ctypes.memset(host.address + slot * host.layout.slot_bytes, 0xA5, host.layout.slot_bytes)


def _put_and_wait(socket: str, folder: Path, holds: bool) -> None:
    """A scheduler with one put under way."""
    executor = WorkerExecutor(folder, holds)
    client = SharedBlocks(MODEL, FlexKVConfig(server=socket, server_deadline_ms=DEADLINE_MS), executor)
    client.start()
    keys = np.random.default_rng(99).bytes(16 * CHAIN_BLOCKS_MAX)
    task, _, count = client.put_keys(keys, lambda done: None)
    client.launch_blocks(task, np.zeros(count, np.int64))
    print(json.dumps(executor.slots), flush=True)
    time.sleep(120)


def _load(socket: str, seed: int) -> None:
    client = client_here(Path(socket))
    device = device_of(client)
    load = Load(client, device, seed, chains=40)  # type: ignore[arg-type]
    print("ready", flush=True)
    sys.stdin.readline()
    tally = load.stop()
    print(json.dumps([tally.blocks, tally.wrong]), flush=True)
    client.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        _work(Path(sys.argv[2]))
    elif sys.argv[1] == "scheduler":
        _put_and_wait(sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "holds")
    else:
        _load(sys.argv[1], int(sys.argv[2]))
