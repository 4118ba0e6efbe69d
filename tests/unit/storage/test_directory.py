"""The files of an SSD tier: allocated or refused as a whole, private, locked, and never mixed up."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flexkv_core.errors import CapacityError, ConfigError
from flexkv_core.layout import KVLayout
from flexkv_core.storage import directory
from flexkv_core.storage.base import SsdSpec
from flexkv_core.storage.directory import SlotPlaces, open_files, slot_count

LAYOUT = KVLayout(16, 16, 20_000, 2)
MIB = 1 << 20


def spec_of(*directories: Path, size: int = 32 * MIB, **changes: object) -> SsdSpec:
    spec = SsdSpec(tuple(map(str, directories)), size, {"model": "m"}, LAYOUT, lock_timeout_s=0.1)
    return replace(spec, **changes)  # type: ignore[arg-type]


def taken(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())


def test_allocated_in_full_private_and_within_the_bound(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "a", tmp_path / "b")
    files = open_files(spec)
    assert files.slot_count == slot_count(spec)
    assert files.slot_count > 2 * 20 * MIB // LAYOUT.slot_bytes
    for name in "ab":
        assert 0 < taken(tmp_path / name) <= spec.bytes_per_directory
        for path in (tmp_path / name).rglob("*"):
            assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    identity = json.loads((files.folders[1] / "identity.json").read_text())
    assert identity["identity"] == {"model": "m"}
    assert identity["member"] == 1
    files.close()


def test_stripes_do_not_overlap() -> None:
    places = SlotPlaces(3, 4096)
    slots = np.arange(300, dtype=np.int32)
    assert len(set(zip(places.files(slots).tolist(), places.offsets(slots).tolist(), strict=True))) == 300
    assert places.offsets(slots).max() == 99 * 4096


def test_large_slots_do_not_overflow() -> None:
    assert SlotPlaces(1, 4 << 20).offsets(np.array([2**31 - 1], np.int32))[0] == (2**31 - 1) * (4 << 20)


def test_a_second_owner_is_refused(tmp_path: Path) -> None:
    first = open_files(spec_of(tmp_path))
    with pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()}; two managers"):
        open_files(spec_of(tmp_path))
    first.close()
    open_files(spec_of(tmp_path)).close()


def test_too_large_for_the_disk_leaves_nothing(tmp_path: Path) -> None:
    system = os.statvfs(tmp_path)
    half = int(system.f_bavail * system.f_frsize * 0.6)
    for spec in (spec_of(tmp_path / "a", size=10 * half), spec_of(tmp_path / "a", tmp_path / "b", size=half)):
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(
            CapacityError, match=r"ssd_bytes: \d+ more bytes asked for in .*, \d+ bytes are available"
        ):
            open_files(spec)
        assert not list(tmp_path.iterdir())
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_failing_allocation_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_files(spec_of(tmp_path / "a")).close()
    before = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.name != "lock"}

    def refuse(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory.os, "posix_fallocate", refuse)
    with pytest.raises(CapacityError, match="No space left"):
        open_files(spec_of(tmp_path / "a", size=40 * MIB))
    with pytest.raises(CapacityError, match="No space left"):
        open_files(spec_of(tmp_path / "a", tmp_path / "b"))
    assert {path: path.stat().st_size for path in tmp_path.rglob("*") if path.name != "lock"} == before


def test_no_block_fits(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="hold no block; one needs"):
        open_files(spec_of(tmp_path, size=MIB))


def test_other_data_lie_apart(tmp_path: Path) -> None:
    one = open_files(spec_of(tmp_path))
    two = open_files(spec_of(tmp_path, identity={"model": "other"}))
    three = open_files(spec_of(tmp_path, layout=replace(LAYOUT, shard_count=1)))
    assert len({files.folders for files in (one, two, three)}) == 3
    for files in (one, two, three):
        files.close()


def test_directories_in_another_order_start_empty(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for order, kept in (((a, b), True), ((a, b), True), ((b, a), False), ((b,), False), ((a, b), False)):
        marker = directory.folder_name({"model": "m"}, LAYOUT)
        stale = [path / marker / "catalog.sqlite" for path in (a, b) if (path / marker).exists()]
        for file in stale:
            file.touch()
        open_files(spec_of(*order)).close()
        assert all(file.exists() == kept for file in stale if file.parent.parent in order), order


def test_a_directory_named_twice(tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(tmp_path)
    with pytest.raises(ConfigError):
        open_files(spec_of(tmp_path, tmp_path / "b"))


def test_a_directory_that_cannot_be_made() -> None:
    with pytest.raises(ConfigError, match=r"ssd_dirs: /proc/nothing/here cannot be used"):
        open_files(spec_of(Path("/proc/nothing/here")))
