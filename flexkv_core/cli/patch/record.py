"""What was done to an engine, kept inside its package: the patches themselves and each file's checksum before and after.

With it a later version of this project, which may have other patches, takes back exactly what is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flexkv_core.cli.patch.series import Patch
from flexkv_core.errors import PatchError

FILE = ".flexkv-patches.json"
_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """Patches that are applied; ``before`` and ``after`` map a file to its SHA-256."""

    engine: str
    version: str
    patches: tuple[Patch, ...]
    before: Mapping[str, str]
    after: Mapping[str, str]

    def as_bytes(self) -> bytes:
        """The file's content."""
        content = {
            "format": _FORMAT,
            "engine": self.engine,
            "version": self.version,
            "patches": [{"name": patch.name, "text": patch.text.decode()} for patch in self.patches],
            "files": {
                path: {"before": self.before[path], "after": self.after[path]} for path in sorted(self.before)
            },
        }
        return json.dumps(content, indent=1).encode()


def read(package: Path) -> Record | None:
    """The record in an engine's package; None if there is none.

    Raises:
        PatchError: it cannot be read.
    """
    file = package / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise PatchError(f"{file}: written by a newer FlexKV (format {content['format']}); use that one")
        return Record(
            content["engine"],
            content["version"],
            tuple(Patch(entry["name"], entry["text"].encode()) for entry in content["patches"]),
            {path: entry["before"] for path, entry in content["files"].items()},
            {path: entry["after"] for path, entry in content["files"].items()},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchError(f"{file} cannot be read: {error!r}; reinstall the engine") from error
