"""The same as ``overhead`` with SGLang: what FlexKV costs a request that misses, two real servers asked in turns."""

from __future__ import annotations

from pathlib import Path

from flexkv_core.cli.bench.overhead import miss_figures
from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.sglang import BACKEND_ARGUMENTS, CPU_ARGUMENTS, CPU_ENVIRONMENT, SglangServer

_POOL = ("--page-size", "16", "--max-total-tokens", "65536")
"""Room for every prompt: neither server evicts, so that both do the same work."""


def run(quick: bool = False) -> dict[str, float]:
    """The figures of ``overhead``. Raises ServerError when a server does not start."""
    model = ensure_demo_model()

    def server(with_flexkv: bool, log_path: Path) -> SglangServer:
        more = BACKEND_ARGUMENTS if with_flexkv else ()
        return SglangServer(model, [*CPU_ARGUMENTS, *_POOL, *more], CPU_ENVIRONMENT, log_path)

    return miss_figures(server, quick)
