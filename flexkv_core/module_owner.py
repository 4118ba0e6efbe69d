"""Whose the module ``flexkv`` is: engines' own code imports that name, and another distribution may have it."""

from __future__ import annotations

import enum
import importlib.util
from pathlib import Path

NAME = "flexkv"


class Owner(enum.Enum):
    """Whose the module is that Python finds."""

    OURS = "ours"
    OTHERS = "others"
    NOBODY = "nobody"


def owner_of(door: Path, mark: str) -> tuple[Owner, Path | None]:
    """Whose module ``flexkv`` is, and where it lies. Imports nothing of it.

    ``door``: the file in it that an engine imports, ``mark``: what it contains when it is this project's. Another distribution may have
    been installed over files of ours, so that file is what decides.
    """
    spec = importlib.util.find_spec(NAME)
    if spec is None:
        return Owner.NOBODY, None
    for folder in spec.submodule_search_locations or ():
        file = Path(folder) / door
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            return (Owner.OURS if mark in text else Owner.OTHERS), Path(folder)
    return Owner.OTHERS, Path(spec.origin).parent if spec.origin else None
