"""A small engine on disk, its patches, and processes that fail or die at a chosen step of a change."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from flexkv_core.errors import PatchError

VERSION = "1.2.0"
FILES: Mapping[str, str] = {
    "vllm/__init__.py": "",
    "vllm/_version.py": f"__version__ = version = '{VERSION}'\n",
    "vllm/core.py": "".join(f"line_{i} = {i}\n" for i in range(60)),
    "vllm/deep/worker.py": "".join(f"def f{i}():\n    return {i}\n\n" for i in range(30)) + "last = 1",
    "vllm/deep/other.py": "untouched = True\n",
}
CHANGES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "0001-core.patch": (("line_3 = 3\n", "line_3 = 3\nhook = 3\n"), ("line_50 = 50\n", "")),
    "0002-worker.patch": (
        ("    return 7\n", "    return 70\n"),
        ("last = 1", "last = 2\n"),
        ("hook = 3\n", "hook = 4\n"),
    ),
}
HEADER = "Why: a test\nUpstream: none\nRemoved-when: never\n\n"


def make_engine(root: Path, version: str = VERSION) -> Path:
    """The engine below ``root``, as in site-packages."""
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(VERSION, version) if name.endswith("_version.py") else text)
    (root / "vllm" / "core.py").chmod(0o640)
    return root


def make_patches(folder: Path, versions: tuple[str, ...] = (VERSION,)) -> Path:
    """The same patches for each of ``versions``."""
    for version in versions:
        place = folder / "vllm" / version
        place.mkdir(parents=True)
        current = dict(FILES)
        for name, changes in CHANGES.items():
            (place / name).write_text(HEADER + _diff(current, changes))
        (place / "series").write_text("".join(f"{name}\n" for name in CHANGES))
        touched = [name for name in FILES if current[name] != FILES[name]]
        lines = [f"{hashlib.sha256(FILES[name].encode()).hexdigest()}  {name}\n" for name in touched]
        (place / "originals.sha256").write_text("".join(lines))
    (folder / "engines.json").write_text(json.dumps({"vllm": "2.0.0", "sglang": "0.5.16"}))
    return folder


def contents(root: Path) -> dict[str, bytes]:
    """Every file below ``root`` but Python's own caches."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def in_a_process(action: Callable[[], object], root: Path, step: int, kill: bool) -> int:
    """Runs ``action`` in a child that fails with ENOSPC, or is killed, at its ``step``-th change of a file below ``root``.

    Returns the child's status: 0 it got through without coming to that step, 1 it raised, 2 it got through all the same, minus a
    signal's number.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            left = [step]
            sys.addaudithook(_saboteur(root, left, kill))
            action()
            status = 0 if left[0] > 0 else 2
        except (OSError, PatchError):
            status = 1
        finally:
            os._exit(status)
    _, wait_status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(wait_status)


def _saboteur(root: Path, left: list[int], kill: bool) -> Callable[[str, tuple[object, ...]], None]:
    def hook(event: str, arguments: tuple[object, ...]) -> None:
        writes = event in ("os.rename", "os.link", "os.remove") or (
            event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        )
        if not writes or not str(arguments[0]).startswith(str(root)):
            return
        left[0] -= 1
        if left[0] == 0 and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    return hook


def _diff(current: dict[str, str], changes: tuple[tuple[str, str], ...]) -> str:
    """The unified diff of ``changes``, which are made in ``current``."""
    before = dict(current)
    for old, new in changes:
        (name,) = [name for name, text in current.items() if text.count(old) == 1]
        current[name] = current[name].replace(old, new)
    text = ""
    for name in before:
        lines = difflib.unified_diff(
            before[name].splitlines(True), current[name].splitlines(True), f"a/{name}", f"b/{name}"
        )
        for line in lines:
            text += line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
    return text
