"""Several files replaced at once: all of them or none, also when the process is killed half-way.

New contents are written beside the files and synced, the old files stay as hard links (copies where the file system has no links), and a
journal names both before the first file is replaced. Whoever comes next, under the same lock, undoes what a journal describes; once the
journal is gone, the change is done. A file is replaced by renaming, so that a package manager's links to the old one keep the old bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from flexkv_core.errors import PatchError

_NEW, _OLD = ".flexkv-new", ".flexkv-old"
_JOURNAL = ".flexkv-patch-journal"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for a change; one that another process left half-way is undone first.

    Raises:
        PatchError: another process is at work there, or the folder cannot be opened.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise PatchError(f"{folder} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _recover(folder)
        yield
    except BlockingIOError as error:
        raise PatchError(f"another process is patching {folder}") from error
    finally:
        os.close(handle)


def replace_all(folder: Path, contents: Mapping[Path, bytes | None]) -> None:
    """Give each file below ``folder`` its new content (None: remove it); the folder must be :func:`locked`.

    Modes are kept. Raises PatchError when something fails; then every file is as it was.
    """
    try:
        try:
            _prepare(folder, contents)
            for path, content in contents.items():
                if content is None:
                    path.unlink(missing_ok=True)
                else:
                    Path(f"{path}{_NEW}").replace(path)
            _sync_folders(contents)
            (folder / _JOURNAL).unlink()
        except BaseException:
            _recover(folder)
            raise
    except OSError as error:
        raise PatchError(f"nothing was changed: {error.filename or folder}: {error.strerror}") from error
    with contextlib.suppress(
        OSError
    ):  # without the journal the change is done; the next one removes what is left beside the files
        _sync_folder(folder)
        _remove_litter(folder)


def is_unfinished(folder: Path) -> bool:
    """Whether a change was left half-way there; the next one undoes it."""
    return (folder / _JOURNAL).exists()


def _recover(folder: Path) -> None:
    """Undo what a journal describes, and remove what lies beside the files. Needs no space on the disk.

    Raises:
        PatchError: it cannot be undone.
    """
    journal = folder / _JOURNAL
    try:
        if journal.is_file():
            entries = {folder / name: existed for name, existed in json.loads(journal.read_text()).items()}
            for path, existed in entries.items():
                _restore(path, existed)
            _sync_folders(entries)
            journal.unlink()
            _sync_folder(folder)
        _remove_litter(folder)
    except (OSError, ValueError) as error:
        raise PatchError(
            f"{journal}: an earlier change was left half-way and cannot be undone: {error}"
        ) from error


def _prepare(folder: Path, contents: Mapping[Path, bytes | None]) -> None:
    """New contents and old files beside each other on the disk, then the journal."""
    for path, content in contents.items():
        if content is not None:
            _write_synced(Path(f"{path}{_NEW}"), content, like=path)
        if path.exists():
            _keep(path)
    _sync_folders(contents)
    entries = {os.path.relpath(path, folder): path.exists() for path in contents}
    journal = folder / _JOURNAL
    _write_synced(Path(f"{journal}{_NEW}"), json.dumps(entries).encode())
    Path(f"{journal}{_NEW}").replace(journal)
    _sync_folder(folder)


def _keep(path: Path) -> None:
    old = Path(f"{path}{_OLD}")
    old.unlink(missing_ok=True)
    try:
        os.link(path, old)
    except OSError:
        shutil.copy2(path, old)
        with old.open("rb") as file:
            os.fsync(file.fileno())


def _restore(path: Path, existed: bool) -> None:
    old = Path(f"{path}{_OLD}")
    if old.exists():
        os.replace(old, path)
    elif not existed:
        path.unlink(missing_ok=True)


def _remove_litter(folder: Path) -> None:
    for suffix in (_NEW, _OLD):
        for path in folder.rglob(f"*{suffix}"):
            path.unlink(missing_ok=True)


def _write_synced(path: Path, content: bytes, like: Path | None = None) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if like is not None and like.exists():
        shutil.copymode(like, path)


def _sync_folders(paths: Iterable[Path]) -> None:
    for folder in {path.parent for path in paths}:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
