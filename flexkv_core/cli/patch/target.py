"""Where an engine lies and which version it is, found without importing it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flexkv_core.errors import PatchError

_FOLDERS = {"vllm": ("", "vllm"), "sglang": ("", "python")}
"""Where the package may lie below a path that a user names: in site-packages, in a source checkout."""
_VERSION = re.compile(
    r"^\s*(?:__version__\s*=\s*)?(?:version\s*=\s*|__version__\s*=\s*)['\"]([0-9][^'\"]*)['\"]", re.MULTILINE
)
_TAG = re.compile(r"^v?(\d+(?:\.\w+)*)$")


@dataclass(frozen=True)
class Target:
    """An engine on this machine. ``root`` holds its package: the paths of patches are relative to it."""

    engine: str
    root: Path
    version: str

    @property
    def package(self) -> Path:
        """The engine's package."""
        return self.root / self.engine


def find(engine: str | None, path: Path | None, version: str | None, known: tuple[str, ...]) -> Target:
    """The engine that is meant: the one below ``path``, or the one that this Python would import.

    Raises:
        PatchError: none or several are found, or the version cannot be told; says what to name.
    """
    if engine is not None and engine not in known:
        raise PatchError(f"--engine {engine}: must be one of {', '.join(known)}")
    names = (engine,) if engine else known
    found = [(name, root) for name in names if (root := _root(name, path)) is not None]
    where = f"in {path}" if path else "in this Python's environment"
    if not found:
        raise PatchError(f"no {' or '.join(names)} {where}; name its folder with --target")
    if len(found) > 1:
        raise PatchError(f"{' and '.join(name for name, _ in found)} are {where}; name one with --engine")
    name, root = found[0]
    known_version = version or _version(name, root)
    if known_version is None:
        raise PatchError(f"the version of {name} in {root} cannot be told; name it with --version")
    return Target(name, root, known_version.partition("+")[0])


def _root(engine: str, path: Path | None) -> Path | None:
    if path is None:
        spec = importlib.util.find_spec(engine)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        return Path(folders[0]).resolve().parent if folders else None
    path = path.resolve()
    if path.name == engine and (path / "__init__.py").is_file():
        return path.parent
    places = [path / folder for folder in _FOLDERS[engine]]
    return next((place for place in places if (place / engine / "__init__.py").is_file()), None)


def _version(engine: str, root: Path) -> str | None:
    """From the file that the build writes, else from the installation's metadata, else from the tag of a checkout."""
    for name in ("_version.py", "version.py"):
        file = root / engine / name
        if file.is_file() and (match := _VERSION.search(file.read_text(encoding="utf-8"))):
            return match[1]
    metadata = sorted(root.glob(f"{engine}-*.dist-info/METADATA"))
    if metadata:
        return metadata[0].parent.name.removesuffix(".dist-info").partition("-")[2]
    return _tag(root)


def _tag(folder: Path) -> str | None:
    command = ["git", "-C", str(folder), "describe", "--tags", "--exact-match", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _TAG.match(done.stdout.strip())
    return match[1] if match else None
