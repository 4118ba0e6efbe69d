"""Every patched version's real scheduler, driven with FlexKV's real connector; for those whose kernels do not run here.

See ``scheduler_driver.py``. All of them can be imported in the environment of vLLM 0.17.1, so they are tested there only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from flexkv_core.cli.harness.server import CPU_ENVIRONMENT
from flexkv_core.cli.patch import job, series
from flexkv_core.cli.patch.job import State
from flexkv_core.cli.patch.target import find
from tests.matrix.test_patches import DISTRIBUTIONS, FOLDER, unpacked

IMPORTED_IN = "0.17.1"
DRIVE_S = 120
CHECKS = ("check_failed_loads", "check_aborted_load", "check_preemptions")


@pytest.mark.skipif(
    not metadata.version("vllm").startswith(IMPORTED_IN), reason=f"in the environment of vLLM {IMPORTED_IN}"
)
@pytest.mark.parametrize("version", [each for each in series.versions(FOLDER, "vllm") if each != IMPORTED_IN])
def test_trouble_with_loads_changes_no_answer(tmp_path: Path, model: Path, version: str) -> None:
    root = unpacked(tmp_path, f"{DISTRIBUTIONS['vllm']}=={version}")
    assert job.apply(find("vllm", root, None, ("vllm",)), FOLDER).state is State.APPLIED
    done = subprocess.run(
        [sys.executable, "-m", "tests.matrix.scheduler_driver", str(model)],
        env={
            **os.environ,
            **CPU_ENVIRONMENT,
            "PYTHONPATH": f"{root}{os.pathsep}{os.environ['PYTHONPATH']}",
            "VLLM_PLUGINS": "",
        },
        capture_output=True,
        text=True,
        timeout=DRIVE_S,
        check=False,
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if "check_" in line] == [
        f"vLLM {version}: {check}" for check in CHECKS
    ]
