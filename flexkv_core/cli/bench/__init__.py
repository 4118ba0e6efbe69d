"""Benchmarks by name, and the bars that their figures are held against.

A benchmark is a module with ``run(quick: bool = False) -> dict[str, float | bool]``; the dictionary is what ``--json`` writes. A new one
is one module and one entry of :data:`BENCHES`.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

Results = Mapping[str, float | bool]


@dataclass(frozen=True)
class Bar:
    """What a figure must reach: at most or at least ``limit``. What is reached on other machines may differ."""

    relation: str  # "<=" or ">="
    limit: float

    def is_met(self, value: float) -> bool:
        """Whether ``value`` is on the right side."""
        return value <= self.limit if self.relation == "<=" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.relation} {self.limit:g}"


@dataclass(frozen=True)
class Bench:
    """Where a benchmark's ``run`` lies (imported when it is asked for), what it measures, and its bars by figure."""

    module: str
    summary: str
    bars: Mapping[str, Bar] = field(default_factory=dict)


BENCHES: dict[str, Bench] = {
    "control-plane": Bench(
        "flexkv_core.cli.bench.control_plane",
        "hash, match, plan and evict on an index of a million blocks",
        {
            "match_8192_us": Bar("<=", 10),
            "match_8192_python_us": Bar("<=", 25),
            "hash_block_ns": Bar("<=", 12),
            "get_match_131072_us": Bar("<=", 150),
            "put_match_131072_us": Bar("<=", 250),
            "evict_8_of_100k_us": Bar("<=", 10),
            "index_bytes_per_block": Bar("<=", 64),
        },
    ),
    "host-copy": Bench(
        "flexkv_core.cli.bench.host_copy",
        "gather and scatter of paged blocks against one contiguous memcpy",
        {f"{way}_{size}_ratio": Bar(">=", 0.9) for size in ("16k", "64k") for way in ("gather", "scatter")},
    ),
    "ssd": Bench(
        "flexkv_core.cli.bench.ssd",
        "reads and writes of blocks on a disk, in turns with fio, and with a busy Python thread",
        {f"{way}_{size}_ratio": Bar(">=", 0.95) for size in ("256k", "1m", "4m") for way in ("read", "write")}
        | {f"read_{size}_busy_gil_ratio": Bar(">=", 0.9) for size in ("256k", "1m")},
    ),
    "restart": Bench(
        "flexkv_core.cli.bench.restart",
        "from the start of a process to a warm tree, the SSD tier full",
        {"seconds_per_million_blocks": Bar("<=", 2)},
    ),
    "remote": Bench(
        "flexkv_core.cli.bench.remote",
        "batches of 1 MiB blocks to and from each kind of store, in turns with the store's own client used bare",
        {
            f"{store}_{way}_ratio": Bar(">=", 0.9)
            for store in ("s3", "valkey", "mooncake")
            for way in ("read", "write")
        },
    ),
    "faults": Bench(
        "flexkv_core.cli.bench.faults",
        "200 requests to two real vLLM servers in turns: without a remote tier, and with one whose store is dead, a black hole or slow",
        {
            f"{figure}_ratio_{fault}": Bar(">=", 0.97)
            for fault in ("dead", "black_hole", "slow")
            for figure in ("throughput", "ttft")
        },
    ),
    "shared": Bench(
        "flexkv_core.cli.bench.shared",
        "lookups of eight clients on one flexkv serve, and with one of them stopped",
        {
            "match_p50_us": Bar("<=", 300),
            "match_p99_us": Bar("<=", 1000),
            "stopped_client_p99_ratio": Bar("<=", 1.2),
        },
    ),
    "overhead": Bench(
        "flexkv_core.cli.bench.overhead",
        "time to first token of requests that miss, two real vLLM servers in turns, with and without FlexKV",
        {"ttft_miss_ratio": Bar("<=", 1.03)},
    ),
    "overhead-sglang": Bench(
        "flexkv_core.cli.bench.overhead_sglang",
        "the same with SGLang (scripts/bench overhead --engine sglang)",
        {"ttft_miss_ratio": Bar("<=", 1.03)},
    ),
    "peers": Bench(
        "flexkv_core.cli.bench.peers",
        "time to first token of hits in host memory, real vLLM servers in turns: FlexKV and vLLM's own offloading",
        {"host_hit_ratio": Bar("<=", 1.0)},
    ),
    "gpu-engine": Bench(
        "flexkv_core.cli.bench.gpu_engine",
        "real vLLM servers on an NVIDIA GPU in turns: without a connector, with FlexKV, with vLLM's own offloading",
        {
            "ttft_miss_ratio_flexkv": Bar("<=", 1.03),
            "burst_ratio_flexkv": Bar("<=", 1.03),
            "host_hit_ratio_4000": Bar("<=", 1.0),
            "host_hit_ratio_16000": Bar("<=", 1.0),
        },
    ),
    "layerwise": Bench(
        "flexkv_core.cli.bench.layerwise",
        "time to first token of hits in host memory, a real vLLM server: layer by layer and whole in turns",
        {"ttft_layerwise_ratio": Bar("<=", 1.0)},
    ),
    "layerwise-stores": Bench(
        "flexkv_core.cli.bench.layerwise_stores",
        "time to first token of requests that miss, a real vLLM server: stored layer by layer and whole in turns",
        {"ttft_miss_layerwise_ratio": Bar("<=", 1.0)},
    ),
    "startup": Bench(
        "flexkv_core.cli.bench.startup",
        "start of a real vLLM server until it answers, in turns, with and without FlexKV",
    ),
}


def run_bench(name: str, quick: bool = False, blocks: int | None = None) -> Results:
    """Run the benchmark ``name`` (a key of :data:`BENCHES`). ``quick`` asks for a smoke test whose figures mean little; ``blocks`` sets
    the size where the benchmark has one.

    Raises:
        ValueError: ``blocks`` was given and this benchmark has no such size.
    """
    run: Callable[..., Results] = importlib.import_module(BENCHES[name].module).run
    if blocks is None:
        return run(quick)
    if "blocks" not in inspect.signature(run).parameters:
        raise ValueError(f"{name} has no number of blocks to choose")
    return run(quick, blocks=blocks)


def results_table(name: str, results: Results) -> Table:
    """The figures beside their bars."""
    table = Table("figure", "value", "bar", "", title=name)
    table.columns[1].justify = "right"
    for key, value in results.items():
        bar = BENCHES[name].bars.get(key)
        verdict = "" if bar is None else ("[green]met[/green]" if bar.is_met(value) else "[red]missed[/red]")
        table.add_row(key, _as_text(value), "" if bar is None else str(bar), verdict)
    return table


def write_json(path: Path, results: Results) -> None:
    """One flat JSON object, keys in the order of the table."""
    path.write_text(json.dumps(dict(results), indent=2) + "\n", encoding="utf-8")


def _as_text(value: float | bool) -> str:
    """Four significant digits for a figure, words for a switch."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
