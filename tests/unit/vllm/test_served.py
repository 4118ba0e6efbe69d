"""The connector on a ``flexkv serve``: two played engines share, and one lives through the death of its server at every moment."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.serving import DEADLINE_MS, ServerProcess, wait_until
from tests.unit.vllm.test_tensor_parallel import (
    BLOCK_TOKENS,
    GOT,
    PROMPT,
    PUT,
    PlayedEngine,
    _taken,
    leave,
    make_request,
)

RANKS = 2
FOUND = 5 * BLOCK_TOKENS


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "serve.sock", slots=500) as running:
        yield running


@pytest.fixture
def engine(server: ServerProcess) -> Iterator[PlayedEngine]:
    engine = engine_on(server)
    yield engine
    engine.close()


def engine_on(server: ServerProcess) -> PlayedEngine:
    """No checksum is checked on the way back: nothing else may keep a slot's number from meeting another segment."""
    return PlayedEngine(
        RANKS, server=str(server._socket), server_deadline_ms=DEADLINE_MS, verify_checksums=False
    )


def restart(server: ServerProcess, engine: PlayedEngine) -> None:
    """The engine has turned to the new server when this returns."""
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not engine.scheduler.manager.is_ready())
    server.start()
    wait_until(lambda: engine.scheduler.manager.match_keys(b"") == 0 and engine.scheduler.manager.is_ready())


def put(engine: PlayedEngine, name: str) -> None:
    request = make_request(name, PROMPT)
    engine.put(request, PUT)
    leave(engine, request)


def assert_found(engine: PlayedEngine, name: str, stored_by: PlayedEngine) -> None:
    request = make_request(name, PROMPT)
    assert engine.scheduler.matched_tokens(request, 0) == (FOUND, True)
    assert engine.load(request, GOT, FOUND) == [set()] * RANKS
    for rank in range(RANKS):
        assert torch.equal(engine.bytes_of(rank, GOT), stored_by.bytes_of(rank, PUT))


def test_engines_share_and_a_new_server_serves_the_old_engine(
    server: ServerProcess, engine: PlayedEngine
) -> None:
    put(engine, "first")
    other = engine_on(server)
    assert_found(other, "second", stored_by=engine)
    other.close()
    restart(server, engine)
    assert engine.scheduler.matched_tokens(make_request("third", PROMPT), 0) == (0, False)
    put(engine, "fourth")  # into another segment, which the workers map instead
    assert_found(engine, "fifth", stored_by=engine)


def test_store_that_was_not_answered_in_time_is_asked_for_at_the_end(
    server: ServerProcess, engine: PlayedEngine
) -> None:
    request = make_request("first", PROMPT)
    server.process.send_signal(signal.SIGSTOP)
    engine.put(request, PUT)  # nothing is stored, and nobody waits for longer than the deadline
    server.process.send_signal(signal.SIGCONT)
    wait_until(lambda: engine.scheduler.manager.match_keys(b"") == 0 and not is_suspended(engine))
    request.num_computed_tokens = PROMPT
    assert engine.scheduler.finished(request, [PUT])
    wait_until(lambda: any("first" in released for (released, _), _ in engine.step()))
    assert_found(engine, "second", stored_by=engine)


def is_suspended(engine: PlayedEngine) -> bool:
    """Whether the server owes an answer still."""
    return engine.scheduler.manager._link._awaited is not None  # type: ignore[union-attr]


def test_server_dies_between_the_promise_and_the_load(server: ServerProcess, engine: PlayedEngine) -> None:
    put(engine, "first")
    request = make_request("second", PROMPT)
    assert engine.scheduler.matched_tokens(request, 0) == (FOUND, True)
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not engine.scheduler.manager.is_ready())
    assert engine.load(request, GOT, FOUND) == [set(GOT)] * RANKS  # reported, so that they are computed


def test_server_is_another_before_a_worker_hears_of_the_load(
    server: ServerProcess, engine: PlayedEngine
) -> None:
    """The load names slots of a segment that nobody will map any more. It must not meet the new one."""
    put(engine, "first")
    request = make_request("second", PROMPT)
    assert engine.scheduler.matched_tokens(request, 0) == (FOUND, True)
    engine.scheduler.allocated(request, _taken(GOT), FOUND)
    restart(server, engine)
    told = engine.step()
    assert [(loaded, failed) for (_, loaded), failed in told] == [({"second"}, set(GOT))] * RANKS


def test_store_under_way_when_the_server_dies(server: ServerProcess, engine: PlayedEngine) -> None:
    request = make_request("first", PROMPT)
    engine.compute(PUT)
    assert engine.scheduler.matched_tokens(request, 0) == (0, False)
    engine.scheduler.allocated(request, _taken(PUT), 0)
    engine.step(request, PUT, PROMPT)
    restart(server, engine)
    wait_until(lambda: engine.step() is not None and not engine.scheduler._requests["first"].stores)
    leave(engine, request)
    put(engine, "second")
    assert_found(engine, "third", stored_by=engine)
