"""The files of an SSD tier: made, locked and sized before anything is served.

::

    <directory of the user>/flexkv-<identity>/   0700
        data            slots s, s + D, s + 2 D, …    0600, allocated in full at the start
        identity.json   what the bytes are, for people and for the check at the start
        lock            held by the process that owns the tier
        catalog.sqlite  in the first of D directories only, with what belongs to it: see log_space.py

The identity is in the folder's name, so that data of another model, layout or format version is kept apart, not overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_core.errors import CapacityError, ConfigError, FlexKVError, StorageError
from flexkv_core.keys import FORMAT_VERSION, fingerprint
from flexkv_core.layout import KVLayout
from flexkv_core.storage.base import SsdSpec
from flexkv_core.storage.catalog import catalog_bytes, lacking_bytes
from flexkv_core.types import Slots

logger = logging.getLogger(__name__)

CATALOG_NAME = "catalog.sqlite"
DATA_NAME = "data"
IDENTITY_NAME = "identity.json"
LOCK_NAME = "lock"
FOLDER_PREFIX = "flexkv-"
_SMALL_FILES_BYTES = 64 << 10  # identity, lock and the folder itself
_LOCK_POLL_S = 0.05


def slots_per_directory(spec: SsdSpec) -> int:
    """Slots that ``bytes_per_directory`` holds beside the catalogue, which counts in each so that all directories are alike.

    Raises:
        CapacityError: not one.
    """
    count, shards = len(spec.directories), spec.layout.shard_count
    budget = spec.bytes_per_directory - _SMALL_FILES_BYTES
    slots = max(0, budget - catalog_bytes(0, shards)) // spec.layout.slot_bytes
    while (
        slots > 0
        and (over := slots * spec.layout.slot_bytes + catalog_bytes(slots * count, shards) - budget) > 0
    ):
        slots -= max(1, over // spec.layout.slot_bytes)
    if slots < 1:
        needed = spec.layout.slot_bytes + catalog_bytes(count, shards) + _SMALL_FILES_BYTES
        raise CapacityError(
            f"ssd_bytes: {spec.bytes_per_directory} bytes a directory hold no block; one needs {needed}, its catalogue included"
        )
    return slots


def slot_count(spec: SsdSpec) -> int:
    """Slots of the tier; the same in every process, without looking at a disk. Raises CapacityError as above."""
    return slots_per_directory(spec) * len(spec.directories)


def folder_name(identity: dict[str, Any], layout: KVLayout) -> str:
    """Of the folder that holds data of this identity."""
    return FOLDER_PREFIX + fingerprint({"identity": identity, "layout": layout.as_dict()}).hex()


@dataclass(frozen=True)
class SlotPlaces:
    """Where a tier's slots lie: striped over ``directory_count`` files."""

    directory_count: int
    slot_bytes: int

    def files(self, slots: Slots) -> npt.NDArray[np.int64]:
        """Index of each slot's file."""
        return slots.astype(np.int64) % self.directory_count

    def offsets(self, slots: Slots) -> npt.NDArray[np.int64]:
        """Where each slot begins in its file, in bytes."""
        return slots.astype(np.int64) // self.directory_count * self.slot_bytes


@dataclass(frozen=True)
class SsdFiles:
    """An open tier's files; made by :func:`open_files`.

    Attributes:
        fds: of the data files, O_DIRECT where ``direct``.
    """

    folders: tuple[Path, ...]
    fds: tuple[int, ...]
    locks: tuple[int, ...]
    slot_count: int
    places: SlotPlaces
    direct: bool

    @property
    def catalog_path(self) -> Path:
        """Of the catalogue, in the first folder."""
        return self.folders[0] / CATALOG_NAME

    def close(self) -> None:
        """Close the files, then let another owner in."""
        for fd in (*self.fds, *self.locks):
            os.close(fd)


def open_files(spec: SsdSpec) -> SsdFiles:
    """Make or open, lock, check and allocate. When it raises, nothing that was not there before is left.

    Raises:
        ConfigError: a directory cannot be used, or another process owns its data.
        CapacityError: the disk has not enough space.
    """
    per_directory = slots_per_directory(spec)
    name = folder_name(spec.identity, spec.layout)
    with contextlib.ExitStack() as undo:
        folders = tuple(_make_folder(Path(directory), name, undo) for directory in spec.directories)
        if len({folder.resolve() for folder in folders}) < len(folders):
            raise ConfigError("ssd_dirs: a directory is named twice")
        locks = tuple(_lock(folder, spec.lock_timeout_s, undo) for folder in folders)
        sizes = _sizes(spec, per_directory)
        _check_space(spec, folders, sizes)
        found = [
            _allocate(folder / DATA_NAME, size.data, undo)
            for folder, size in zip(folders, sizes, strict=True)
        ]
        for folder, size in zip(folders, sizes, strict=True):  # only now: what is cut off does not come back
            _shrink(folder / DATA_NAME, size.data)
        if not (all(found) and _belong_together(folders)):
            _begin_anew(spec, folders)
        fds, direct = _open_data(folders)
        undo.pop_all()
    places = SlotPlaces(len(folders), spec.layout.slot_bytes)
    return SsdFiles(folders, fds, locks, per_directory * len(folders), places, direct)


@dataclass(frozen=True)
class _Sizes:
    data: int
    catalog: int


def _sizes(spec: SsdSpec, per_directory: int) -> list[_Sizes]:
    count = len(spec.directories)
    catalog = catalog_bytes(per_directory * count, spec.layout.shard_count)
    return [_Sizes(per_directory * spec.layout.slot_bytes, 0 if i else catalog) for i in range(count)]


def _make_folder(directory: Path, name: str, undo: contextlib.ExitStack) -> Path:
    folder = directory / name
    try:
        for path, mode in ((directory, 0o755), (folder, 0o700)):
            if not path.exists():
                path.mkdir(mode)
                undo.callback(_remove_folder, path)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        folder.chmod(0o700)
    except OSError as error:
        raise _unusable(directory, error) from error
    return folder


def _unusable(directory: Path, error: OSError) -> FlexKVError:
    if error.errno == errno.ENOSPC:
        return CapacityError(f"ssd_bytes: nothing can be made in {directory}: {error.strerror}")
    return ConfigError(f"ssd_dirs: {directory} cannot be used: {error.strerror}")


def _remove_folder(path: Path) -> None:
    with contextlib.suppress(OSError):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def _lock(folder: Path, timeout_s: float, undo: contextlib.ExitStack) -> int:
    """The lock's descriptor. A process that was killed gives its lock back a little later: wait for it."""
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(folder.parent, error) from error
    undo.callback(os.close, fd)
    deadline = time.monotonic() + timeout_s
    while not try_lock(fd):
        if time.monotonic() > deadline:
            owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"ssd_dirs: {folder} is in use by process {owner}; two managers cannot share one SSD tier:"
                " give each a directory of its own"
            )
        time.sleep(_LOCK_POLL_S)
    with contextlib.suppress(
        OSError
    ):  # a full disk; whether there is room is checked next, and this only helps a reader
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def try_lock(fd: int) -> bool:
    """Take the lock if nobody holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_space(spec: SsdSpec, folders: tuple[Path, ...], sizes: list[_Sizes]) -> None:
    """Directories on one file system share its space."""
    needed: dict[int, int] = {}
    for folder, size in zip(folders, sizes, strict=True):
        device = folder.stat().st_dev
        needed[device] = needed.get(device, 0) + _lacking_bytes(spec, folder, size)
    for folder in folders:
        system = os.statvfs(folder)
        available = system.f_bavail * system.f_frsize
        asked = needed.pop(folder.stat().st_dev, 0)
        if asked > available:
            raise CapacityError(
                f"ssd_bytes: {asked} more bytes asked for in {folder.parent}, {available} bytes are available; lower ssd_bytes"
                " or name another directory in ssd_dirs"
            )


def _lacking_bytes(spec: SsdSpec, folder: Path, size: _Sizes) -> int:
    """What a folder must still get from its disk. Nothing if it was whole before: then it starts on a disk that is full."""
    data = folder / DATA_NAME
    lacking = max(0, size.data - data.stat().st_blocks * 512) if data.exists() else size.data
    if size.catalog:
        lacking += lacking_bytes(folder / CATALOG_NAME, slot_count(spec), spec.layout.shard_count)
    return lacking + (0 if (folder / IDENTITY_NAME).exists() else _SMALL_FILES_BYTES)


def _allocate(path: Path, size: int, undo: contextlib.ExitStack) -> bool:
    """Whether the file had been there."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with contextlib.closing(_Descriptor(fd)):
        before = os.fstat(fd).st_size
        undo.callback(_shrink, path, before)
        try:
            os.posix_fallocate(fd, 0, size)
            os.fsync(fd)
        except OSError as error:
            raise CapacityError(f"ssd_bytes: {size} bytes for {path} failed: {error.strerror}") from error
    return before > 0


@dataclass(frozen=True)
class _Descriptor:
    fd: int

    def close(self) -> None:
        os.close(self.fd)


def _shrink(path: Path, size: int) -> None:
    with contextlib.suppress(OSError):
        if path.stat().st_size > size:
            os.truncate(path, size)


def _belong_together(folders: tuple[Path, ...]) -> bool:
    """Whether the folders were one tier in this order before."""
    marks = [_read_identity(folder) for folder in folders]
    tier = marks[0].get("tier")
    return tier is not None and all(
        (mark.get("tier"), mark.get("member"), mark.get("members")) == (tier, member, len(folders))
        for member, mark in enumerate(marks)
    )


def _begin_anew(spec: SsdSpec, folders: tuple[Path, ...]) -> None:
    """Make one empty tier of the folders. The catalogue goes first: it does not describe what the slots hold now."""
    stale = [file for folder in folders for file in folder.glob(CATALOG_NAME + "*")]
    if stale:
        logger.warning(
            "ssd_dirs: the data are not those of the catalogue %s; the SSD tier starts empty", stale[0]
        )
    for file in stale:
        file.unlink()
    tier = os.urandom(8).hex()
    for member, folder in enumerate(folders):
        content = {
            "format": FORMAT_VERSION,
            "identity": spec.identity,
            "layout": spec.layout.as_dict(),
            "tier": tier,
            "member": member,
            "members": len(folders),
            "folders": [str(path) for path in folders],
        }
        _write_whole(folder / IDENTITY_NAME, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _read_identity(folder: Path) -> dict[str, Any]:
    try:
        return read_identity(folder)
    except StorageError as error:
        logger.debug("%s", error)
        return {}


def read_identity(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``identity.json``.

    Raises:
        StorageError: it is missing or not readable.
    """
    try:
        content = json.loads((folder / IDENTITY_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder / IDENTITY_NAME}: {error}") from error
    if not isinstance(content, dict):
        raise StorageError(f"{folder / IDENTITY_NAME}: a mapping is expected")
    return content


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".new")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with contextlib.closing(_Descriptor(fd)):
        os.write(fd, text.encode())
        os.fsync(fd)
    draft.rename(path)


def _open_data(folders: tuple[Path, ...]) -> tuple[tuple[int, ...], bool]:
    """Descriptors of the data files; with O_DIRECT if all file systems take it."""
    for flag in (os.O_DIRECT, 0):
        with contextlib.ExitStack() as undo:
            fds = []
            try:
                for folder in folders:
                    fds.append(os.open(folder / DATA_NAME, os.O_RDWR | os.O_CLOEXEC | flag))
                    undo.callback(os.close, fds[-1])
            except OSError as error:
                if error.errno == errno.EINVAL and flag:
                    logger.info(
                        "ssd_dirs: %s takes no O_DIRECT; the page cache is used", folders[len(fds)].parent
                    )
                    continue
                raise ConfigError(
                    f"ssd_dirs: {folders[len(fds)]} cannot be opened: {error.strerror}"
                ) from error
            undo.pop_all()
            return tuple(fds), bool(flag)
    raise AssertionError("unreachable")


def tier_folders(path: Path) -> Iterator[Path]:
    """FlexKV's folders in or at ``path``, by name."""
    if (path / IDENTITY_NAME).is_file():
        yield path
    elif path.is_dir():
        yield from sorted(p for p in path.glob(FOLDER_PREFIX + "*") if (p / IDENTITY_NAME).is_file())
