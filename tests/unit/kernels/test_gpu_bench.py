"""``scripts/gpu_bench`` where no GPU is, its table, and its way of measuring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexkv_kernels.gpu_bench import __main__ as gpu_bench
from flexkv_kernels.gpu_bench.checks import kernel_cases
from flexkv_kernels.gpu_bench.geometry import DTYPES, LAYOUTS
from flexkv_kernels.gpu_bench.measure import Rounds
from flexkv_kernels.gpu_bench.report import table_lines

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    found = subprocess.run(
        [ROOT / "scripts/gpu_bench", "--json", report],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert found.returncode == gpu_bench.NO_GPU
    assert "no NVIDIA GPU here" in found.stderr
    assert found.stdout == ""
    assert not report.exists()


def test_a_wrong_option_is_no_missing_gpu() -> None:
    found = subprocess.run(
        [ROOT / "scripts/gpu_bench", "--nonsense"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
    )
    assert found.returncode == 2


def test_what_it_needs_beside_torch_and_triton_is_little() -> None:
    """It runs beside an engine, in an environment that is not the scripts'."""
    code = (
        "import sys; from flexkv_kernels.gpu_bench import checks, copier_check, measure, measure_layers, measure_ops\n"
        "print(*{name.split('.')[0] for name in sys.modules} & {'pydantic', 'rich', 'typer', 'yaml', 'psutil', 'vllm'})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_checks_cover_every_layout_dtype_and_width() -> None:
    cases = list(kernel_cases(seed=0))
    assert {case.geometry.layout for case in cases} == set(LAYOUTS)
    assert {case.geometry.dtype for case in cases} == set(DTYPES)
    assert {1, 16, 256} <= {case.geometry.tokens for case in cases}
    assert {case.gap for case in cases} == {16, 8, 4, 2, 1}
    assert any(case.checksum for case in cases)
    assert any(case.skip for case in cases)
    assert {case.geometry.layout for case in cases if case.layerwise} == set(LAYOUTS)


def test_a_ratio_is_to_the_plain_copies_around_it() -> None:
    plain = iter([9.0, 1.0, 3.0, 3.0])  # the first call warms up
    rounds = Rounds()
    rounds.run({"copy": lambda: 4.0}, lambda: next(plain), rounds=1)
    found = rounds.figures("4k", size_bytes=8 * 10**9)
    assert found == {"copy_4k_ratio": 0.5, "copy_4k_gbs": 2.0, "plain_4k_gbs": pytest.approx(8 / 3)}


def test_the_table_shows_ratio_and_speed_in_their_columns() -> None:
    figures: dict[str, float | str] = {
        "gpu": "a GPU",
        "driver": "3",
        "torch": "1",
        "triton": "2",
        "d2h_staged_16k_ratio": 0.934,
        "d2h_staged_16k_gbs": 51.7,
        "h2d_link_1m_busy_gbs": 48.2,
        "matmul_beside_d2h_dma_slowdown": 1.07,
    }
    lines = {
        line.split()[0]: line.split()[1:] for line in table_lines(json.loads(json.dumps(figures))) if line
    }
    assert lines["d2h_staged"] == ["-", "-", "0.93", "52", *["-"] * 6]
    assert lines["h2d_link_busy"] == [*["-"] * 9, "48"]
    assert lines["matmul_beside_d2h_dma_slowdown"] == ["1.07"]
