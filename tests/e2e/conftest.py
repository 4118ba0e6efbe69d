"""What the end-to-end tests share: vLLM's environment, the models, and one engine a module.

``pytest tests/e2e --sabotage`` shows that the tests of hits can fail: only those marked ``hit`` run, the last block of every load arrives
as zeros, and each must fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.server import CPU_ENVIRONMENT
from flexkv_core.config import cache_dir

os.environ.update(CPU_ENVIRONMENT)
SABOTAGE = "SABOTAGED_LOADS"
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sabotage", action="store_true", help="loads bring zeros; tests marked hit must fail")


def pytest_configure(config: pytest.Config) -> None:
    """Before the test modules are imported: those that start servers choose the servers' connector then."""
    if config.getoption("--sabotage"):
        os.environ[SABOTAGE] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--sabotage"):
        return
    left_out = [item for item in items if item.get_closest_marker("hit") is None]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    for item in items:
        item.add_marker(pytest.mark.xfail(strict=True, raises=AssertionError, reason="sabotaged"))


@pytest.fixture(autouse=True)
def _sabotaged_copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not request.config.getoption("--sabotage"):
        yield
        return
    # Here, because vLLM reads its environment when it is imported.
    from flexkv_kernels.copier import CpuCopier
    from tests.e2e.checks import load_zeros_last, load_zeros_layerwise, patched_scatter

    monkeypatch.setattr(CpuCopier, "scatter_layers", load_zeros_layerwise)
    with patched_scatter(load_zeros_last):
        yield


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct in float32; it lends its tokenizer to the tiny models."""
    return ensure_demo_model()


@pytest.fixture(scope="session")
def tiny_model(demo_model: Path) -> Callable[[str], Path]:
    """Where the tiny model of a kind lies. Those that are missing are made in a process of its own, so that their random numbers are the
    same every time."""
    from tests.e2e.tiny_models import tiny_model_directory

    folder = cache_dir() / "models"

    def make(kind: str) -> Path:
        directory = tiny_model_directory(kind, folder)
        if not directory.is_dir():
            command = [sys.executable, "-m", "tests.e2e.tiny_models", "all", str(demo_model), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-2000:]
        return directory

    return make


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[[str], Path]) -> Path:
    """Two layers of grouped-query attention."""
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _one_line_a_test(request: pytest.FixtureRequest) -> None:
    """Names the running test in vLLM's own output, which pytest shows for a failure."""
    print(f"--- {request.node.nodeid}")
