"""KV events: what FlexKV stores and lets go of is published by vLLM, with the medium, and can be replayed into an index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from tests.e2e.engine import Engine, prompt_tokens

HOST_BLOCKS = 24
BLOCK_BYTES = 2 * 65536  # two layers of the tiny Llama, 64 tokens


@pytest.fixture(scope="module")
def subscriber() -> Iterator[zmq.Socket[bytes]]:
    """Bound here: vLLM's publisher connects to an endpoint that names a host."""
    with zmq.Context() as context, context.socket(zmq.SUB) as subscribed:
        subscribed.subscribe(b"")
        subscribed.bind_to_random_port("tcp://127.0.0.1")
        yield subscribed


@pytest.fixture(scope="module")
def engine(llama: Path, subscriber: zmq.Socket[bytes]) -> Iterator[Engine]:
    """Room for 24 blocks only, so that some leave."""
    endpoint = subscriber.last_endpoint.decode()
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint)
    config = {"host_bytes": (2 << 20) + HOST_BLOCKS * (BLOCK_BYTES + 16)}
    with Engine(llama, config, {"kv_events_config": events}) as running:
        yield running


def events_of(
    subscribed: zmq.Socket[bytes], *media: str
) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
    """Events about these media that arrive until nothing has come for a while."""
    found = []
    while subscribed.poll(400):
        _, _, payload = subscribed.recv_multipart()
        for event in msgspec.msgpack.decode(payload, type=KVEventBatch).events:
            if isinstance(event, AllBlocksCleared) or event.medium in media:
                found.append(event)
    return found


def test_events_replayed_give_what_is_cached(engine: Engine, subscriber: zmq.Socket[bytes]) -> None:
    size = engine.block_tokens
    engine.ask(prompt_tokens(1, 2 * size))  # the subscription is up once something has come
    events_of(subscriber, "CPU")
    engine.reset(external=True)
    engine.ask(prompt_tokens(2, 7))  # events go out with a step's output
    cleared = events_of(subscriber, "CPU")
    assert any(isinstance(event, AllBlocksCleared) for event in cleared)

    index: dict[bytes, bytes | None] = {}
    removed = 0
    for seed in range(10, 15):
        prompt = prompt_tokens(seed, 6 * size + 5)
        engine.ask(prompt)
        engine.ask(prompt_tokens(seed, 7))  # its step carries what the store before it reported
        for event in events_of(subscriber, "CPU"):
            if isinstance(event, BlockStored):
                assert event.block_size == size
                assert len(event.token_ids) == size * len(event.block_hashes)
                assert (
                    list(event.token_ids) == prompt[: len(event.token_ids)]
                    or event.parent_block_hash in index
                )
                parent = event.parent_block_hash
                for name in event.block_hashes:
                    index[bytes(name)] = parent
                    parent = name
            elif isinstance(event, BlockRemoved):
                removed += len(event.block_hashes)
                for name in event.block_hashes:
                    del index[bytes(name)]
    assert removed > 0
    assert len(index) == engine.manager.usage()[0]
