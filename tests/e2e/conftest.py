"""What the end-to-end tests share: vLLM's environment, the models, and one engine a module."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.server import CPU_ENVIRONMENT
from flexkv_core.config import cache_dir

os.environ.update(CPU_ENVIRONMENT)
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct in float32; it lends its tokenizer to the tiny models."""
    return ensure_demo_model()


@pytest.fixture(scope="session")
def tiny_model(demo_model: Path) -> Callable[[str], Path]:
    """Makes the tiny model of a kind, in a process of its own so that its random numbers are the same every time."""

    def make(kind: str) -> Path:
        command = [
            sys.executable,
            "-m",
            "tests.e2e.tiny_models",
            kind,
            str(demo_model),
            str(cache_dir() / "models"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return Path(done.stdout.splitlines()[-1])

    return make


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[[str], Path]) -> Path:
    """Two layers of grouped-query attention."""
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _one_line_a_test(request: pytest.FixtureRequest) -> None:
    """Names the running test in vLLM's own output, which pytest shows for a failure."""
    print(f"--- {request.node.nodeid}")
