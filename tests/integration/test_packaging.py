"""What a user installs: one wheel with all packages, the C extension and vLLM's plugin entry point; editable installs too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import flexkv, flexkv_core, flexkv_kernels, flexkv_vllm
from importlib.metadata import entry_points
names = [point.value for point in entry_points(group="vllm.general_plugins") if point.name == "flexkv"]
print(flexkv_core.__file__, flexkv_kernels.__file__, flexkv_vllm.__file__, flexkv.__file__, *names, sep="\\n")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without build products, so that nothing stale gets into the wheel."""
    target = tmp_path_factory.mktemp("checkout") / "flexkv"
    skipped = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__", "tests")
    shutil.copytree(ROOT, target, ignore=skipped)
    return target


def _pip(*arguments: str) -> None:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "pip", *arguments, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_wheel_holds_all_packages(checkout: Path, tmp_path: Path) -> None:
    _pip("wheel", str(checkout), "--wheel-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("flexkv-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    for package in ("flexkv_core", "flexkv_kernels", "flexkv_vllm", "flexkv"):
        source = next(ROOT.glob(f"**/{package}/__init__.py")).parent
        expected = {f"{package}/{path.relative_to(source)}" for path in source.rglob("*.py")}
        assert expected <= set(names), package
    assert "flexkv_core/py.typed" in names
    patches = {
        f"flexkv_core/cli/patch/patches/{path.relative_to(ROOT / 'patches')}"
        for path in ROOT.glob("patches/**/*.*")
        if path.is_file()
    }
    assert len(patches) > 20
    assert patches <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "kernels/", "adapters/"))]
    assert "flexkv = flexkv_vllm.plugin:register" in entry_points
    assert "flexkv = flexkv_core.cli:main" in entry_points
    if shutil.which("cc") or shutil.which("gcc"):
        assert [
            name for name in names if name.startswith("flexkv_core/native/_native.") and name.endswith(".so")
        ]


@pytest.mark.slow
def test_editable_install_shows_all_packages(checkout: Path, tmp_path: Path) -> None:
    _pip("install", "--target", str(tmp_path), "--editable", str(checkout))
    # As a site directory, so that the .pth or finder of the editable install is at work; from elsewhere than the checkout.
    probe = f"import site; site.addsitedir({str(tmp_path)!r})\n{PROBE}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *files, plugin = done.stdout.splitlines()
    assert [Path(file).parents[1] for file in files] == [
        checkout,
        checkout / "kernels",
        checkout / "adapters" / "vllm",
        checkout / "adapters" / "intree",
    ]
    assert plugin == "flexkv_vllm.plugin:register"
