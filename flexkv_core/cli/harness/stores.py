"""Real servers of the stores, for tests, benchmarks and the demo, each ended by whoever started it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from flexkv_core.cli.harness.server import die_with_parent, free_port

START_S = 30.0
LOOPBACK = "127.0.0.1"

_LOCALBUCKET = """
import socketserver, sys
socketserver.TCPServer.request_queue_size = 128
socketserver.StreamRequestHandler.disable_nagle_algorithm = True
from localbucket import main
sys.exit(main())
"""
"""Its own queue holds 5 connections and it ends each one whose object is missing: of the 16 questions of a lookup some then waited for a second,
until their connection was asked for again. And the last piece of an answer must not wait until the piece before it is acknowledged, which
takes 40 ms: as long as a batch of 16 MiB."""


@contextlib.contextmanager
def s3_server(folder: Path, host: str = LOOPBACK) -> Iterator[int]:
    """A server that speaks S3's protocol, with a bucket ``bkt``; its port. ``folder`` must not exist."""
    (folder / "bkt").mkdir(parents=True)
    port = free_port()
    _tool("localbucket")
    command = [sys.executable, "-c", _LOCALBUCKET, "--host", host, "--port", str(port), str(folder)]
    with _running(command, host, port):
        yield port


@contextlib.contextmanager
def redis_server(
    *options: str, port: int | None = None, host: str = LOOPBACK, nice: int = 0
) -> Iterator[int]:
    """Redis without persistence and without a password of its own; its port. ``nice``: added to this process's."""
    port = port or free_port()
    base = ["redis-server", "--port", str(port), "--bind", host, "--save", "", "--appendonly", "no"]
    with _running(["nice", "-n", str(nice), *base, *options], host, port):
        yield port


@contextlib.contextmanager
def mooncake_master(host: str = LOOPBACK, lease_ms: int = 100) -> Iterator[int]:
    """Mooncake's master; its port. ``lease_ms``: a read that takes longer than this fails, and a value is kept so long after one; Mooncake's
    own default is 5,000, for which a test that fills the store would have to wait."""
    port, metrics = free_port(), free_port()
    command = [
        _tool("mooncake_master"),
        f"--rpc_port={port}",
        f"--rpc_address={host}",
        f"--metrics_port={metrics}",
        "--metrics_host=127.0.0.1",
        f"--default_kv_lease_ttl={lease_ms}",
    ]
    with _running(command, host, port):
        yield port


@contextlib.contextmanager
def mooncake_holder(master: int, segment_bytes: int, host: str = LOOPBACK) -> Iterator[None]:
    """A process that lends Mooncake memory, as another machine does."""
    program = (
        "import sys, time; from mooncake.store import MooncakeDistributedStore as Store; store = Store();"
        f" code = store.setup({host!r}, 'P2PHANDSHAKE', {segment_bytes}, 1 << 20, 'tcp', '', '{host}:{master}');"
        " print('code', code, flush=True); sys.stdin.read()"
    )
    command = [*die_with_parent(), "env", f"MC_TCP_BIND_ADDRESS={host}", sys.executable, "-c", program]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        code = next((line for line in lines if line.startswith("code")), "ended")
        assert code.strip() == "code 0", f"Mooncake's client: {code}"
        yield
    finally:
        process.kill()
        process.wait()


def s3_options(port: int, host: str = LOOPBACK) -> dict[str, str]:
    """``remote_options`` for :func:`s3_server`."""
    return {
        "endpoint": f"http://{host}:{port}",
        "region": "us-east-1",
        "allow_http": "true",
        "virtual_hosted_style_request": "false",
        "skip_signature": "true",
    }


@contextlib.contextmanager
def _running(command: list[str], host: str, port: int) -> Iterator[None]:
    process = subprocess.Popen(
        [*die_with_parent(), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection((host, port), 1).close()
                break
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{command[0]} does not listen"
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


def _tool(name: str) -> str:
    """A command of this environment."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed: it comes with the `dev` extra"
    return found
