"""Bad stores and bad networks: each costs misses and nothing else, and is over when the fault is."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv_core.cli.harness.proxy import Fault, Proxy, proxy_to
from flexkv_core.cli.harness.server import free_port
from flexkv_core.cli.harness.stores import mooncake_master, redis_server, s3_options, s3_server
from flexkv_core.remote_link import DEFERRED_MAX
from flexkv_core.transfer.supervisor import TICK_S
from tests.stores.sharing import BLOCKS, TOKENS, Engine, wait_until
from tests.tidy.repository import ROOT
from tests.unit.core.device import BLOCK_TOKENS

TIMEOUT_S = 1.0
WAIT_S = 0.3
"""The longest that a request may be held up by a bad store, in each of its two phases."""
QUICK = {
    "remote_timeout_s": TIMEOUT_S,
    "remote_lookup_deadline_ms": 1000 * WAIT_S,
    "remote_read_deadline_ms": 1000 * WAIT_S,
}


def s3_engine(port: int, **settings: Any) -> Engine:
    return Engine("s3://bkt/kv", remote_options=s3_options(port), **{**QUICK, **settings})


def valkey_engine(port: int, **settings: Any) -> Engine:
    return Engine(f"valkey://127.0.0.1:{port}", **{**QUICK, **settings})


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with s3_server(tmp_path_factory.mktemp("s3")) as port:
        yield port


@pytest.fixture(scope="module")
def redis() -> Iterator[int]:
    with redis_server() as port:
        yield port


def fill(make: Callable[..., Engine], port: int, seed: int) -> None:
    """Have the store hold what ``put(seed)`` stores, under keys of this seed."""
    with_patience = {"remote_timeout_s": 10, "remote_lookup_deadline_ms": 20_000}
    engine = make(port, **with_patience)
    engine.put(seed, TOKENS + seed)
    engine.written(BLOCKS)
    engine.close()


def assert_costs_misses_only(engine: Engine, seed: int) -> None:
    """What the store has is not found, nothing waits longer than it may, and the engine stores and loads as ever."""
    keys = engine.keys(TOKENS + seed)
    for _ in range(4):
        started = time.monotonic()
        engine.fetch(keys)
        # Both phases, and what a loaded machine needs to notice.
        assert time.monotonic() - started < 2 * WAIT_S + 2
    assert engine.get(seed, TOKENS + seed) in range(BLOCKS), "what arrived was right, and was not all"
    engine.put(9_000_000, TOKENS + 9_000_000)
    assert engine.get(9_000_000, TOKENS + 9_000_000) == BLOCKS
    engine.manager.blocks.check_integrity()


def assert_recovers(engine: Engine, seed: int) -> None:
    """The fault is over: what the store has is found again, once a probe has found out."""
    keys, tokens = engine.keys(TOKENS + seed), TOKENS + seed

    def is_found() -> bool:
        engine.fetch(keys)
        return engine.get(seed, tokens) == BLOCKS

    wait_until(is_found, 40)


STORE_FAULTS = [
    (s3_engine, Fault.BLACK_HOLE),
    (s3_engine, Fault.ERROR_500),
    (s3_engine, Fault.THROTTLE_503),
    (s3_engine, Fault.EXPIRED_403),
    (s3_engine, Fault.TRUNCATE),
    (s3_engine, Fault.CORRUPT),
    (s3_engine, Fault.DRIP),
    (valkey_engine, Fault.BLACK_HOLE),
    (valkey_engine, Fault.TRUNCATE),
    (valkey_engine, Fault.CORRUPT),
    (valkey_engine, Fault.SLOW),
]


@pytest.mark.parametrize(
    ("make", "fault"),
    STORE_FAULTS,
    ids=[f"{make.__name__[:-7]}-{fault.value}" for make, fault in STORE_FAULTS],
)
def test_a_bad_store_costs_misses(
    make: Callable[..., Engine], fault: Fault, s3: int, redis: int, request: pytest.FixtureRequest
) -> None:
    port = s3 if make is s3_engine else redis
    seed = 1000 * (1 + STORE_FAULTS.index((make, fault)))
    fill(make, port, seed)
    with proxy_to(port, fault) as proxy:
        proxy.delay_s = 2 * WAIT_S
        engine = make(proxy.port)
        assert_costs_misses_only(engine, seed)
        counters = engine.manager.counters()
        bad = counters.remote_failures + counters.remote_late_lookups + counters.remote_late_reads
        assert bad + counters.remote_corrupt_blocks > 0
        proxy.fault = Fault.NONE
        if fault is not Fault.CORRUPT:  # such values were removed
            assert_recovers(engine, seed)
        engine.close()


@pytest.mark.parametrize("make", [s3_engine, valkey_engine], ids=["s3", "valkey"])
def test_nobody_listens_and_then_somebody_does(make: Callable[..., Engine], tmp_path: Path) -> None:
    port = free_port()
    engine = make(port)
    assert_costs_misses_only(engine, 1000)

    def is_left_alone() -> bool:
        engine.fetch(engine.keys(TOKENS + 1000))
        return engine.manager.counters().remote_breaker_openings > 0

    wait_until(is_left_alone, 20)
    if make is valkey_engine:
        with redis_server(port=port):
            fill(make, port, 1000)
            assert_recovers(engine, 1000)
            engine.close()
    else:
        engine.close()


def test_nobody_waits_for_a_slow_store_that_has_nothing_until_it_has(redis: int) -> None:
    seed = 500_000
    fill(valkey_engine, redis, seed)
    with proxy_to(redis, Fault.SLOW) as proxy:
        proxy.delay_s = WAIT_S / 4
        engine = valkey_engine(proxy.port)
        news = iter(range(600_000, 700_000, 1000))
        assert engine.fetch(engine.keys(TOKENS + next(news))), "at first a request waits"
        wait_until(lambda: not engine.fetch(engine.keys(TOKENS + next(news))))
        lookups = engine.manager.counters().remote_lookups
        assert not engine.fetch(engine.keys(TOKENS + seed))
        wait_until(lambda: engine.get(seed, TOKENS + seed) == BLOCKS)
        asked = engine.manager.counters().remote_lookups - lookups
        assert 1 <= asked <= 2, "it was asked all the same, perhaps after the one before, and once"
        assert engine.fetch(engine.keys(TOKENS + next(news))), "it had something, so the next one waits"
        engine.close()


def test_lookups_that_nobody_waits_for_are_sent_later_and_once_and_not_all(redis: int) -> None:
    with proxy_to(redis, Fault.SLOW) as proxy:
        proxy.delay_s = 0.05
        engine = valkey_engine(proxy.port, remote_lookup_deadline_ms=20_000)
        news = iter(range(800_000, 900_000, 1000))
        wait_until(lambda: not engine.fetch(engine.keys(TOKENS + next(news))))
        wanted = [engine.keys(TOKENS + next(news)) for _ in range(DEFERRED_MAX + 8)]
        lookups = engine.manager.counters().remote_lookups
        assert not any(engine.fetch(keys) for keys in wanted + wanted)
        assert engine.manager.counters().remote_lookups < lookups + 5, "the requests themselves send nothing"
        wait_until(lambda: engine.manager.counters().remote_lookups >= lookups + DEFERRED_MAX)
        time.sleep(2 * TICK_S)
        assert engine.manager.counters().remote_lookups < lookups + DEFERRED_MAX + 5
        engine.close()


def test_an_unknown_host() -> None:
    for url, options in (
        ("valkey://no-such-host.invalid:6379", {}),
        ("s3://bkt/kv", {**s3_options(1), "endpoint": "http://no-such-host.invalid:9"}),
        ("mooncake://no-such-host.invalid:50051", {}),
    ):
        engine = Engine(url, remote_options=options, **QUICK)
        assert_costs_misses_only(engine, 1000)
        engine.close()


def test_packets_that_nobody_answers(s3: int) -> None:
    """A host that drops everything: a listener whose queue of connections is full, so that no handshake ends."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        full = [socket.socket() for _ in range(4)]
        for client in full:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        for make in (s3_engine, valkey_engine):
            engine = make(port)
            assert_costs_misses_only(engine, 1000)
            engine.close()
        for client in full:
            client.close()


def test_a_full_store() -> None:
    with redis_server("--maxmemory", "2mb", "--maxmemory-policy", "noeviction") as port:
        engine = valkey_engine(port, remote_lookup_deadline_ms=20_000)
        for seed in range(16):
            engine.put(1000 * seed, TOKENS + 1000 * seed)
        wait_until(lambda: engine.manager.counters().remote_failures > 0)
        assert engine.get(15_000, TOKENS + 15_000) == BLOCKS
        other = valkey_engine(port, remote_lookup_deadline_ms=20_000, remote_read_deadline_ms=20_000)
        assert other.fetch(other.keys(TOKENS))
        assert other.get(0, TOKENS) == BLOCKS, "what found room is served"
        engine.close()
        other.close()


def test_a_wrong_password_and_then_the_right_one(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("wrong")
    with redis_server("--requirepass", "right") as port:
        engine = valkey_engine(port, remote_password_file=str(password))
        assert_costs_misses_only(engine, 1000)
        password.write_text("right")
        engine.put(2000, TOKENS + 2000)
        engine.written(BLOCKS)
        engine.close()


HANGING = """
import time
from file_store import FileStore

class HangingStore(FileStore):
    def read(self, names, values, deadline):
        time.sleep(3600)
"""


def test_a_client_that_hangs_is_ended_with_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call was given slots of host memory: they are not used again before nothing can write to them any more."""
    info = tmp_path / "hanging-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[flexkv.remote_stores]\nhanging = hanging:HangingStore\nfiles = file_store:FileStore\n"
    )
    (tmp_path / "hanging.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'examples'}", prepend=":")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(tmp_path))
    first = Engine(f"files:{tmp_path}/store")
    first.put(100)
    first.written(BLOCKS)
    second = Engine(f"hanging:{tmp_path}/store", **{**QUICK, "remote_timeout_s": 0.5})
    pid, cache = second.link.pid, second.manager.blocks._cache
    second.fetch(second.keys())
    assert cache.used() == BLOCKS, "the slots are kept while the call may write to them"
    assert second.get(100) == 0
    wait_until(lambda: second.link.pid not in (pid, -1))
    wait_until(lambda: cache.used() == 0)
    counters = second.manager.counters()
    assert (counters.remote_restarts, counters.remote_late_reads) == (1, 1)
    first.close()
    second.close()


def test_a_password_is_in_no_command_line_and_in_no_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    password = tmp_path / "password"
    password.write_text("hunter2hunter2")
    with redis_server("--requirepass", "other") as port:
        engine = valkey_engine(port, remote_password_file=str(password))
        assert_costs_misses_only(engine, 1000)
        command_line = Path(f"/proc/{engine.link.pid}/cmdline").read_bytes()
        engine.close()
    said = "".join(capfd.readouterr())
    assert b"valkey:" not in command_line, "nor the URL: it is the user's, and anybody could read it"
    assert b"hunter2" not in command_line
    assert "hunter2" not in said
    assert "remote store valkey:" in said, "what is wrong is said"


def test_the_process_listens_nowhere(redis: int) -> None:
    import psutil

    engine = valkey_engine(redis)
    engine.fetch(engine.keys())
    connections = psutil.Process(engine.link.pid).net_connections("inet")
    assert connections
    assert not [c for c in connections if c.status == psutil.CONN_LISTEN]
    engine.close()


def test_a_server_that_hangs_and_goes_on(redis: int) -> None:
    with redis_server() as port:
        pid = _listener(port)
        fill(valkey_engine, port, 3000)
        engine = valkey_engine(port)
        os.kill(pid, signal.SIGSTOP)
        assert_costs_misses_only(engine, 3000)
        os.kill(pid, signal.SIGCONT)
        assert_recovers(engine, 3000)
        engine.close()


def test_mooncake_without_its_master(capfd: pytest.CaptureFixture[str]) -> None:
    options = {"segment_bytes": str(64 << 20)}
    with mooncake_master() as port:
        url = f"mooncake://127.0.0.1:{port}"
        patient = {"remote_lookup_deadline_ms": 20_000, "remote_read_deadline_ms": 20_000}
        first = Engine(url, remote_options=options, remote_timeout_s=5, **patient)
        first.put(100)
        first.written(BLOCKS)
        second = Engine(url, remote_options={"segment_bytes": "0"}, **QUICK)
        wait_until(lambda: second.fetch(second.keys()) and second.get(100) == BLOCKS, 30)
    assert_costs_misses_only(second, 5000)
    second.close()
    first.close()


def _listener(port: int) -> int:
    """The process that listens on the port."""
    import psutil

    for connection in psutil.net_connections("tcp"):
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN and connection.pid:
            return connection.pid
    raise AssertionError(f"nobody listens on {port}")


def test_the_proxy_lets_through_what_it_should(redis: int) -> None:
    """The other tests mean something: without a fault, what passes the proxy is found."""
    fill(valkey_engine, redis, 500_000)
    with proxy_to(redis) as proxy:
        engine = valkey_engine(proxy.port, remote_lookup_deadline_ms=20_000, remote_read_deadline_ms=20_000)
        assert engine.fetch(engine.keys(TOKENS + 500_000))
        assert engine.get(500_000, TOKENS + 500_000) == BLOCKS
        assert isinstance(proxy, Proxy)
        assert proxy.connections > 0
        assert BLOCK_TOKENS
        engine.close()
