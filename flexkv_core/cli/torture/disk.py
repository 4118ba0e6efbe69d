"""An SSD tier's files as they lie there, compared with what they must hold without the code that serves."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexkv_core.cli.torture.device import BLOCK_BYTES, wrong_bytes
from flexkv_core.storage.base import Records
from flexkv_core.storage.catalog import Catalog
from flexkv_core.storage.directory import CATALOG_NAME, DATA_NAME, FOLDER_PREFIX, LOCK_NAME, try_lock
from flexkv_core.types import KEY_BYTES

_OWNER_GONE_S = 30.0
_CHAIN_START = bytes(KEY_BYTES)  # stands for the parent of a chain's first block


@dataclass(frozen=True)
class Image:
    """What a tier's catalogue records.

    Attributes:
        wrong: bytes of recorded slots that are not what their keys say.
        bad_rows: unreadable rows of the catalogue.
    """

    records: Records
    wrong: int
    bad_rows: int

    def chains(self) -> list[bytes]:
        """Keys from the first block of a chain to its last, 16 bytes a block, for every last one. Blocks whose chain is broken
        above them are in none."""
        keys, parents = _split(self.records.keys), _split(self.records.parents)
        parent_of, inner = dict(zip(keys, parents, strict=True)), set(parents)
        chains = []
        for last in sorted(set(keys) - inner):
            chain = [last]
            while (above := parent_of[chain[-1]]) in parent_of:
                chain.append(above)
            if parent_of[chain[-1]] == _CHAIN_START:
                chains.append(b"".join(reversed(chain)))
        return chains


def take_image(directories: list[str], slot_count: int) -> Image:
    """Of the tier in ``directories``, once its owner is gone. The catalogue is recovered as any reader of SQLite would.

    Raises:
        RuntimeError: the owner does not end.
        StorageError: the catalogue cannot be read.
    """
    folders = [next(Path(directory).glob(FOLDER_PREFIX + "*")) for directory in directories]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_locked(folder / LOCK_NAME))
        catalog = Catalog(folders[0] / CATALOG_NAME, slot_count, shard_count=1, read_only=True)
        stack.callback(catalog.close)
        records = catalog.records()
        wrong = 0
        for member, folder in enumerate(folders):
            data = np.memmap(folder / DATA_NAME, np.uint8, "r").reshape(-1, BLOCK_BYTES)
            mine = np.flatnonzero(records.slots % len(folders) == member)
            if len(mine):
                keys = np.frombuffer(records.keys, "V16")[mine].tobytes()
                wrong += wrong_bytes(data[records.slots[mine] // len(folders)], keys)
        return Image(records, wrong, catalog.bad_pages)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _OWNER_GONE_S
        while not try_lock(fd):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{path}: its owner does not end")
            time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def _split(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
