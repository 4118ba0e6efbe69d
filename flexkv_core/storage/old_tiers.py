"""Tiers of other identities in a user's directory: of another model, layout or format version. Nobody reads them any more, and nothing
removes them unasked: the next start may be with that model again."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexkv_core.errors import StorageError
from flexkv_core.storage.directory import (
    CATALOG_NAME,
    DATA_NAME,
    FOLDER_PREFIX,
    LOCK_NAME,
    read_identity,
    tier_folders,
    try_lock,
)

_MARKS = (LOCK_NAME, DATA_NAME, CATALOG_NAME)
"""Files that a start or a write changes, and a check does not."""


@dataclass(frozen=True)
class TierUse:
    """What a tier takes, and when it was used.

    Attributes:
        folders: of all its directories that are there, the one with the catalogue first.
        bytes_on_disk: of all of them.
        last_used_unix_s: when a process started or wrote last.
        live: a process owns it now.
    """

    folders: tuple[Path, ...]
    bytes_on_disk: int
    last_used_unix_s: float
    live: bool


def tiers_in(path: Path) -> list[TierUse]:
    """The tiers whose first folder is ``path`` or lies in it, the one used last first; living ones count as used now."""
    found = [_use_of(folder) for folder in tier_folders(path) if read_identity(folder).get("member") == 0]
    return sorted(found, key=lambda tier: (tier.live, tier.last_used_unix_s), reverse=True)


def others(tiers: list[TierUse]) -> list[TierUse]:
    """Of what :func:`tiers_in` gave, all but those in use; but the one used last if none is."""
    return [tier for tier in tiers[1:] if not tier.live]


def remove(tier: TierUse) -> None:
    """Delete a tier, all its directories.

    Raises:
        StorageError: it is in use, by now; nothing was deleted. Or it cannot be deleted.
    """
    with contextlib.ExitStack() as stack:
        for folder in tier.folders:
            if not stack.enter_context(_lock_of(folder)):
                raise StorageError(f"{folder} is in use; nothing of it was removed")
        for folder in reversed(tier.folders):  # the catalogue last: with it goes the list of the others
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise StorageError(f"{folder}: {error.strerror}") from error


def _use_of(folder: Path) -> TierUse:
    folders = tuple(_folders_of(folder))
    files = [file.stat() for member in folders for file in _files(member)]
    live = False
    for member in folders:
        with _lock_of(member) as is_free:
            live |= not is_free
    size = sum({(file.st_dev, file.st_ino): file.st_blocks * 512 for file in files}.values())
    marks = [member / name for member in folders for name in _MARKS]
    used_s = max((mark.stat().st_mtime for mark in marks if mark.exists()), default=0.0)
    return TierUse(folders, size, used_s, live)


def _folders_of(first: Path) -> Iterator[Path]:
    identity = read_identity(first)
    yield first
    for name in identity.get("folders", [])[1:]:
        member = Path(name)
        with contextlib.suppress(StorageError):  # gone, or moved elsewhere
            if (
                member.name.startswith(FOLDER_PREFIX)
                and read_identity(member).get("tier") == identity["tier"]
            ):
                yield member


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file()]


@contextlib.contextmanager
def _lock_of(folder: Path) -> Iterator[bool]:
    """Whether nobody else has it; this process has it as long as the context lasts, then."""
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{folder / LOCK_NAME}: {error.strerror}") from error
    try:
        yield try_lock(fd)
    finally:
        os.close(fd)
