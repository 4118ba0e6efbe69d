"""The same as ``overhead`` with SGLang: what FlexKV costs a request that misses, two real servers asked in turns."""

from __future__ import annotations

import tempfile
from pathlib import Path

from flexkv_core.cli.bench.overhead import QUICK_PAIRS, miss_figures
from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.sglang import BACKEND_ARGUMENTS, CPU_ARGUMENTS, CPU_ENVIRONMENT, SglangServer

PAIRS = 24
_POOL = ("--page-size", "16", "--max-total-tokens", "65536")
"""Room for every prompt: neither server evicts, so that both do the same work."""


def run(quick: bool = False) -> dict[str, float]:
    """Starts both servers and measures ``PAIRS`` pairs after a warm-up; the figures are those of ``overhead``.

    Raises ServerError when a server does not start.
    """
    model = ensure_demo_model()
    with tempfile.TemporaryDirectory(prefix="flexkv-overhead-") as folder:
        with_server, without_server = (
            SglangServer(
                model, [*CPU_ARGUMENTS, *_POOL, *more], CPU_ENVIRONMENT, Path(folder) / f"{name}.log"
            )
            for name, more in (("with", BACKEND_ARGUMENTS), ("without", ()))
        )
        return miss_figures(with_server, without_server, QUICK_PAIRS if quick else PAIRS)
