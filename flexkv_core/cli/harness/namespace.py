"""Network namespaces: what runs in one has a network of its own, as another machine has."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

BRIDGE_ADDRESS = "10.213.77.1"
"""Of the bridge on this machine's side, where servers that all namespaces reach may listen."""


@dataclass(frozen=True)
class Machine:
    """Where something runs: its address, and the command that runs something there."""

    address: str
    prefix: tuple[str, ...] = ()


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[Machine] | None]:
    """``count`` namespaces on one bridge, removed at the end; None where this process may not make them."""
    if os.geteuid() or not shutil.which("ip"):
        yield None
        return
    tag = f"fkv{os.getpid() % 100_000}"
    names = [f"{tag}n{index}" for index in range(count)]
    try:
        try:
            _make(tag, names)
        except subprocess.CalledProcessError:
            yield None
            return
        base = BRIDGE_ADDRESS.rpartition(".")[0]
        yield [
            Machine(f"{base}.{10 + index}", ("ip", "netns", "exec", name)) for index, name in enumerate(names)
        ]
    finally:
        for name in names:
            _ip("netns", "delete", name, check=False)
        _ip("link", "delete", tag, check=False)


def _make(bridge: str, names: list[str]) -> None:
    _ip("link", "add", bridge, "type", "bridge")
    _ip("address", "add", f"{BRIDGE_ADDRESS}/24", "dev", bridge)
    _ip("link", "set", bridge, "up")
    base = BRIDGE_ADDRESS.rpartition(".")[0]
    for index, name in enumerate(names):
        outside = f"{bridge}v{index}"
        _ip("netns", "add", name)
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", outside, "master", bridge, "up")
        _ip("-n", name, "address", "add", f"{base}.{10 + index}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, timeout=20)
