"""``scripts/gpu_bench [--json FILE] [--quick] [--checks-only]``; ends with 0, 1 (a check failed), 2 (usage) or 3 (no NVIDIA GPU)."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import triton

from flexkv_kernels.gpu_bench.report import Figures, table_lines

NO_GPU = 3


def main() -> int:
    """Run the checks, then the measurements, and print one table."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures as one flat JSON object")
    parser.add_argument("--quick", action="store_true", help="less data and fewer rounds")
    parser.add_argument("--checks-only", action="store_true", help="no measurements")
    parser.add_argument("--no-races", action="store_true", help="do not leave out ordering events")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.hip:
        print(
            f"gpu_bench: no NVIDIA GPU here (torch {torch.__version__}, triton {triton.__version__}); nothing was measured",
            file=sys.stderr,
        )
        return NO_GPU
    figures: Figures = {
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    wrong = _check(figures, arguments.no_races)
    _write(arguments.json, figures)
    if not wrong and not arguments.checks_only:
        _measure(figures, arguments.quick, arguments.json)
        print("\n".join(table_lines(figures)))
    return 1 if wrong else 0


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.splitlines()[0].strip()


def _check(figures: Figures, no_races: bool) -> list[str]:
    from flexkv_kernels.gpu_bench.checks import check_kernels
    from flexkv_kernels.gpu_bench.copier_check import check_copier, removals_noticed
    from flexkv_kernels.gpu_bench.quantising_check import check_quantising_copier

    start = time.monotonic()
    count, wrong = check_kernels()
    wrong += check_copier() + check_quantising_copier()
    print(
        f"{count} copies by kernels and the copier's round trips: {len(wrong)} wrong ({time.monotonic() - start:.0f} s)"
    )
    figures["library_checked"] = importlib.util.find_spec("pydantic_settings") is not None
    if figures["library_checked"]:
        wrong += _check_library()
    else:
        print("a manager's blocks: not checked, pydantic-settings is not installed here")
    figures["checks"], figures["checks_wrong"] = count, len(wrong)
    for text in wrong[:20]:
        print(f"  {text}")
    if not no_races:
        for order, noticed in removals_noticed().items():
            figures[f"removal_noticed_{order.lower()}"] = noticed
            print(f"  without {order}: {'noticed' if noticed else 'not noticed'}")
    return wrong


def _check_library() -> list[str]:
    from flexkv_kernels.gpu_bench.library_check import check_library

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flexkv-gpu-bench-") as directory:
        wrong = check_library("cuda", Path(directory))
    print(
        f"a manager's blocks to host memory, to the SSD and back: {len(wrong)} wrong ({time.monotonic() - start:.0f} s)"
    )
    return wrong


def _measure(figures: Figures, quick: bool, report: Path | None) -> None:
    from flexkv_kernels.gpu_bench import measure, measure_layers, measure_ops

    rounds, size_bytes = (3, 128 << 20) if quick else (9, 256 << 20)
    steps: dict[str, Callable[[], Mapping[str, float | str]]] = {
        "device": lambda: measure.device_figures(rounds, 4 * size_bytes),
        "bus": lambda: measure.bus_figures(rounds, size_bytes, busy=False),
        "whole ops": lambda: measure_ops.op_figures(rounds, size_bytes),
        "layer by layer": lambda: measure_layers.layer_figures(rounds),
        "pinning": measure_ops.pin_figures,
        "bus beside a matrix product": lambda: measure.bus_figures(rounds, size_bytes, busy=True),
        "matrix product beside the bus": lambda: measure.matmul_figures(size_bytes),
    }
    for name, step in steps.items():
        start = time.monotonic()
        figures.update(step())
        _write(report, figures)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def _write(report: Path | None, figures: Figures) -> None:
    """After every step, so that a run that is cut short leaves what it had."""
    if report is not None:
        report.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
