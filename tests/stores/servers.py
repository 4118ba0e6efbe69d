"""Real servers of the stores, on loopback, each ended by whoever started it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 30.0


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """A server that speaks S3's protocol, with a bucket ``bkt``; its port."""
    (folder / "bkt").mkdir(parents=True)
    port = free_port()
    with _running([_tool("localbucket"), "--port", str(port), str(folder)], port):
        yield port


@contextlib.contextmanager
def redis_server(*options: str, port: int | None = None) -> Iterator[int]:
    """Redis without persistence; its port."""
    port = port or free_port()
    base = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with _running([*base, *options], port):
        yield port


@contextlib.contextmanager
def mooncake_master(port: int | None = None) -> Iterator[int]:
    """Mooncake's master; its port."""
    port, metrics = port or free_port(), free_port()
    command = [
        _tool("mooncake_master"),
        f"--rpc_port={port}",
        "--rpc_address=127.0.0.1",
        f"--metrics_port={metrics}",
        "--metrics_host=127.0.0.1",
        "--default_kv_lease_ttl=100",
    ]
    with _running(command, port):
        yield port


def s3_options(port: int) -> dict[str, str]:
    """``remote_options`` for :func:`s3_server`."""
    return {
        "endpoint": f"http://127.0.0.1:{port}",
        "region": "us-east-1",
        "allow_http": "true",
        "virtual_hosted_style_request": "false",
        "skip_signature": "true",
    }


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
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
