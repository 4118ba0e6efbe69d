"""``flexkv bench shared``: lookups of eight clients on one ``flexkv serve``, and what a client that is stopped does to the others.

Clients are processes of their own that keep to a timetable (open loop): a late answer delays no later request, and its lateness counts. What
is measured is the call with 131,072 tokens' keys, of which the server knows all; they come from a KeyChain as an adapter's do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from flexkv_core.block_manager import ModelConfig
from flexkv_core.cli.harness.cache_server import CacheServer
from flexkv_core.config import FlexKVConfig
from flexkv_core.keys import KeyChain
from flexkv_core.layout import KVLayout
from flexkv_core.serve.client import SharedBlocks
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.plan import OpResult, OpStatus, TransferOp

CLIENTS = 8
REQUESTS_A_SECOND = 200
_BLOCKS, _BLOCK_TOKENS = 8192, 16
_PHASE_S = 6.0
_ROUNDS = 3
_START_S = 60.0
_MODEL = ModelConfig({"model": "bench"}, KVLayout(_BLOCK_TOKENS, _BLOCK_TOKENS, 4096))
_HOST_BYTES = 2 * _BLOCKS * (_MODEL.layout.slot_bytes + 12) + (2 << 20)


def run(quick: bool = False) -> dict[str, float | bool]:
    """``match_p50_us`` and ``match_p99_us`` with all clients; ``stopped_client_p99_ratio``: p99 of seven while the eighth is stopped, over p99 of
    these seven while it is not, medians of phases in turns; ``misses``: answers that were late or wrong."""
    phase_s, rounds = (0.5, 1) if quick else (_PHASE_S, _ROUNDS)
    with (
        tempfile.TemporaryDirectory(prefix="flexkv-bench-") as folder,
        CacheServer(Path(folder), _HOST_BYTES) as server,
    ):
        clients = [_Client(server.socket, number) for number in range(CLIENTS)]
        try:
            for client in clients:
                client.wait_ready()
            _phase(clients, min(1.0, phase_s))  # warms up
            alone, beside, ratios = [], [], []
            for _ in range(rounds):
                alone.append(_phase(clients, phase_s))
                stopped = clients[-1]
                stopped.process.send_signal(signal.SIGSTOP)
                beside.append(_phase(clients[:-1], phase_s))
                stopped.process.send_signal(signal.SIGCONT)
                ratios.append(_p(99, beside[-1]) / _p(99, alone[-1][:-1]))
        finally:
            for client in clients:
                client.close()
    return {
        "match_p50_us": _p(50, [taken for phase in alone for taken in phase]),
        "match_p99_us": float(np.median([_p(99, phase) for phase in alone])),
        "stopped_client_p99_us": float(np.median([_p(99, phase) for phase in beside])),
        "stopped_client_p99_ratio": float(np.median(ratios)),
        "requests": sum(len(taken) for phase in alone + beside for taken in phase),
        "misses": sum(client.misses for client in clients),
    }


def _p(percentile: float, taken: list[list[float]]) -> float:
    return float(np.percentile(np.concatenate(taken), percentile)) * 1e6


def _phase(clients: list[_Client], seconds: float) -> list[list[float]]:
    """Seconds of each request, a list a client, while all of ``clients`` keep to one timetable."""
    begin = time.monotonic() + 0.1
    for client in clients:
        client.ask(begin, seconds)
    return [client.answer() for client in clients]


class _Client:
    """A process that looks up on command."""

    def __init__(self, socket: Path, number: int) -> None:
        self.misses = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flexkv_core.cli.bench.shared", str(socket), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> None:
        """Until it is connected."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError("a client could not begin")

    def ask(self, begin: float, seconds: float) -> None:
        """Have it look up from ``begin`` (time.monotonic()) on."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([begin, seconds]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> list[float]:
        """Seconds of each request."""
        assert self.process.stdout is not None
        misses, taken = json.loads(self.process.stdout.readline())
        self.misses += misses
        return list(taken)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


class _InstantExecutor:
    """Stores nothing and says that it has; what is measured is the index."""

    def start(self, host: HostSegment, on_result: object) -> None:
        self._on_result = on_result

    def submit(self, op: TransferOp) -> None:
        assert callable(self._on_result)
        self._on_result(OpResult(op.op_id, OpStatus.DONE, np.ones(len(op.slots), np.bool_)))

    def cancel(self, op_id: int) -> None:
        pass

    def close(self) -> None:
        pass


def _client(socket: str, number: int) -> None:
    """The client's process: one line on stdin a phase, one on stdout."""
    blocks = SharedBlocks(_MODEL, FlexKVConfig(server=socket), _InstantExecutor())
    blocks.start()
    chain = KeyChain(blocks.root, _BLOCK_TOKENS)
    tokens = _BLOCKS * _BLOCK_TOKENS
    chain.extend(range(tokens), tokens)
    _store(blocks, chain.keys(_BLOCKS))
    print("ready", flush=True)
    period = CLIENTS / REQUESTS_A_SECOND
    for line in sys.stdin:
        begin, seconds = json.loads(line)
        misses, taken = 0, list[float]()
        due = begin + period * number / CLIENTS
        while due < begin + seconds:
            asked = due  # unless it was slept for: then the timer's own lateness is nobody's
            if due > time.monotonic():
                time.sleep(due - time.monotonic())
                asked = time.monotonic()
            started = time.monotonic()
            keys = chain.keys(_BLOCKS)
            asked += time.monotonic() - started
            found = blocks.match_keys(keys)
            taken.append(time.monotonic() - asked)
            misses += found != _BLOCKS
            due += period
        print(json.dumps([misses, taken]), flush=True)
    os._exit(0)


def _store(blocks: SharedBlocks, keys: bytes) -> None:
    """Have the server know the keys; several clients may try at a time."""
    deadline = time.monotonic() + _START_S
    while blocks.match_keys(keys) < _BLOCKS:
        task, _, count = blocks.put_keys(keys, lambda done: None)
        if count:
            blocks.launch_blocks(task, np.zeros(count, np.int64))
        if time.monotonic() > deadline:
            raise RuntimeError("the keys were not stored")
        time.sleep(0.01)


if __name__ == "__main__":
    _client(sys.argv[1], int(sys.argv[2]))
