"""What is Mooncake's alone: its callers turn in a circle while a thread of the library moves the bytes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from flexkv_core.storage.base import BlockStatus
from flexkv_core.storage.remote import open_store
from tests.contract.storage.test_remote_store import Rig, mooncake_store, names


def test_who_waits_gives_way_to_who_moves_the_bytes(tmp_path: Path) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with mooncake_store(tmp_path) as spec:
        rig = Rig(open_store, spec)
        rig.fill(3)
        deadline = time.monotonic() + 20
        assert (rig.store.write(names("way", 4), rig.values(0, 4), deadline) == BlockStatus.OK).all()
        assert (rig.store.read(names("way", 4), rig.values(40, 4), deadline) == BlockStatus.OK).all()
        waiting = {t.native_id for t in threading.enumerate() if t.name.startswith("flexkv-mooncake")}
        assert waiting
        for thread in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(ProcessLookupError):
                nice = os.getpriority(os.PRIO_PROCESS, thread)
                assert (nice > usual) == (thread in waiting), (thread, nice, usual)
        rig.store.close()
    assert not any(t.name.startswith("flexkv-mooncake") for t in threading.enumerate())
