"""``flexkv fsck``: says what is wrong, mends a directory that is not in use, and leaves a living one alone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from flexkv_core.cli.app import app
from flexkv_core.storage.ssd import SsdStore
from flexkv_core.transfer.storage_process import StorageProcess
from tests.contract.storage.rig import OK, Host, batch_of, read_all, spec_of

COUNT = 100


def fsck(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["fsck", *arguments])


def report(*arguments: str) -> dict[str, object]:
    result = fsck("--json", *arguments)
    content: dict[str, object] = json.loads(result.stdout)
    assert result.exit_code == (0 if content["clean"] else 1)
    return content


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.segment.close()


@pytest.fixture
def store(tmp_path: Path, host: Host) -> Iterator[SsdStore]:
    store = SsdStore(spec_of(tmp_path, 2), host.segment)
    host.fill(np.arange(COUNT), np.arange(COUNT))
    batch = batch_of(np.arange(COUNT), np.arange(COUNT), np.arange(COUNT))
    assert (store.writer.write(batch) == OK).all()
    yield store
    store.close()


def flip_data(folder: Path, slots: list[int], slot_bytes: int) -> None:
    """Slots of the second of two directories are odd."""
    with next((folder / "ssd1").rglob("data")).open("r+b") as file:
        for slot in slots:
            file.seek(slot // 2 * slot_bytes + 777)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))


def test_a_directory_in_use_is_reported_and_not_touched(store: SsdStore, tmp_path: Path) -> None:
    first = str(tmp_path / "ssd0")
    found = report(first)
    assert (found["live"], found["clean"], found["blocks"], found["checked_blocks"]) == (
        True,
        True,
        COUNT,
        COUNT,
    )
    flip_data(tmp_path, [3, 41], store.layout.slot_bytes)
    assert report(first)["corrupt_slots"] == [3, 41]
    refused = fsck("--repair", first)
    assert refused.exit_code == 2
    assert "is in use; stop its owner" in refused.stderr.replace("\n", " ")
    assert len(store.catalog.records()) == COUNT


def test_repair_removes_what_is_wrong(store: SsdStore, tmp_path: Path, host: Host) -> None:
    store.close()
    flip_data(tmp_path, [3, 41], store.layout.slot_bytes)
    first = str(tmp_path / "ssd0")
    assert report(first)["corrupt_slots"] == [3, 41]
    mended = report("--repair", first)
    assert (mended["clean"], mended["removed_records"]) == (True, 2)
    again = report(first)
    assert (again["clean"], again["blocks"], again["corrupt_slots"]) == (True, COUNT - 2, [])
    store.__init__(spec_of(tmp_path, 2), host.segment)  # type: ignore[misc]
    records = store.catalog.records()
    assert (read_all(store, batch_of(records.slots, records.slots, np.arange(COUNT - 2))) == OK).all()


def test_a_catalogue_that_rotted(store: SsdStore, tmp_path: Path, host: Host) -> None:
    store.close()
    catalog = next(tmp_path.rglob("catalog.sqlite"))
    rng = random.Random(0)
    content = bytearray(catalog.read_bytes())
    for _ in range(1000):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    catalog.write_bytes(content)
    assert fsck(str(tmp_path / "ssd0")).exit_code in (1, 2)
    assert fsck("--repair", str(tmp_path / "ssd0")).exit_code == 0
    assert report(str(tmp_path / "ssd0"))["clean"]
    store.__init__(spec_of(tmp_path, 2), host.segment)  # type: ignore[misc]


def test_after_a_kill(tmp_path: Path, host: Host) -> None:
    host.fill(np.arange(COUNT), np.arange(COUNT))
    process = StorageProcess(spec_of(tmp_path), host.segment, lambda progress: None)
    process.start()
    batch = batch_of(np.arange(COUNT), np.arange(COUNT), np.arange(COUNT))
    process.write(1, batch.keys.tobytes(), batch.parents.tobytes(), batch.slots, batch.host_slots)
    os.kill(process.pid, signal.SIGKILL)
    process.close()
    found = report(str(tmp_path / "ssd0"))
    assert (found["live"], found["clean"]) == (False, True)


def test_what_it_cannot_check(store: SsdStore, tmp_path: Path) -> None:
    nothing = fsck(str(tmp_path / "nothing"))
    assert (nothing.exit_code, "holds no data of FlexKV" in nothing.stderr.replace("\n", " ")) == (2, True)
    second = fsck(str(tmp_path / "ssd1"))
    assert second.exit_code == 2
    assert str(store.files.folders[0]) in second.stderr.replace("\n", "")
    assert "not in use" not in fsck(str(tmp_path / "ssd0")).stdout


def test_other_identities_are_named_and_removed_when_asked(tmp_path: Path, host: Host) -> None:
    specs = [replace(spec_of(tmp_path, 2), identity={"model": name}) for name in "abc"]
    folders = {}
    for age_days, spec in zip((9, 3, 5), specs, strict=True):
        store = SsdStore(spec, host.segment)
        folders[age_days] = store.files.folders
        store.close()
        for folder in store.files.folders:
            for file in folder.iterdir():
                os.utime(file, (time.time() - age_days * 86_400,) * 2)
    first = str(tmp_path / "ssd0")
    said = fsck(first).stdout
    for age_days, named in ((9, True), (3, False), (5, True)):
        assert (f"{folders[age_days][0]}: another identity, 0.04 GiB" in said) == named
    assert "last used 9.0 days ago" in said
    assert all(folder.exists() for pair in folders.values() for folder in pair)
    living = SsdStore(specs[0], host.segment)  # the oldest
    removed = fsck("--remove-other-identities", "--json", first)
    assert removed.exit_code == 0
    gone = [json.loads(line)["removed"] for line in removed.stdout.splitlines()]
    assert sorted(gone) == sorted([str(folder) for folder in folders[age]] for age in (3, 5))
    assert [folder.exists() for age in (9, 3, 5) for folder in folders[age]] == [True] * 2 + [False] * 4
    living.close()
    assert fsck("--remove-other-identities", first).stdout == ""
    assert report(first)["clean"]
