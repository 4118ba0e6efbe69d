"""Check, apply, revert: what an engine's files are, and what they become."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flexkv_core.cli.patch import record, series
from flexkv_core.cli.patch.record import Record
from flexkv_core.cli.patch.series import Series, checksum
from flexkv_core.cli.patch.target import Target
from flexkv_core.cli.patch.transaction import is_unfinished, locked, replace_all
from flexkv_core.errors import PatchError


class State(enum.Enum):
    """Of an engine."""

    NOT_NEEDED = "not needed"
    PRISTINE = "not applied"
    APPLIED = "applied"
    OTHER_PATCHES = "other patches applied"
    DIRTY = "dirty"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Finding:
    """What an engine is. ``reason`` says what is in the way where something is; ``series`` is what would be applied."""

    target: Target
    state: State
    reason: str = ""
    series: Series | None = None
    record: Record | None = None


def look(target: Target, folder: Path) -> Finding:
    """What ``target`` is, by the checksums of the files that the patches in ``folder`` change. Changes nothing.

    Raises:
        PatchError: the record or the patches cannot be read.
    """
    if is_unfinished(target.package):
        return Finding(target, State.DIRTY, "a change was left half-way; `flexkv patch revert` undoes it")
    done = _record_in_force(target)
    if done is not None:
        return _recorded(target, folder, done)
    supported = series.versions(folder, target.engine)
    if target.version not in supported:
        return _without_patches(target, folder, supported)
    wanted = series.load(folder, target.engine, target.version)
    wrong = _differences(target, wanted.originals)
    if wrong:
        return Finding(
            target, State.DIRTY, f"not as {target.engine} {target.version} ships them: {wrong}", wanted
        )
    return Finding(target, State.PRISTINE, series=wanted)


def apply(target: Target, folder: Path) -> Finding:
    """Apply all patches for the target's version; nothing where they are applied already or none is needed.

    Raises:
        PatchError: refused or failed, with the reason; nothing was changed.
    """
    with locked(target.package):
        found = look(target, folder)
        if found.state in (State.APPLIED, State.NOT_NEEDED):
            return found
        if found.state is not State.PRISTINE or found.series is None:
            raise PatchError(
                f"{target.engine} {target.version} in {target.root} is {found.state.value}: {found.reason}"
            )
        done, contents = planned(found.series, target)
        changes: dict[Path, bytes | None] = {target.root / path: new for path, new in contents.items()}
        changes[target.package / record.FILE] = done.as_bytes()
        replace_all(target.package, changes)
        return look(target, folder)


def revert(target: Target, folder: Path) -> Finding:
    """Take back what the record says, so that every file is what it was; nothing where there is no record.

    Raises:
        PatchError: a file was changed since; nothing was changed.
    """
    with locked(target.package):
        done = _record_in_force(target)
        if done is None:
            return look(target, folder)
        wrong = _differences(target, done.after)
        if wrong:
            raise PatchError(
                f"changed since the patches were applied: {wrong}; reinstall {target.engine} instead"
            )
        contents = series.taken_back(done.patches, {path: _read(target, path) for path in done.after})
        if {path: checksum(content) for path, content in contents.items()} != done.before:
            raise PatchError(
                f"{target.package / record.FILE} does not lead back to the original files; reinstall {target.engine}"
            )
        changes: dict[Path, bytes | None] = {target.root / path: old for path, old in contents.items()}
        changes[target.package / record.FILE] = None
        replace_all(target.package, changes)
        return look(target, folder)


def planned(wanted: Series, target: Target) -> tuple[Record, dict[str, bytes]]:
    """What would be recorded, and the patched files. Raises PatchError when a hunk does not fit."""
    contents = wanted.applied_to({path: _read(target, path) for path in wanted.originals})
    for path, content in contents.items():
        compile(content, path, "exec")
    after = {path: checksum(content) for path, content in contents.items()}
    return Record(wanted.engine, wanted.version, wanted.patches, wanted.originals, after), contents


def _record_in_force(target: Target) -> Record | None:
    """The record, unless the engine was installed anew over it."""
    done = record.read(target.package)
    if done is None or done.version != target.version or not _differences(target, done.before):
        return None
    return done


def _recorded(target: Target, folder: Path, done: Record) -> Finding:
    wrong = _differences(target, done.after)
    if wrong:
        return Finding(target, State.DIRTY, f"changed since the patches were applied: {wrong}", record=done)
    if target.version in series.versions(folder, target.engine):
        wanted = series.load(folder, target.engine, target.version)
        if wanted.patches == done.patches:
            return Finding(target, State.APPLIED, series=wanted, record=done)
    reason = "patches of another version of FlexKV are applied; `flexkv patch revert` takes them back"
    return Finding(target, State.OTHER_PATCHES, reason, record=done)


def _without_patches(target: Target, folder: Path, supported: list[str]) -> Finding:
    first_free = series.engines(folder)[target.engine]
    if series.version_key(target.version) >= series.version_key(first_free):
        return Finding(target, State.NOT_NEEDED, f"{target.engine} has every hook since {first_free}")
    reason = "no patches for this version"
    if supported:
        reason += f"; the nearest that has some is {series.nearest(target.version, supported)}"
    return Finding(target, State.UNSUPPORTED, f"{reason}, and {first_free} needs none")


def _differences(target: Target, expected: Mapping[str, str]) -> str:
    """The files whose checksum is another one, for a message; empty when all are as expected."""
    wrong = [path for path, digest in sorted(expected.items()) if _checksum(target, path) != digest]
    return ", ".join(wrong)


def _checksum(target: Target, path: str) -> str | None:
    file = target.root / path
    return checksum(_read(target, path)) if file.is_file() else None


def _read(target: Target, path: str) -> bytes:
    try:
        return (target.root / path).read_bytes()
    except OSError as error:
        raise PatchError(f"{target.root / path} cannot be read: {error.strerror}") from error
