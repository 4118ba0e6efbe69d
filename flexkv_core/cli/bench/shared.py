"""``flexkv bench shared``: lookups of eight clients on one ``flexkv serve``, what a client that is stopped does to the others, and the limit:
the same clients asking a process that does nothing but answer.

Clients are processes of their own that keep to a timetable (open loop): a late answer delays no later request, and its lateness counts. What
is measured is the call with 131,072 tokens' keys, of which the server knows all; they come from a KeyChain as an adapter's do.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
_QUESTION = bytes(32)
"""As long as a request about keys."""
_MODEL = ModelConfig({"model": "bench"}, KVLayout(_BLOCK_TOKENS, _BLOCK_TOKENS, 4096))
_HOST_BYTES = 2 * _BLOCKS * (_MODEL.layout.slot_bytes + 12) + (2 << 20)


def run(quick: bool = False) -> dict[str, float | bool]:
    """``match_p50_us`` and ``match_p99_us`` with all clients; ``stopped_client_p99_ratio``: p99 of seven while the eighth is stopped, over p99 of
    these seven while it is not, medians of phases in turns; ``bare_p50_us``, ``bare_p99_us``: a question and an answer of a few bytes between
    the same processes; ``misses``: answers that were late or wrong."""
    phase_s, rounds = (0.5, 1) if quick else (_PHASE_S, _ROUNDS)
    with (
        tempfile.TemporaryDirectory(prefix="flexkv-bench-") as folder,
        CacheServer(Path(folder), _HOST_BYTES) as server,
    ):
        answering = _answering(Path(folder, "bare"))
        clients = [_Client(server.socket, Path(folder, "bare"), number) for number in range(CLIENTS)]
        try:
            for client in clients:
                client.wait_ready()
            _phase(clients, min(1.0, phase_s))  # warms up
            alone, beside, bare, ratios = [], [], [], []
            for _ in range(rounds):
                alone.append(_phase(clients, phase_s))
                stopped = clients[-1]
                stopped.process.send_signal(signal.SIGSTOP)
                beside.append(_phase(clients[:-1], phase_s))
                stopped.process.send_signal(signal.SIGCONT)
                ratios.append(_p(99, beside[-1]) / _p(99, alone[-1][:-1]))
                bare.append(_phase(clients, phase_s / 2, is_bare=True))
        finally:
            for client in clients:
                client.close()
            answering.kill()
            answering.wait()
    return {
        "match_p50_us": _p(50, [taken for phase in alone for taken in phase]),
        "match_p99_us": float(np.median([_p(99, phase) for phase in alone])),
        "stopped_client_p99_us": float(np.median([_p(99, phase) for phase in beside])),
        "stopped_client_p99_ratio": float(np.median(ratios)),
        "bare_p50_us": _p(50, [taken for phase in bare for taken in phase]),
        "bare_p99_us": float(np.median([_p(99, phase) for phase in bare])),
        "requests": sum(len(taken) for phase in alone + beside for taken in phase),
        "misses": sum(client.misses for client in clients),
    }


def _p(percentile: float, taken: list[list[float]]) -> float:
    return float(np.percentile(np.concatenate(taken), percentile)) * 1e6


def _phase(clients: list[_Client], seconds: float, is_bare: bool = False) -> list[list[float]]:
    """Seconds of each request, a list a client, while all of ``clients`` keep to one timetable."""
    begin = time.monotonic() + 0.1
    for client in clients:
        client.ask(begin, seconds, is_bare)
    return [client.answer() for client in clients]


class _Client:
    """A process that looks up on command."""

    def __init__(self, server: Path, bare: Path, number: int) -> None:
        self.misses = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flexkv_core.cli.bench.shared", str(server), str(bare), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> None:
        """Until it is connected."""
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError("a client could not begin")

    def ask(self, begin: float, seconds: float, is_bare: bool) -> None:
        """Have it look up, or ask the process that only answers, from ``begin`` (time.monotonic()) on."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([begin, seconds, is_bare]) + "\n")
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


def _client(server: str, bare: str, number: int) -> None:
    """The client's process: one line on stdin a phase, one on stdout."""
    blocks = SharedBlocks(_MODEL, FlexKVConfig(server=server), _InstantExecutor())
    blocks.start()
    chain = KeyChain(blocks.root, _BLOCK_TOKENS)
    tokens = _BLOCKS * _BLOCK_TOKENS
    chain.extend(range(tokens), tokens)
    _store(blocks, chain.keys(_BLOCKS))
    echo = _Echo(bare)
    print("ready", flush=True)
    for line in sys.stdin:
        begin, seconds, is_bare = json.loads(line)
        if is_bare:
            misses, taken = _keep_timetable(begin, seconds, number, bytes, echo.ask)
        else:
            keys = partial(chain.keys, _BLOCKS)
            misses, taken = _keep_timetable(
                begin, seconds, number, keys, lambda keys: blocks.match_keys(keys) == _BLOCKS
            )
        print(json.dumps([misses, taken]), flush=True)
    os._exit(0)


def _keep_timetable(
    begin: float, seconds: float, number: int, prepare: Callable[[], bytes], ask: Callable[[bytes], bool]
) -> tuple[int, list[float]]:
    """``ask`` for what ``prepare`` gives, when it is due; how often it failed, and the seconds that each took."""
    period = CLIENTS / REQUESTS_A_SECOND
    misses, taken = 0, list[float]()
    due = begin + period * number / CLIENTS
    while due < begin + seconds:
        asked = due  # unless it was slept for: then the timer's own lateness is nobody's
        if due > time.monotonic():
            time.sleep(due - time.monotonic())
            asked = time.monotonic()
        started = time.monotonic()
        prepared = prepare()
        asked += time.monotonic() - started
        found = ask(prepared)
        taken.append(time.monotonic() - asked)
        misses += not found
        due += period
    return misses, taken


class _Echo:
    """A connection to the process that only answers."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_START_S)
        self._socket.connect(path)

    def ask(self, question: bytes) -> bool:
        """Send a few bytes and wait for as many."""
        self._socket.send(_QUESTION)
        return len(self._socket.recv(len(_QUESTION))) == len(_QUESTION)


def _answering(path: Path) -> subprocess.Popen[bytes]:
    """A process that does nothing but answer; it can be connected to at once."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(CLIENTS)
        fd = listener.fileno()
        return subprocess.Popen(
            [sys.executable, "-m", "flexkv_core.cli.bench.shared", str(fd)], pass_fds=[fd]
        )


def _answer(fd: int) -> None:
    """That process."""
    selector = selectors.EpollSelector()
    listener = socket.socket(fileno=fd)
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                selector.register(listener.accept()[0], selectors.EVENT_READ)
                continue
            assert isinstance(key.fileobj, socket.socket)
            question = key.fileobj.recv(len(_QUESTION))
            if not question:
                selector.unregister(key.fileobj)
                continue
            key.fileobj.send(question)


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
    if len(sys.argv) == 2:
        _answer(int(sys.argv[1]))
    _client(sys.argv[1], sys.argv[2], int(sys.argv[3]))
