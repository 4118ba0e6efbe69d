"""What any remote store owes, on every store, each with its real server."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import valkey

from flexkv_core.cli.harness.server import free_port
from flexkv_core.cli.harness.stores import mooncake_master, redis_server, s3_options, s3_server
from flexkv_core.storage.base import BlockStatus
from flexkv_core.storage.remote import open_store
from flexkv_core.storage.remote.base import RemoteSpec, RemoteStore, Value
from tests.contract.storage.rig import LAYOUT
from tests.tidy.repository import ROOT

OK, CORRUPT, IO_ERROR, DROPPED = BlockStatus
HEADER, PAYLOAD, COUNT = 56, 20_000, 40


class Rig:
    """A store, and memory whose first half is written from and whose second is read into."""

    def __init__(self, make: Callable[[RemoteSpec, list[np.ndarray]], RemoteStore], spec: RemoteSpec) -> None:
        self.headers = np.zeros((2 * COUNT, HEADER), np.uint8)
        self.payloads = np.zeros((2 * COUNT, PAYLOAD), np.uint8)
        self.store = make(spec, [self.headers.reshape(-1), self.payloads.reshape(-1)])

    def values(self, start: int, count: int) -> list[Value]:
        return [Value(self.headers[i], self.payloads[i]) for i in range(start, start + count)]

    def fill(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.headers[:COUNT] = random.integers(0, 256, (COUNT, HEADER))
        self.payloads[:COUNT] = random.integers(0, 256, (COUNT, PAYLOAD))
        self.headers[COUNT:] = self.payloads[COUNT:] = 0

    def same(self, index: int) -> bool:
        mine, theirs = index, COUNT + index
        same = (self.headers[mine] == self.headers[theirs]).all()
        return bool(same and (self.payloads[mine] == self.payloads[theirs]).all())


@contextlib.contextmanager
def dir_store(folder: Path) -> Iterator[RemoteSpec]:
    yield RemoteSpec(f"dir:{folder}/store", "p", LAYOUT)


@contextlib.contextmanager
def memory_store(folder: Path) -> Iterator[RemoteSpec]:
    yield RemoteSpec("memory:", "p", LAYOUT)


@contextlib.contextmanager
def s3_store(folder: Path) -> Iterator[RemoteSpec]:
    with s3_server(folder / "s3") as port:
        yield RemoteSpec("s3://bkt/some/where", "p", LAYOUT, s3_options(port))


@contextlib.contextmanager
def valkey_store(folder: Path) -> Iterator[RemoteSpec]:
    password = folder / "password"
    password.write_text("open sesame\n")
    with redis_server("--requirepass", "open sesame") as port:
        yield RemoteSpec(f"valkey://127.0.0.1:{port}/1", "p", LAYOUT, password_file=str(password))


@contextlib.contextmanager
def tls_store(folder: Path) -> Iterator[RemoteSpec]:
    """Over TLS; the server's certificate is checked against an authority of our own."""
    key, certificate, port = str(folder / "key.pem"), str(folder / "certificate.pem"), free_port()
    request = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*request, "-keyout", key, "-out", certificate, *names], check=True, capture_output=True)
    tls = ["--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key]
    with redis_server("--port", "0", *tls, "--tls-auth-clients", "no", port=port):
        yield RemoteSpec(f"valkeys://127.0.0.1:{port}", "p", LAYOUT, {"ssl_ca_certs": certificate})


@contextlib.contextmanager
def cluster_store(folder: Path) -> Iterator[RemoteSpec]:
    """Two nodes of a cluster; the URL names one."""
    options = ("--cluster-enabled", "yes", "--cluster-port", "{}", "--dir")
    for node in ("a", "b"):
        (folder / node).mkdir()
    first, second = ([*options, str(folder / node)] for node in ("a", "b"))
    first[3], second[3] = str(free_port()), str(free_port())
    with redis_server(*first) as a, redis_server(*second) as b:
        form_cluster([(a, int(first[3])), (b, int(second[3]))])
        yield RemoteSpec(f"valkey://127.0.0.1:{a}", "p", LAYOUT, {"cluster": "true"})


def form_cluster(ports: list[tuple[int, int]]) -> None:
    """``ports``: of each node, its clients' and the cluster's own."""
    nodes = [valkey.Valkey(port=port) for port, _ in ports]
    bounds = np.linspace(0, 16_384, len(ports) + 1).astype(int).tolist()
    for node, (start, stop) in zip(nodes, itertools.pairwise(bounds), strict=True):
        node.execute_command("CLUSTER", "ADDSLOTSRANGE", start, stop - 1)
        node.execute_command("CLUSTER", "MEET", "127.0.0.1", *ports[0])
    deadline = time.monotonic() + 20
    while any(node.cluster("info")["cluster_state"] != "ok" for node in nodes):
        assert time.monotonic() < deadline, nodes[0].cluster("info")
        time.sleep(0.05)


@contextlib.contextmanager
def mooncake_store(folder: Path) -> Iterator[RemoteSpec]:
    with mooncake_master() as port:
        yield RemoteSpec(f"mooncake://127.0.0.1:{port}", "p", LAYOUT, {"segment_bytes": str(64 << 20)})


@contextlib.contextmanager
def example_store(folder: Path) -> Iterator[RemoteSpec]:
    """The example, installed as a distribution of its own makes itself known."""
    installed = folder / "file_store-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: file-store\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[flexkv.remote_stores]\nfiles = file_store:FileStore\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        patch.syspath_prepend(str(folder))
        yield RemoteSpec(f"files:{folder}/store", "p", LAYOUT)


STORES = {
    s.__name__: s
    for s in (
        example_store,
        dir_store,
        memory_store,
        s3_store,
        valkey_store,
        tls_store,
        cluster_store,
        mooncake_store,
    )
}


@pytest.fixture(params=STORES, scope="module")
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with STORES[request.param](tmp_path_factory.mktemp("store")) as spec:
        rig = Rig(open_store, spec)
        yield rig
        rig.store.close()


def names(test: str, count: int = COUNT) -> list[str]:
    return [f"p/{test}/{i:032x}" for i in range(count)]


def soon() -> float:
    return time.monotonic() + 20


def test_what_is_written_is_read(rig: Rig) -> None:
    rig.fill(1)
    wanted = names("read")
    assert (rig.store.exists(wanted[: rig.store.probes_max], soon()) == DROPPED).all()
    assert (rig.store.write(wanted, rig.values(0, COUNT), soon()) == OK).all()
    assert (rig.store.exists(wanted[: rig.store.probes_max], soon()) == OK).all()
    assert (rig.store.read(wanted, rig.values(COUNT, COUNT), soon()) == OK).all()
    assert all(rig.same(i) for i in range(COUNT))


class Heard:
    """Checks of a value, which compares what is said to have arrived with what was written, at once."""

    def __init__(self, rig: Rig, index: int) -> None:
        self.wanted, self.found = rig.payloads[index], rig.payloads[COUNT + index]
        self.at = 0

    def arrived(self, count: int) -> None:
        here = slice(self.at, self.at + count)
        assert count > 0
        assert (self.found[here] == self.wanted[here]).all()
        self.at += count

    def land(self, payload: np.ndarray) -> None:
        assert not self.at
        self.found[:] = payload
        self.arrived(len(payload))


def test_what_is_said_to_have_arrived_is_there(rig: Rig) -> None:
    rig.fill(5)
    wanted, heard = names("arrived"), [Heard(rig, index) for index in range(COUNT)]
    assert (rig.store.write(wanted, rig.values(0, COUNT), soon()) == OK).all()
    places = [
        Value(*value[:2], checks) for value, checks in zip(rig.values(COUNT, COUNT), heard, strict=True)
    ]
    assert (rig.store.read(wanted, places, soon()) == OK).all()
    assert {checks.at for checks in heard} <= {0, PAYLOAD}, "all or nothing"


def test_what_is_missing_is_told_apart(rig: Rig) -> None:
    rig.fill(2)
    wanted = names("missing", 8)
    assert (rig.store.write(wanted[::2], rig.values(0, 8)[::2], soon()) == OK).all()
    assert rig.store.exists(wanted, soon()).tolist() == [OK, DROPPED] * 4
    assert rig.store.read(wanted, rig.values(COUNT, 8), soon()).tolist() == [OK, DROPPED] * 4
    assert all(rig.same(i) for i in range(0, 8, 2))


def test_another_length_is_no_value(rig: Rig) -> None:
    rig.fill(3)
    short = [Value(value.header, value.payload[:-7]) for value in rig.values(0, 2)]
    wanted = names("length", 4)
    assert (rig.store.write(wanted[:2], short, soon()) == OK).all()
    assert (rig.store.write(wanted[2:], rig.values(2, 2), soon()) == OK).all()
    found = rig.store.read(wanted[:2], rig.values(COUNT, 2), soon())
    assert (found == CORRUPT).all()
    less = [Value(value.header, value.payload[:-7]) for value in rig.values(COUNT, 2)]
    assert (rig.store.read(wanted[2:], less, soon()) == CORRUPT).all()


def test_what_is_deleted_is_missing(rig: Rig) -> None:
    rig.fill(4)
    wanted = names("delete", 4)
    rig.store.write(wanted[:3], rig.values(0, 3), soon())
    rig.store.delete(wanted[1:], soon())
    assert rig.store.exists(wanted, soon()).tolist() == [OK, DROPPED, DROPPED, DROPPED]
    rig.store.write(wanted[1:2], rig.values(5, 1), soon())
    assert rig.store.read(wanted[1:2], rig.values(COUNT + 5, 1), soon()).tolist() == [OK]
    assert rig.same(5), "a deleted value may be written anew"


def test_a_late_call_answers_all_the_same(rig: Rig) -> None:
    late = time.monotonic() - 1
    for statuses in (
        rig.store.read(names("late", 4), rig.values(COUNT, 4), late),
        rig.store.write(names("late", 4), rig.values(0, 4), late),
    ):
        assert len(statuses) == 4
        assert set(statuses.tolist()) <= {OK, IO_ERROR, DROPPED}


def test_values_expire_where_that_is_asked_for(tmp_path: Path) -> None:
    with redis_server() as port:
        client = valkey.Valkey(port=port)
        for options, lifetimes in (({"expire_s": "100"}, range(50, 101)), ({}, [-1])):
            rig = Rig(open_store, RemoteSpec(f"valkey://127.0.0.1:{port}", "p", LAYOUT, options))
            rig.fill(6)
            assert rig.store.write(["p/expires"], rig.values(0, 1), soon()).tolist() == [OK]
            assert rig.store.read(["p/expires"], rig.values(COUNT, 1), soon()).tolist() == [OK]
            assert rig.same(0)
            assert client.ttl("p/expires") in lifetimes
            rig.store.close()


def test_a_server_that_cannot_prove_who_it_is_is_not_spoken_to(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with tls_store(tmp_path / "a") as spec, tls_store(tmp_path / "b") as other:
        store = open_store(replace(spec, options=other.options), [])
        assert (store.exists(["p/x"], soon()) == IO_ERROR).all()
        store.close()


def test_nothing_is_a_batch(rig: Rig) -> None:
    assert len(rig.store.read([], [], soon())) == len(rig.store.write([], [], soon())) == 0
    rig.store.delete([], soon())
