"""Peers of a server that send what they should not, or are who they should not be: each is dropped, and nobody else notices."""

from __future__ import annotations

import json
import os
import random
import socket as sockets
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv_core.cli.torture.load import CHAIN_BLOCKS_MAX, Client, chain_keys, leaked_slots
from flexkv_core.errors import ConfigError
from flexkv_core.keys import fingerprint
from flexkv_core.serve.address import Address, connect
from flexkv_core.serve.client import SharedBlocks
from flexkv_core.serve.link import Link, Refused, open_link
from flexkv_core.serve.server import Server
from flexkv_core.serve.tenants import Greeting
from flexkv_core.serve.wire import HEADER, PAYLOAD_BYTES_MAX, Kind, frame, pack_asked, pack_result
from flexkv_core.tasks import Purpose
from flexkv_core.transfer.plan import OpResult, OpStatus
from tests.integration.serving import MODEL, client_here, device_of, manager_of, server_here, wait_until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Beside the bad peer there is a good client, whose hits go on."""
    path = tmp_path / "serve.sock"
    with server_here(path) as running:
        client = client_here(path)
        user = Client(client, device_of(client), 0)  # type: ignore[arg-type]
        keys = chain_keys(client.root, 0)
        user.put(keys)
        yield running
        assert user.get(keys).all()
        assert user.tally.wrong == 0
        client.shutdown()
        wait_until(lambda: not running._sessions)
        assert leaked_slots(manager_of(running)) == 0


def path_of(server: Server) -> Path:
    return server._address.path


def is_dropped(peer: sockets.socket) -> bool:
    """Whether the server closes the connection, perhaps with words."""
    try:
        while peer.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def hello(**changes: object) -> bytes:
    root = fingerprint({**MODEL.identity, "namespace": "", "layout": repr(MODEL.layout)})
    values = json.loads(Greeting(MODEL, "", root, "peer").pack())
    return frame(Kind.HELLO, 0, json.dumps({**values, **changes}).encode())


def greet(peer: sockets.socket) -> list[int]:
    """Introduce oneself; the descriptors that come, among them the lifeline, which must be held."""
    peer.sendall(hello())
    _, fds, _, _ = sockets.recv_fds(peer, 4096, 4)
    assert len(fds) == 4
    return fds


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


BAD_BEGINNINGS = {
    "garbage": b"\xff" * 64,
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "huge length": HEADER.pack(0xFFFFFFFF, Kind.HELLO, 0, 0),
    "length above the greeting's": HEADER.pack(65537, Kind.HELLO, 0, 0),
    "unknown kind": HEADER.pack(0, 999, 0, 0),
    "reserved": HEADER.pack(0, Kind.HELLO, 1, 0),
    "a request before the greeting": frame(Kind.MATCH, 1, pack_asked(16, 0, Purpose.GET)),
    "no JSON": frame(Kind.HELLO, 0, b"{"),
    "deep JSON": frame(Kind.HELLO, 0, b"[" * 60_000),
    "a list": frame(Kind.HELLO, 0, b"[]"),
    "another version": hello(version=99),
    "no layout": hello(layout={}),
    "a layout of another size": hello(layout={"tokens_per_block": -1}),
    "another fingerprint": hello(root="00" * 16),
    "an identity that is none": hello(identity=[1]),
}


@pytest.mark.parametrize("beginning", BAD_BEGINNINGS.values(), ids=BAD_BEGINNINGS.keys())
def test_bad_beginnings(server: Server, beginning: bytes) -> None:
    with connect(path_of(server), 10.0) as peer:
        peer.sendall(beginning)
        assert is_dropped(peer)


def test_clients_of_another_version_are_told_which(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fingerprint({**MODEL.identity, "namespace": "", "layout": repr(MODEL.layout)})
    greeting = Greeting(MODEL, "", root, "of tomorrow")
    words = json.dumps({**json.loads(greeting.pack()), "version": 2}).encode()
    monkeypatch.setattr(Greeting, "pack", lambda self: words)
    with pytest.raises(Refused, match="version 2 of the protocol; this server speaks 1"):
        open_link(path_of(server), greeting, lambda *_: None, lambda _: None)


def test_half_messages_wait_without_harm(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_core.serve.server.GREETING_TIMEOUT_S", 1.0)
    with connect(path_of(server), 10.0) as peer:
        peer.sendall(hello()[:-5])
        assert is_dropped(peer)  # after its time


def test_peers_that_leave_before_they_are_answered(server: Server) -> None:
    """The answer, with its descriptors, finds nobody: neither that nor its session is left, however often it happens."""
    for _ in range(40):  # more than there may be sessions
        with connect(path_of(server), 10.0) as peer:
            peer.sendall(hello())
        wait_until(lambda: len(server._sessions) < 20)
    wait_until(lambda: len(server._sessions) == 1)


def test_peers_that_die_in_the_middle_of_a_message(server: Server) -> None:
    whole = frame(Kind.RESULT, 5, *pack_result(OpResult(5, OpStatus.DONE, np.ones(64, np.bool_))))
    for length in (1, HEADER.size - 1, HEADER.size, HEADER.size + 3, len(whole) - 1):
        with connect(path_of(server), 10.0) as peer:
            fds = greet(peer)
            peer.sendall(whole[:length])
        close(fds)
    wait_until(lambda: len(server._sessions) == 1)


def link_to(server: Server) -> tuple[SharedBlocks, Link]:
    client = client_here(path_of(server))
    assert client._link is not None
    return client, client._link


BAD_REQUESTS = {
    "keys that are not whole": frame(Kind.MATCH, 7, pack_asked(17, 0, Purpose.GET)),
    "more keys than fit in": frame(Kind.GET, 7, pack_asked(1 << 31, 0, Purpose.GET)),
    "a short request": frame(Kind.PUT, 7, b"\0"),
    "no such purpose": frame(Kind.GET, 7, b"\0" * 8 + b"\x09"),
    "a prefetch as a get": frame(Kind.GET, 7, pack_asked(0, 0, Purpose.PREFETCH)),
    "a launch of nothing": frame(Kind.LAUNCH, 12345),
    "a result of nothing": frame(
        Kind.RESULT, 12345, *pack_result(OpResult(12345, OpStatus.DONE, np.ones(4, np.bool_)))
    ),
    "half a result": frame(Kind.RESULT, 12345, b"\0\0"),
    "a second greeting": hello(),
    "what only servers say": frame(Kind.USAGE, 0, b""),
    "too long a frame": HEADER.pack(PAYLOAD_BYTES_MAX + 1, Kind.RESULT, 0, 0),
}


@pytest.mark.parametrize("request_frame", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_bad_requests(server: Server, request_frame: bytes) -> None:
    client, link = link_to(server)
    link._calls.send(request_frame)
    wait_until(lambda: link.is_broken)
    client.shutdown()


def test_starts_beyond_the_keys_find_nothing(server: Server) -> None:
    client, _ = link_to(server)
    keys = chain_keys(client.root, 0)
    for start in (CHAIN_BLOCKS_MAX, CHAIN_BLOCKS_MAX + 1, 1 << 20, 0xFFFFFFFF):
        assert client.get_keys(keys, start, lambda done: None)[1] == 0
        assert client.prefetch_keys(keys, start, lambda done: None)[1] == 0
    assert client.is_ready()
    client.shutdown()


def test_results_that_lie_about_their_length_end_the_connection(server: Server) -> None:
    client, link = link_to(server)
    task, _, count = client.put_keys(chain_keys(client.root, 5), lambda done: None)
    link.tell(Kind.LAUNCH, task)
    link.tell(Kind.RESULT, task, *pack_result(OpResult(task, OpStatus.DONE, np.ones(count + 1, np.bool_))))
    wait_until(lambda: link.is_broken)
    client.shutdown()


def test_random_bytes_after_a_good_greeting(server: Server) -> None:
    rng = random.Random(3)
    for _ in range(15):  # each counts until its second of grace is over
        with connect(path_of(server), 10.0) as peer:
            fds = greet(peer)
            body = rng.randbytes(rng.randrange(64))
            kind = rng.choice([kind for kind in range(16) if kind != Kind.RESET])  # which anybody may ask for
            peer.sendall(HEADER.pack(len(body), kind, 0, rng.getrandbits(64)) + body)
            peer.shutdown(sockets.SHUT_WR)
            assert is_dropped(peer)
            close(fds)


def test_client_that_does_not_read_is_dropped(server: Server) -> None:
    with connect(path_of(server), 10.0) as peer:
        fds = greet(peer)
        peer.settimeout(5.0)
        asked = frame(Kind.MATCH, 1, pack_asked(0, 0, Purpose.GET))

        def flood() -> None:
            for _ in range(1000):
                peer.sendall(asked * 1000)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            flood()
        close(fds)


def test_too_many_clients_are_refused(server: Server) -> None:
    peers = [connect(path_of(server), 10.0) for _ in range(31)]
    assert is_dropped(peers[-1])
    for peer in peers:
        peer.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_other_users_are_refused(server: Server) -> None:
    path = path_of(server)
    code = (
        "import os, socket, sys\n"
        "peer = socket.socket(socket.AF_UNIX)\n"
        "os.setuid(65534)\n"
        "peer.connect(sys.argv[1])\n"
        "print(peer.recv(4096))"
    )
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=30
    )
    assert "PermissionError" in run().stderr  # the socket's mode
    path.chmod(0o666)
    for folder in path.parents:
        if folder.stat().st_uid == 0 and "pytest" in str(folder):
            folder.chmod(0o755)
    assert "may not connect" in run().stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_servers_of_other_users_are_not_believed(tmp_path: Path) -> None:
    for folder in tmp_path.parents:
        if folder.stat().st_uid == 0 and "pytest" in str(folder):
            folder.chmod(0o755)
    tmp_path.chmod(0o777)
    code = (
        "import os, socket, sys\n"
        "listener = socket.socket(socket.AF_UNIX)\n"
        "os.setuid(65534)\n"
        "listener.bind(sys.argv[1]); listener.listen(); print('ready', flush=True); listener.accept()"
    )
    path = tmp_path / "serve.sock"
    impostor = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert impostor.stdout is not None
    assert impostor.stdout.readline() == b"ready\n"
    with pytest.raises(PermissionError, match="belongs to user 65534"):
        connect(path, 5.0)
    impostor.kill()
    impostor.communicate()


def test_socket_and_folder_are_the_users_own(tmp_path: Path) -> None:
    address = Address(tmp_path / "new" / "serve.sock")
    assert stat.S_IMODE(address.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(address.path.parent.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match="a server listens there already"):
        Address(address.path)
    address.close()
    Address(address.path).close()
    os.chmod(tmp_path, 0o777)
    with pytest.raises(ConfigError, match="with mode 777"):
        Address(tmp_path / "serve.sock")
    (tmp_path / "new" / "file").touch()
    with pytest.raises(ConfigError, match="something else"):
        Address(tmp_path / "new" / "file")
    with pytest.raises(ConfigError, match="the system allows"):
        Address(tmp_path / "new" / ("x" * 120))
    with pytest.raises(ConfigError, match="must be absolute"):
        Address(Path("serve.sock"))


def test_segment_cannot_be_cut(server: Server) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(manager_of(server).host.handle.memory.fd, 4096)


def test_silent_connections_are_dropped(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_core.serve.server.GREETING_TIMEOUT_S", 0.1)
    begin = time.monotonic()
    with connect(path_of(server), 10.0) as peer:
        assert is_dropped(peer)
    assert time.monotonic() - begin < 9
