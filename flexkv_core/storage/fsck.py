"""Checks an SSD tier's folder: every record against the bytes of its slot.

On a folder that a living process owns nothing is changed, and a block that changes while it is looked at is left out. Repair
needs the folder's lock; it removes the records whose bytes are wrong, so that their blocks are recomputed, and writes unreadable
parts of the catalogue anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexkv_core.errors import StorageError
from flexkv_core.layout import KVLayout
from flexkv_core.storage.catalog import Catalog
from flexkv_core.storage.directory import (
    CATALOG_NAME,
    DATA_NAME,
    LOCK_NAME,
    SlotPlaces,
    read_identity,
    tier_folders,
    try_lock,
)
from flexkv_core.storage.scrub import SlotChecker
from flexkv_core.types import Slots

_REMOVE_BLOCKS = 4096  # a transaction


@dataclass(frozen=True)
class FsckReport:
    """What was found in one folder.

    Attributes:
        live: a process owns the folder.
        slots, blocks: places, and blocks that are recorded in them.
        checked_blocks: of those, how many were compared; the others changed meanwhile.
        corrupt_slots: whose bytes are not what was written, or cannot be read.
        duplicate_blocks: records whose key stands in another slot as well; harmless, one of them is used.
        bad_catalog_rows: unreadable parts of the catalogue; their blocks are lost. 0 after a repair.
        removed_records: by the repair.
    """

    folder: str
    live: bool
    slots: int
    blocks: int
    checked_blocks: int
    corrupt_slots: tuple[int, ...]
    duplicate_blocks: int
    bad_catalog_rows: int
    removed_records: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong any more."""
        return self.removed_records == len(self.corrupt_slots) and not self.bad_catalog_rows


def check_directory(path: Path, repair: bool = False) -> Iterator[FsckReport]:
    """Check every tier whose first folder is ``path`` or lies in it.

    Raises:
        StorageError: there is none; a folder cannot be read; or a repair of a folder that is in use.
    """
    folders = list(tier_folders(path))
    if not folders:
        raise StorageError(f"{path} holds no data of FlexKV")
    for folder in folders:
        identity = read_identity(folder)
        if identity.get("member") == 0:
            yield check_folder(folder, repair)
        elif len(folders) == 1:
            raise StorageError(
                f"{folder} is a part of the tier whose catalogue lies in {identity['folders'][0]}; check that"
            )


def check_folder(folder: Path, repair: bool) -> FsckReport:
    """Check the tier whose first folder is ``folder``. Raises StorageError as :func:`check_directory`."""
    identity = read_identity(folder)
    try:
        layout = KVLayout(**identity["layout"])
        members = [folder, *map(Path, identity["folders"][1:])]
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{folder}: identity.json does not describe a tier: {error!r}") from error
    with ExitStack() as stack:
        lock = _open(folder / LOCK_NAME, os.O_RDWR, stack)
        live = not try_lock(lock)
        if live and repair:
            raise StorageError(
                f"{folder} is in use; stop its owner before a repair (its scrubber repairs what it finds)"
            )
        fds = tuple(_open(member / DATA_NAME, os.O_RDONLY, stack) for member in members)
        places = SlotPlaces(len(members), layout.slot_bytes)
        slots = min(os.fstat(fd).st_size for fd in fds) // layout.slot_bytes * len(fds)
        return _check(folder, layout, fds, places, slots, live, repair)


def _check(
    folder: Path,
    layout: KVLayout,
    fds: tuple[int, ...],
    places: SlotPlaces,
    slots: int,
    live: bool,
    repair: bool,
) -> FsckReport:
    path = folder / CATALOG_NAME
    try:
        catalog = Catalog(path, slots, layout.shard_count, read_only=True)
    except StorageError:
        if not repair:
            raise
        Catalog(path, slots, layout.shard_count).close()  # made anew with what can be read
        catalog = Catalog(path, slots, layout.shard_count, read_only=True)
    held = np.flatnonzero(catalog.table["generation"]).astype(np.int32)
    verdicts = _verdicts(SlotChecker(fds, places, layout, catalog.table), held)
    suspects = held[verdicts == 0]
    catalog.close()
    if live and len(suspects):
        suspects = _unchanged(suspects, catalog, Catalog(path, slots, layout.shard_count, read_only=True))
    removed = 0
    if repair and (len(suspects) or catalog.bad_pages):
        removed = _repair(path, slots, layout, suspects)
    keys = catalog.table["key"][held]
    return FsckReport(
        folder=str(folder),
        live=live,
        slots=slots,
        blocks=len(held),
        checked_blocks=int((verdicts == 1).sum()) + len(suspects),
        corrupt_slots=tuple(suspects.tolist()),
        duplicate_blocks=len(held) - len(np.unique(keys, axis=0)) if len(held) else 0,
        bad_catalog_rows=0 if repair else catalog.bad_pages,
        removed_records=removed,
    )


def _verdicts(checker: SlotChecker, slots: Slots) -> np.ndarray[Any, np.dtype[np.int8]]:
    """1: right, 0: wrong or unreadable."""
    verdicts = np.zeros(len(slots), np.int8)
    for i, slot in enumerate(slots.tolist()):
        try:
            verdicts[i] = checker.check(slot) is True
        except OSError:
            verdicts[i] = 0
    return verdicts


def _unchanged(suspects: Slots, before: Catalog, now: Catalog) -> Slots:
    """Of blocks that looked wrong on a living folder, those whose record is still the same: the others were being written."""
    now.close()
    same = before.table["generation"][suspects] == now.table["generation"][suspects]
    unchanged: Slots = suspects[same]
    return unchanged


def _repair(path: Path, slots: int, layout: KVLayout, suspects: Slots) -> int:
    catalog = Catalog(path, slots, layout.shard_count)  # unreadable rows are written anew when it is opened
    for start in range(0, len(suspects), _REMOVE_BLOCKS):
        catalog.remove(suspects[start : start + _REMOVE_BLOCKS])
    catalog.close()
    return len(suspects)


def _open(path: Path, flags: int, stack: ExitStack) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    stack.callback(os.close, fd)
    return fd
