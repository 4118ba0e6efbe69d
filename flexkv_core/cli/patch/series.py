"""The patches that this project has: ``patches/<engine>/<version>/``, each folder with its ``series`` and the checksums of what it patches.

A patch begins with a header of ``Key: text`` lines: ``Why``, ``Upstream`` and ``Removed-when``. ``originals.sha256`` holds, as sha256sum
writes it, what each file must be before the first patch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flexkv_core.cli.patch.diff import FileDiff, parse
from flexkv_core.errors import PatchError

HEADER_KEYS = ("Why", "Upstream", "Removed-when")


@dataclass(frozen=True)
class Patch:
    """One patch by name and text."""

    name: str
    text: bytes

    @cached_property
    def header(self) -> Mapping[str, str]:
        """The header's lines by their keys; a line that begins with a space continues the one before."""
        fields: dict[str, str] = {}
        key = ""
        for line in self.text.decode().splitlines():
            if line.startswith(("--- ", "diff ")):
                break
            if line.startswith(" ") and key:
                fields[key] += " " + line.strip()
            elif ": " in line:
                key, _, fields[key] = line.partition(": ")
        return fields

    @cached_property
    def files(self) -> tuple[FileDiff, ...]:
        """What it changes."""
        return parse(self.text, self.name)


@dataclass(frozen=True)
class Series:
    """All patches for one version of an engine, in their order, and the checksums of the files before and after them."""

    engine: str
    version: str
    patches: tuple[Patch, ...]
    originals: Mapping[str, str]

    def applied_to(self, contents: Mapping[str, bytes]) -> dict[str, bytes]:
        """The files with all patches. Raises PatchError when one does not fit."""
        return _through(self.patches, contents)


def taken_back(patches: tuple[Patch, ...], contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files without ``patches``. Raises PatchError when one does not fit."""
    result = dict(contents)
    for patch in reversed(patches):
        for diff in reversed(patch.files):
            result[diff.path] = diff.reversed().apply(result[diff.path])
    return result


def checksum(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def patches_folder() -> Path:
    """Where the patches lie: inside the package in a wheel, beside it in a checkout.

    Raises:
        PatchError: neither is there.
    """
    for folder in (Path(__file__).parent / "patches", Path(__file__).parents[3] / "patches"):
        if (folder / "engines.json").is_file():
            return folder
    raise PatchError("this installation holds no patches; install the wheel, or use a checkout")


def engines(folder: Path) -> dict[str, str]:
    """Engine -> the first version that needs no patch."""
    found: dict[str, str] = json.loads((folder / "engines.json").read_text(encoding="utf-8"))
    return found


def versions(folder: Path, engine: str) -> list[str]:
    """Versions of ``engine`` with patches, oldest first."""
    return sorted((path.parent.name for path in (folder / engine).glob("*/series")), key=version_key)


def load(folder: Path, engine: str, version: str) -> Series:
    """The patches for exactly this version.

    Raises:
        PatchError: there are none for it, or they are broken.
    """
    place = folder / engine / version
    if not (place / "series").is_file():
        raise PatchError(f"no patches for {engine} {version}")
    names = [line for line in (place / "series").read_text(encoding="utf-8").split() if line]
    patches = tuple(Patch(name, (place / name).read_bytes()) for name in names)
    lines = (place / "originals.sha256").read_text(encoding="utf-8").splitlines()
    originals = {path: digest for digest, path in (line.split(maxsplit=1) for line in lines)}
    touched = {diff.path for patch in patches for diff in patch.files}
    if touched != originals.keys() or not all(path.startswith(f"{engine}/") for path in touched):
        raise PatchError(f"{place}: originals.sha256 does not name the files that the patches change")
    return Series(engine, version, patches, originals)


def nearest(wanted: str, supported: list[str]) -> str:
    """The newest supported version that is not newer than ``wanted``, else the oldest."""
    older = [version for version in supported if version_key(version) <= version_key(wanted)]
    return older[-1] if older else supported[0]


def version_key(version: str) -> tuple[int, ...]:
    """Orders versions such as 0.10.1.1 and 0.5.15.post1; what is no number counts as 0."""
    parts = version.partition("+")[0].replace("post", "").split(".")
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


def _through(patches: tuple[Patch, ...], contents: Mapping[str, bytes]) -> dict[str, bytes]:
    result = dict(contents)
    for patch in patches:
        for diff in patch.files:
            try:
                result[diff.path] = diff.apply(result[diff.path])
            except PatchError as error:
                raise PatchError(f"{patch.name}: {error}") from error
    return result
