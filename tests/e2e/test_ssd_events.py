"""KV events of the SSD tier. A file of its own: one engine at a time may be alive in a process, and that of test_events.py lives as
long as its module."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import zmq
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, KVEventBatch

from flexkv_core.types import Tier
from tests.e2e.engine import Engine, prompt_tokens

HOST_BLOCKS = 24
BLOCK_BYTES = 2 * 65536  # two layers of the tiny Llama, 64 tokens


def view_of(replay: zmq.Socket[bytes]) -> dict[str, set[bytes]]:
    """What all that was published until now says of each medium."""
    replay.send_multipart([b"", (0).to_bytes(8, "big")])
    view: dict[str, set[bytes]] = {"CPU": set(), "STORAGE": set()}
    while payload := replay.recv_multipart()[-1]:
        for event in msgspec.msgpack.decode(payload, type=KVEventBatch).events:
            assert not isinstance(event, AllBlocksCleared)
            if event.medium == "GPU":
                continue
            names = {bytes(name) for name in event.block_hashes}
            if isinstance(event, BlockRemoved):
                assert view[event.medium] >= names
                view[event.medium] -= names
                continue
            assert event.medium == "CPU" or event.parent_block_hash in {None, *view["STORAGE"]}
            assert not view[event.medium] & names
            view[event.medium] |= names
    return view


def test_the_ssd_is_told_of_and_so_is_what_a_restart_finds(llama: Path, tmp_path: Path) -> None:
    endpoints = [f"ipc://{tmp_path}/{name}" for name in ("events", "replay")]
    events = KVEventsConfig(
        enable_kv_cache_events=True, publisher="zmq", endpoint=endpoints[0], replay_endpoint=endpoints[1]
    )
    config: dict[str, object] = {
        "host_bytes": (2 << 20) + HOST_BLOCKS * (BLOCK_BYTES + 16),
        "ssd_dirs": [str(tmp_path / "ssd")],
        "ssd_bytes": "32MiB",
    }
    on_ssd = []
    for seeds in (range(30, 36), range(30, 31)):
        with zmq.Context() as context, context.socket(zmq.DEALER) as replay:
            replay.setsockopt(zmq.RCVTIMEO, 20_000)
            replay.connect(endpoints[1])
            with Engine(llama, config, {"kv_events_config": events}) as engine:
                used = engine.manager._cache.used
                for seed in seeds:
                    engine.ask(prompt_tokens(seed, 6 * engine.block_tokens + 5))
                deadline = time.monotonic() + 30
                while True:
                    engine.ask(prompt_tokens(99, 7))  # its step carries what happened
                    view = view_of(replay)
                    sizes = len(view["CPU"]), len(view["STORAGE"])
                    if sizes == (used(Tier.HOST), 36) and used(Tier.SSD) == 36:
                        break
                    assert time.monotonic() < deadline, (sizes, used(Tier.HOST), used(Tier.SSD))
                on_ssd.append(view["STORAGE"])
    assert on_ssd[0] == on_ssd[1]
