"""A store of one's own for FlexKV's remote tier: plain files. What a store of NIXL, 3FS or another system looks like.

A distribution makes it known with an entry point, and ``remote_url`` chooses it by the scheme::

    [project.entry-points."flexkv.remote_stores"]
    files = "file_store:FileStore"
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flexkv_core.storage.base import BlockStatus, Statuses
from flexkv_core.storage.remote.base import Bytes, RemoteSpec, RemoteStore, Value


class FileStore(RemoteStore):
    """``files:/absolute/folder``."""

    probes_max = 256

    def __init__(self, spec: RemoteSpec, regions: Sequence[Bytes]) -> None:
        self._root = Path(spec.url.partition(":")[2])

    def exists(self, names: Sequence[str], deadline: float) -> Statuses:
        return self._each(names, deadline, lambda i, path: path.stat())

    def read(self, names: Sequence[str], values: Sequence[Value], deadline: float) -> Statuses:
        def read(index: int, path: Path) -> BlockStatus | None:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != values[index].size:
                    return BlockStatus.CORRUPT
                os.preadv(file.fileno(), values[index][:2], 0)
            return None

        return self._each(names, deadline, read)

    def write(self, names: Sequence[str], values: Sequence[Value], deadline: float) -> Statuses:
        def write(index: int, path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{os.getpid()}.{index}")  # a reader never sees a part
            beside.write_bytes(b"".join(values[index][:2]))
            beside.rename(path)

        return self._each(names, deadline, write)

    def delete(self, names: Sequence[str], deadline: float) -> None:
        self._each(names, deadline, lambda index, path: path.unlink())

    def close(self) -> None: ...

    def _each(self, names: Sequence[str], deadline: float, call: Callable[[int, Path], object]) -> Statuses:
        statuses = np.full(len(names), BlockStatus.IO_ERROR, np.uint32)
        for index, name in enumerate(names):
            if time.monotonic() >= deadline:
                break
            try:
                found = call(index, self._root / name)
                statuses[index] = found if isinstance(found, BlockStatus) else BlockStatus.OK
            except FileNotFoundError:
                statuses[index] = BlockStatus.DROPPED
            except OSError:
                pass  # stays IO_ERROR
        return statuses
