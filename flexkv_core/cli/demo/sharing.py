"""``python -m flexkv_core.cli.demo.sharing``; ``scripts/sharing`` runs it. Two vLLM servers over one store, for each kind of store.

Each server has host memory and an SSD tier of its own, and a network namespace of its own where that can be made. The first answers a
question about a long document, and writes what it computed to the store; the second has never seen it and answers from the store. The
last line is one JSON object; the status is 0 only if each second answer is the first's, token for token, and came from the store.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.client import VllmClient
from flexkv_core.cli.harness.document import make_document, prompt_text
from flexkv_core.cli.harness.namespace import BRIDGE_ADDRESS, Machine, machines
from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, VllmServer
from flexkv_core.cli.harness.stores import LOOPBACK, mooncake_master, redis_server, s3_options, s3_server

BLOCK_TOKENS = 64
ANSWER_TOKENS = 16
WRITE_TIMEOUT_S = 60.0
STORES = ("directory", "s3", "valkey", "mooncake")


@dataclass(frozen=True)
class _Tier:
    """``remote_url`` and ``remote_options``, which differ by server for Mooncake."""

    url: str
    options: dict[str, str]


def sharing(
    stores: Annotated[
        str, typer.Option(help=f"Which, separated by commas, of {', '.join(STORES)}.")
    ] = "s3,valkey,mooncake",
    roles: Annotated[
        bool,
        typer.Option(
            "--roles", help="Disaggregated: the first server is a kv_producer, the second a kv_consumer."
        ),
    ] = False,
    lights: Annotated[int, typer.Option(min=1, max=48, help="Length of the document, 72 tokens each.")] = 24,
) -> None:
    """See the module's text."""
    # As an exception, so that servers and namespaces are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results: dict[str, Any] = {"roles": roles}
    with machines(2) as namespaces:
        results["network_namespaces"] = namespaces is not None
        places = namespaces or [Machine(LOOPBACK), Machine(LOOPBACK)]
        host = BRIDGE_ADDRESS if namespaces else LOOPBACK
        for name in stores.split(","):
            with tempfile.TemporaryDirectory(prefix="flexkv-sharing-") as folder:
                results[name] = _share(name, Path(folder), host, places, roles, lights)
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    print(json.dumps(results))
    if not all(results[name]["identical"] and results[name]["from_store"] for name in stores.split(",")):
        sys.exit(1)


def _share(
    store: str, folder: Path, host: str, places: list[Machine], roles: bool, lights: int
) -> dict[str, Any]:
    kinds = ("kv_producer", "kv_consumer") if roles else ("kv_both", "kv_both")
    with contextlib.ExitStack() as stack:
        tiers = stack.enter_context(_store(store, folder, host, places))
        clients = []
        for index, (tier, place, role) in enumerate(zip(tiers, places, kinds, strict=True)):
            server = _server(folder, index, tier, place, role)
            stack.enter_context(server)
            clients.append(stack.enter_context(VllmClient(server.base_url)))
        return _compare(clients[0], clients[1], lights)


def _compare(first: VllmClient, second: VllmClient, lights: int) -> dict[str, Any]:
    for client in (first, second):  # the first request of a server is slower than all others
        client.complete(client.tokenize(prompt_text(make_document(1, lights), 0)), ANSWER_TOKENS)
    prompt = first.tokenize(prompt_text(make_document(2, lights), 0))
    blocks = (len(prompt) - 1) // BLOCK_TOKENS
    before = first.metrics().total("vllm:flexkv_remote_written_blocks_total")
    computed = first.complete(prompt, ANSWER_TOKENS, logprobs=True)
    deadline = time.monotonic() + WRITE_TIMEOUT_S
    while first.metrics().total("vllm:flexkv_remote_written_blocks_total") < before + blocks:
        assert time.monotonic() < deadline, "the first server has not written its blocks"
        time.sleep(0.1)
    shared = second.complete(prompt, ANSWER_TOKENS, logprobs=True)
    return {
        "prompt_tokens": len(prompt),
        "hit_tokens": shared.cached_tokens,
        "ttft_recompute_ms": round(computed.ttft_ms, 1),
        "ttft_store_ms": round(shared.ttft_ms, 1),
        "identical": shared.token_ids == computed.token_ids,
        "from_store": shared.cached_tokens >= blocks * BLOCK_TOKENS,
    }


def _server(folder: Path, index: int, tier: _Tier, place: Machine, role: str) -> VllmServer:
    ssd = folder / f"ssd{index}"
    ssd.mkdir()
    config = {
        "host_bytes": "512MiB",
        "ssd_dirs": [str(ssd)],
        "ssd_bytes": "512MiB",
        "remote_url": tier.url,
        "remote_options": tier.options,
        "remote_lookup_deadline_ms": 1000,
        "remote_read_deadline_ms": 10_000,
    }
    transfer = {"kv_connector": "FlexKVConnector", "kv_role": role, "kv_connector_extra_config": config}
    return VllmServer(
        ensure_demo_model(),
        [*CPU_ARGUMENTS, "--kv-transfer-config", json.dumps(transfer)],
        CPU_ENVIRONMENT,
        folder / f"server{index}.log",
        host=place.address,
        prefix=place.prefix,
    )


@contextlib.contextmanager
def _store(name: str, folder: Path, host: str, places: list[Machine]) -> Iterator[list[_Tier]]:
    """The store's server, and how each of the two reaches it."""
    if name == "directory":
        yield [_Tier(f"dir:{folder}/store", {})] * 2
    elif name == "s3":
        with s3_server(folder / "s3", host) as port:
            yield [_Tier("s3://bkt/kv", s3_options(port, host))] * 2
    elif name == "valkey":
        with redis_server("--protected-mode", "no", host=host) as port:
            yield [_Tier(f"valkey://{host}:{port}", {})] * 2
    elif name == "mooncake":
        with mooncake_master(host) as port:
            lent = ("1073741824", "0")  # the first server's memory holds the values
            yield [
                _Tier(f"mooncake://{host}:{port}", {"hostname": place.address, "segment_bytes": segment})
                for place, segment in zip(places, lent, strict=True)
            ]
    else:
        raise typer.BadParameter(f"{name!r}: no such store; known are {', '.join(STORES)}")


if __name__ == "__main__":
    typer.run(sharing)
