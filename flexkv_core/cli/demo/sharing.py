"""``python -m flexkv_core.cli.demo.sharing``; ``scripts/sharing`` runs it. Two vLLM servers over one store, for each kind of store.

Each server has host memory and an SSD tier of its own, and a network namespace of its own where that can be made. The first answers
questions about long documents, and writes what it computed to the store; the second has never seen them and answers from the store. The
last line is one JSON object; the status is 0 only if each second answer is the first's, token for token, came from the store, and was there
sooner than the first one.
"""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.table import Table

from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.client import VllmClient
from flexkv_core.cli.harness.document import make_document, prompt_text
from flexkv_core.cli.harness.namespace import BRIDGE_ADDRESS, Machine, machines
from flexkv_core.cli.harness.server import (
    CPU_ARGUMENTS,
    CPU_ENVIRONMENT,
    ServerError,
    VllmServer,
    transfer_config,
)
from flexkv_core.cli.harness.stores import LOOPBACK, mooncake_master, redis_server, s3_options, s3_server

BLOCK_TOKENS = 64
ANSWER_TOKENS = 16
WRITE_TIMEOUT_S = 60.0
SETTLED_S = 1.0
"""A server that has written nothing for so long has written what it had to."""
MOONCAKE_LEASE_MS = 5000
"""Mooncake's default. With the 100 of the tests, reads of some MiB failed on cores that engines keep busy."""
STORES = ("directory", "s3", "valkey", "mooncake")
_WRITTEN = "vllm:flexkv_remote_written_blocks_total"

Say = Callable[[str], None]


class _TakesTooLongError(RuntimeError):
    """A store's time is over."""


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
            "--roles",
            help="Disaggregated: a kv_producer and a kv_consumer, which is asked as soon as the first has answered.",
        ),
    ] = False,
    lights: Annotated[int, typer.Option(min=1, max=48, help="Length of a document, 72 tokens each.")] = 24,
    documents: Annotated[
        int, typer.Option(min=1, max=20, help="How many questions each server is asked.")
    ] = 3,
    store_timeout_s: Annotated[
        int, typer.Option(min=1, help="What takes longer for one store is given up.")
    ] = 330,
) -> None:
    """See the module's text."""
    names = stores.split(",")
    if unknown := set(names) - set(STORES):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}: no such store; known are {', '.join(STORES)}"
        )
    # As exceptions, so that servers and namespaces are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGALRM, _give_up)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    results: dict[str, Any] = {"roles": roles}
    with machines(2) as namespaces:
        results["network_namespaces"] = namespaces is not None
        places = namespaces or [Machine(LOOPBACK), Machine(LOOPBACK)]
        host = BRIDGE_ADDRESS if namespaces else LOOPBACK
        for name in names:
            signal.alarm(store_timeout_s)
            results[name] = _try_store(name, host, places, _Course(roles, lights, documents, say))
            signal.alarm(0)
            say(f"{name}: {json.dumps(results[name])}")
    _print_table({name: results[name] for name in names})
    print(json.dumps(results), flush=True)
    if not all(_is_good(results[name]) for name in names):
        sys.exit(1)


@dataclass(frozen=True)
class _Course:
    roles: bool
    lights: int
    documents: int
    say: Say

    def prompt(self, client: VllmClient, number: int) -> list[int]:
        """A question about a document of this number."""
        return client.tokenize(prompt_text(make_document(number, self.lights), 0))


def _give_up(*_: object) -> NoReturn:
    raise _TakesTooLongError("its time is over")


def _try_store(store: str, host: str, places: list[Machine], course: _Course) -> dict[str, Any]:
    """What :func:`_compare` found, or why it found nothing."""
    with tempfile.TemporaryDirectory(prefix="flexkv-sharing-") as folder:
        try:
            return _share(store, Path(folder), host, places, course)
        except (ServerError, httpx.HTTPError, TimeoutError, _TakesTooLongError) as error:
            return {"error": str(error)}


def _share(store: str, folder: Path, host: str, places: list[Machine], course: _Course) -> dict[str, Any]:
    kinds = ("kv_producer", "kv_consumer") if course.roles else ("kv_both", "kv_both")
    with contextlib.ExitStack() as stack:
        tiers = stack.enter_context(_store(store, folder, host, places))
        servers = [
            _server(folder, index, tier, place, role)
            for index, (tier, place, role) in enumerate(zip(tiers, places, kinds, strict=True))
        ]
        course.say(f"{store}: starting two servers")
        for server in servers:
            stack.callback(server.stop)
            server.launch()
        for server in servers:
            server.wait_healthy()
        clients = [stack.enter_context(VllmClient(server.base_url)) for server in servers]
        return _compare(clients[0], clients[1], course)


def _compare(first: VllmClient, second: VllmClient, course: _Course) -> dict[str, Any]:
    course.say("warming up")  # the first request of a server is slower than all others
    for client in (first, second):
        client.complete(course.prompt(client, 1), ANSWER_TOKENS)
    asked = [_ask_both(first, second, course, 2 + number) for number in range(course.documents)]
    return {
        "prompt_tokens": asked[0]["prompt_tokens"],
        "hit_tokens": min(one["hit_tokens"] for one in asked),
        "ttft_recompute_ms": _median(asked, "ttft_recompute_ms"),
        "ttft_store_ms": _median(asked, "ttft_store_ms"),
        "written_after_ms": _median(asked, "written_after_ms"),
        "identical": all(one["identical"] for one in asked),
        "from_store": all(one["from_store"] for one in asked),
    }


def _ask_both(first: VllmClient, second: VllmClient, course: _Course, number: int) -> dict[str, Any]:
    """One question to the first server, and once its blocks are in the store to the second; with roles at once, as a router does, for
    the first to compute one token and the second all."""
    prompt = course.prompt(first, number)
    blocks = (len(prompt) - 1) // BLOCK_TOKENS
    before = 0.0 if course.roles else _settled(first)
    computed = first.complete(prompt, 1 if course.roles else ANSWER_TOKENS, logprobs=True)
    written_after_s = 0.0 if course.roles else _wait_written(first, before + blocks)
    shared = second.complete(prompt, ANSWER_TOKENS, logprobs=True)
    wanted = first.complete(prompt, ANSWER_TOKENS) if course.roles else computed
    course.say(
        f"question {number - 1} of {course.documents}, {len(prompt)} tokens: computed {computed.ttft_ms:.0f} ms, from the store"
        f" {shared.ttft_ms:.0f} ms ({shared.cached_tokens} tokens)"
    )
    return {
        "prompt_tokens": len(prompt),
        "hit_tokens": shared.cached_tokens,
        "ttft_recompute_ms": computed.ttft_ms,
        "ttft_store_ms": shared.ttft_ms,
        "written_after_ms": 1e3 * written_after_s,
        "identical": shared.token_ids == wanted.token_ids,
        "from_store": shared.cached_tokens >= blocks * BLOCK_TOKENS,
    }


def _settled(client: VllmClient) -> float:
    """Blocks that the server has written, once nothing of what it was asked before is still on its way to the store."""
    seen, since = -1.0, time.monotonic()
    deadline = since + WRITE_TIMEOUT_S
    while time.monotonic() < since + SETTLED_S:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the first server still writes after {WRITE_TIMEOUT_S:.0f} s")
        if (written := _written(client)) != seen:
            seen, since = written, time.monotonic()
        time.sleep(0.02)
    return seen


def _wait_written(client: VllmClient, blocks: float) -> float:
    """Until the server has written so many in all; how long that was, in seconds."""
    begun = time.monotonic()
    while _written(client) < blocks:
        if time.monotonic() > begun + WRITE_TIMEOUT_S:
            raise TimeoutError(f"the first server has not written its blocks within {WRITE_TIMEOUT_S:.0f} s")
        time.sleep(0.02)
    return time.monotonic() - begun


def _written(client: VllmClient) -> float:
    """Blocks that the server says it has written. vLLM counts only while it computes, so it is given something to do."""
    client.complete([1, 2, 3], 1)
    return client.metrics().total(_WRITTEN)


def _median(asked: list[dict[str, Any]], name: str) -> float:
    return round(float(statistics.median(one[name] for one in asked)), 1)


def _is_good(result: dict[str, Any]) -> bool:
    if "error" in result or not (result["identical"] and result["from_store"]):
        return False
    return bool(result["ttft_store_ms"] < result["ttft_recompute_ms"])


def _print_table(results: dict[str, dict[str, Any]]) -> None:
    table = Table(title="Time to first token: computed by one server, and by another from the store")
    table.add_column("store")
    for heading in ("tokens", "computed ms", "from the store ms", "ratio", "identical"):
        table.add_column(heading, justify="right")
    for name, found in results.items():
        if "error" in found:
            table.add_row(name, "", "", "", "", found["error"].splitlines()[0])
            continue
        computed, stored = found["ttft_recompute_ms"], found["ttft_store_ms"]
        row = (f"{found['hit_tokens']:,}", f"{computed:,.0f}", f"{stored:,.0f}", f"{computed / stored:.1f}")
        table.add_row(name, *row, "yes" if found["identical"] else "NO")
    Console(width=None if sys.stdout.isatty() else 110).print(table)


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
        "remote_wait_ms": 5000 if role == "kv_consumer" else 0,
    }
    return VllmServer(
        ensure_demo_model(),
        [*CPU_ARGUMENTS, "--kv-transfer-config", transfer_config(config, role)],
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
    else:
        with mooncake_master(host, MOONCAKE_LEASE_MS) as port:
            lent = ("1073741824", "0")  # the first server's memory holds the values
            yield [
                _Tier(f"mooncake://{host}:{port}", {"hostname": place.address, "segment_bytes": segment})
                for place, segment in zip(places, lent, strict=True)
            ]


if __name__ == "__main__":
    typer.run(sharing)
