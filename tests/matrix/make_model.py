"""``python -m tests.matrix.make_model``: makes the model that every version of the matrix serves, with the newest libraries."""

from __future__ import annotations

from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.config import cache_dir
from tests.e2e.tiny_models import ensure_tiny_model

if __name__ == "__main__":
    print(ensure_tiny_model("llama", ensure_demo_model(), cache_dir() / "models"))
