"""What the style tests read: the files of the checkout that belong to the project."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_FOLDERS = ("flexkv_core/", "kernels/", "adapters/")
VENDORED = ("third_party/",)
TEXT_SUFFIXES = frozenset({"", ".py", ".pyi", ".c", ".h", ".md", ".toml", ".txt", ".yaml", ".yml", ".json"})


@cache
def project_files() -> tuple[Path, ...]:
    """Tracked files and new ones that git does not ignore, relative to the root, without vendored code."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return tuple(
        Path(name)
        for name in sorted(set(listed))
        if not any(part in name for part in VENDORED) and (ROOT / name).is_file()
    )


def text_files() -> list[Path]:
    """Files that a person reads."""
    return [path for path in project_files() if path.suffix in TEXT_SUFFIXES and path.name != "LICENSE"]


def python_files() -> list[Path]:
    """All Python sources, tests and scripts included."""
    return [path for path in project_files() if path.suffix == ".py"]


def shipped_python_files() -> list[Path]:
    """Python sources that a wheel carries."""
    return [path for path in python_files() if str(path).startswith(PACKAGE_FOLDERS)]


def read(path: Path) -> str:
    """The text of a file named relative to the root."""
    return (ROOT / path).read_text(encoding="utf-8")
