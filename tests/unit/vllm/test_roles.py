"""Prefill and decode apart, at the connector's interface: who loads, who stores, and what each leaves in the store between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.integration.serving import wait_until
from tests.unit.vllm.test_tensor_parallel import (
    BLOCK_TOKENS,
    GOT,
    PROMPT,
    PUT,
    PlayedEngine,
    leave,
    make_request,
)

RANKS = 2
FOUND = (PROMPT - 1) // BLOCK_TOKENS * BLOCK_TOKENS
STORED = PROMPT // BLOCK_TOKENS


@contextmanager
def engine(role: str, folder: Path, **settings: object) -> Iterator[PlayedEngine]:
    made = PlayedEngine(
        RANKS,
        role,
        remote_url=f"dir:{folder}/store",
        remote_read_tokens_min=BLOCK_TOKENS,
        remote_lookup_deadline_ms=20_000,
        remote_read_deadline_ms=20_000,
        **settings,
    )
    try:
        wait_until(lambda: made.scheduler.manager._remote.pid > 0)  # type: ignore[union-attr]
        yield made
    finally:
        made.close()


def files_below(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_producer_and_a_consumer(tmp_path: Path) -> None:
    with engine("kv_producer", tmp_path) as producer:
        first = make_request("first", PROMPT)
        producer.put(first, PUT)
        leave(producer, first)
        wait_until(lambda: producer.scheduler.manager.counters().remote_written_blocks == STORED)
        again = make_request("again", PROMPT)
        producer.scheduler.arrived(again)
        assert producer.scheduler.matched_tokens(again, 0) == (0, False), "it loads nothing, not even its own"
        wanted = [producer.bytes_of(rank, PUT) for rank in range(RANKS)]
    written = files_below(tmp_path)
    assert len(written) > 0
    # With nothing remembered of what the store has, an engine that uses a block would offer it to the store again.
    with engine("kv_consumer", tmp_path, remote_known_s=0) as consumer:
        second = make_request("second", PROMPT)
        consumer.scheduler.arrived(second)
        wait_until(lambda: consumer.scheduler.matched_tokens(second, 0) == (FOUND, True))
        assert consumer.load(second, GOT, FOUND) == [set()] * RANKS
        for rank in range(RANKS):
            assert torch.equal(consumer.bytes_of(rank, GOT), wanted[rank])
        leave(consumer, second)
        own = make_request("own", PROMPT)
        own.all_token_ids = [token + 1000 for token in own.all_token_ids]
        wait_until(lambda: consumer.scheduler.matched_tokens(own, 0) == (0, False))
        consumer.put(own, PUT)
        leave(consumer, own)
        counters = consumer.scheduler.manager.counters()
        assert (counters.stored_blocks, counters.remote_written_blocks) == (0, 0)
    assert files_below(tmp_path) == written


def test_a_consumer_waits_for_what_its_producer_is_writing(tmp_path: Path) -> None:
    with (
        engine("kv_producer", tmp_path) as producer,
        engine("kv_consumer", tmp_path, remote_wait_ms=10_000) as consumer,
    ):
        second = make_request("second", PROMPT)
        consumer.scheduler.arrived(second)
        assert consumer.scheduler.matched_tokens(second, 0) == (None, False)
        first = make_request("first", PROMPT)
        producer.put(first, PUT)
        wait_until(lambda: consumer.scheduler.matched_tokens(second, 0) == (FOUND, True), 9)
        assert consumer.load(second, GOT, FOUND) == [set()] * RANKS
        assert torch.equal(consumer.bytes_of(0, GOT), producer.bytes_of(0, PUT))
