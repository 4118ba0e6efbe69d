"""Unified diffs, read and applied strictly: a hunk applies at its own line numbers and to exactly its own lines, or not at all.

PyPI's libraries look for a hunk nearby or with fewer lines of context, and write each file as they go. Here a target is known by its
checksums, so that anything but an exact fit means that something is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flexkv_core.errors import PatchError

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_NO_NEWLINE = b"\\ No newline"
_LINE = re.compile(rb"[^\n]*\n|[^\n]+")


@dataclass(frozen=True)
class Hunk:
    """Lines ``old`` from line ``old_start`` on (from 1) become ``new``, which then begin at ``new_start``. Lines keep their ends."""

    old_start: int
    new_start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]

    def reversed(self) -> Hunk:
        """The hunk that takes this one back."""
        return Hunk(self.new_start, self.old_start, self.new, self.old)


@dataclass(frozen=True)
class FileDiff:
    """The hunks of one file, by ascending line; ``path`` is relative to the folder that holds the engine's package."""

    path: str
    hunks: tuple[Hunk, ...]

    def apply(self, content: bytes) -> bytes:
        """``content`` with all hunks.

        Raises:
            PatchError: a hunk does not fit; names the file, the hunk and the line.
        """
        lines = _LINE.findall(content)
        result: list[bytes] = []
        done = 0
        for number, hunk in enumerate(self.hunks, 1):
            start = hunk.old_start - 1 if hunk.old else hunk.old_start
            if start < done or tuple(lines[start : start + len(hunk.old)]) != hunk.old:
                raise PatchError(
                    f"{self.path}: hunk {number} of {len(self.hunks)} does not fit at line {hunk.old_start}"
                )
            result += lines[done:start]
            result += hunk.new
            done = start + len(hunk.old)
        return b"".join([*result, *lines[done:]])

    def reversed(self) -> FileDiff:
        """The diff that takes this one back."""
        return FileDiff(self.path, tuple(hunk.reversed() for hunk in self.hunks))


def parse(text: bytes, name: str) -> tuple[FileDiff, ...]:
    """The files of a diff whose paths have one leading folder (``a/``, ``b/``). What stands before the first file is its header.

    Raises:
        PatchError: not a unified diff, or one that makes, removes or renames a file; ``name`` says whose.
    """
    lines = _LINE.findall(text)
    files: list[FileDiff] = []
    at = 0
    while at < len(lines):
        if not lines[at].startswith(b"--- "):
            at += 1
            continue
        path = _path(lines, at, name)
        hunks, at = _hunks(lines, at + 2, name)
        files.append(FileDiff(path, tuple(hunks)))
    if not files:
        raise PatchError(f"{name}: holds no unified diff")
    return tuple(files)


def _path(lines: Sequence[bytes], at: int, name: str) -> str:
    old, new = lines[at], lines[at + 1] if at + 1 < len(lines) else b""
    paths = [line[4:].split(b"\t")[0].strip().decode() for line in (old, new)]
    parts = [path.split("/") for path in paths]
    inside = parts[0][1:]
    if not new.startswith(b"+++ ") or inside != parts[1][1:] or not inside or ".." in inside:
        raise PatchError(f"{name}: {paths[0]} -> {paths[1]} is no change of one file inside the engine")
    return "/".join(inside)


def _hunks(lines: Sequence[bytes], at: int, name: str) -> tuple[list[Hunk], int]:
    hunks: list[Hunk] = []
    while at < len(lines) and (match := _HUNK.match(lines[at])):
        old_start, new_start = int(match[1]), int(match[3])
        counts = int(match[2] or 1), int(match[4] or 1)
        old, new, at = _body(lines, at + 1, counts)
        if (len(old), len(new)) != counts:
            raise PatchError(f"{name}: the hunk at line {old_start} has not as many lines as it says")
        hunks.append(Hunk(old_start, new_start, tuple(old), tuple(new)))
    if not hunks:
        raise PatchError(f"{name}: a file without hunks")
    return hunks, at


def _body(lines: Sequence[bytes], at: int, counts: tuple[int, int]) -> tuple[list[bytes], list[bytes], int]:
    old: list[bytes] = []
    new: list[bytes] = []
    for line in _until_complete(lines[at:], counts, old, new):
        at += 1
        if line.startswith(_NO_NEWLINE):
            _drop_newline(lines[at - 2], old, new)
    return old, new, at


def _until_complete(
    lines: Sequence[bytes], counts: tuple[int, int], old: list[bytes], new: list[bytes]
) -> Iterator[bytes]:
    """Sorts the lines of a hunk into ``old`` and ``new``; yields each line that belongs to it."""
    for line in lines:
        is_mark = line.startswith(_NO_NEWLINE)
        if (len(old), len(new)) == counts and not is_mark:
            return
        if not is_mark:
            if line[:1] not in b" +-" or line[:1] == b"":
                return
            if line[:1] != b"+":
                old.append(line[1:])
            if line[:1] != b"-":
                new.append(line[1:])
        yield line


def _drop_newline(last: bytes, old: list[bytes], new: list[bytes]) -> None:
    for side, sign in ((old, b"+"), (new, b"-")):
        if last[:1] != sign and side:
            side[-1] = side[-1].rstrip(b"\n")
