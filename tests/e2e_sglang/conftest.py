"""What the tests on a real SGLang share: the models, and servers that several tests ask. They run in the environment ``sglang-cpu``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.config import cache_dir


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Path]:
    """Makes the tiny model of a kind; it borrows the demo model's tokenizer."""

    def make(kind: str) -> Path:
        arguments = [kind, str(ensure_demo_model()), str(cache_dir() / "models")]
        done = subprocess.run(
            [sys.executable, "-m", "tests.e2e.tiny_models", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return Path(done.stdout.splitlines()[-1])

    return make


@pytest.fixture(scope="session")
def llama(tiny_model: Callable[[str], Path]) -> Path:
    """Two layers of grouped-query attention."""
    return tiny_model("llama")
