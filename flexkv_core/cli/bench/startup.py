"""What FlexKV adds to the start of ``vllm serve``: real starts in turns, with and without it, until ``/health`` answers.

The demo's model, the default ``host_bytes``. Both sides compute on the same cores (see overhead), and the first pair, which fills the
page cache, is not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.cpus import compute_cpus
from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, KV_TRANSFER_CONFIG, VllmServer

PAIRS = 5
QUICK_PAIRS = 1
_WARM_UP_PAIRS = 1


def run(quick: bool = False) -> dict[str, float]:
    """Returns ``start_seconds_added`` (median of the pairs' differences), ``start_ratio`` (median of their ratios), and both medians in s.

    Raises ServerError when a server does not start.
    """
    pairs = QUICK_PAIRS if quick else PAIRS
    seconds = [_start_pair(number) for number in range(-_WARM_UP_PAIRS, pairs)][_WARM_UP_PAIRS:]
    return {
        "start_seconds_added": statistics.median(a - b for a, b in seconds),
        "start_ratio": statistics.median(a / b for a, b in seconds),
        "start_with_s": statistics.median(a for a, _ in seconds),
        "start_without_s": statistics.median(b for _, b in seconds),
        "pairs": len(seconds),
    }


def _start_pair(number: int) -> tuple[float, float]:
    """Seconds with FlexKV, and without; which is first alternates."""
    flexkv = ["--kv-transfer-config", KV_TRANSFER_CONFIG]
    if number % 2:
        with_s, without_s = _start(flexkv), _start([])
    else:
        without_s, with_s = _start([]), _start(flexkv)
    return with_s, without_s


def _start(arguments: list[str]) -> float:
    environment = {**CPU_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": compute_cpus()}
    with tempfile.TemporaryDirectory(prefix="flexkv-startup-") as folder:
        log = Path(folder) / "server.log"
        server = VllmServer(ensure_demo_model(), [*CPU_ARGUMENTS, *arguments], environment, log)
        started = time.monotonic()
        with server:
            return time.monotonic() - started
