"""A bad setting ends the real server before it loads a weight, with a status that is not 0 and one line that says what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from flexkv_core.cli.harness.server import CPU_ARGUMENTS, CPU_ENVIRONMENT, KV_TRANSFER_CONFIG

WEIGHTS = re.compile(r"Loading weights|Starting to load model|checkpoint shards")


def start(model: Path, config: Mapping[str, object], *arguments: str) -> tuple[int, str]:
    """``vllm serve`` until it ends by itself: its status and its log."""
    transfer = json.dumps({**json.loads(KV_TRANSFER_CONFIG), "kv_connector_extra_config": dict(config)})
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *CPU_ARGUMENTS]
    command += ["--kv-transfer-config", transfer, "--port", "0", *arguments]
    environment = {**os.environ, **CPU_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "INFO"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"host_bites": 1}, r"host_bites = 1 .*no such key; did you mean host_bytes\?"),
        (
            {"host_bytes": "64TiB"},
            r"CapacityError: host_bytes: \d+ bytes asked for, \d+ bytes are available",
        ),
        ({"tokens_per_block": 96}, r"ConfigError: tokens_per_block = 96: must be a multiple .* 64$"),
        (
            {"ssd_dirs": ["/proc/version/flexkv"]},
            r"ConfigError: ssd_dirs: /proc/version/flexkv cannot be used: /proc/version is no directory",
        ),
    ],
    ids=["unknown key", "memory", "block size", "directory"],
)
def test_refused_before_the_weights(llama: Path, config: Mapping[str, object], line: str) -> None:
    status, log = start(llama, config)
    assert status != 0
    assert re.search(line, log, re.MULTILINE), log[-3000:]
    assert not WEIGHTS.search(log)
