"""The catalogue: what was put is there after any end, what rots is left out, and its files keep their bound."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv_core.errors import StorageError
from flexkv_core.storage.base import BlockBatch
from flexkv_core.storage.catalog import (
    BATCH_BLOCKS_MAX,
    LOG_BYTES,
    LOG_PAGES,
    Catalog,
    catalog_bytes,
    lacking_bytes,
    page_records,
)
from flexkv_core.storage.log_space import INDEX_BYTES

SHARDS = 2


def batch_of(slots: list[int] | np.ndarray, seed: int = 0) -> BlockBatch:
    slots = np.asarray(slots, np.int32)
    rng = np.random.default_rng(seed)
    keys, parents = (rng.integers(0, 2**63, (len(slots), 2), np.uint64) for _ in range(2))
    return BlockBatch(keys, parents, slots, slots)


def checksums_of(batch: BlockBatch) -> np.ndarray:
    return np.stack([batch.keys[:, 0] & 0xFFFFFFFF, batch.keys[:, 1] & 0xFFFFFFFF], axis=1).astype(np.uint32)


def put(catalog: Catalog, slots: list[int] | np.ndarray, seed: int = 0) -> BlockBatch:
    batch = batch_of(slots, seed)
    catalog.put(batch, checksums_of(batch))
    return batch


def test_what_was_put_is_there_again(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c", 1000, SHARDS)
    first, second = put(catalog, [0, 5, 999], 1), put(catalog, [6], 2)
    catalog.remove(np.array([5], np.int32))
    # Not closed: a process that is killed leaves it so.
    records = Catalog(tmp_path / "c", 1000, SHARDS, read_only=True).records()
    assert records.slots.tolist() == [0, 6, 999]
    assert records.keys == first.keys[0].tobytes() + second.keys[0].tobytes() + first.keys[2].tobytes()
    assert records.parents[:16] == first.parents[0].tobytes()
    assert (records.checksums[0] == checksums_of(first)[0]).all()
    assert records.generations.tolist() == [1, 2, 1]
    catalog.close()


@settings(max_examples=12)
@given(st.data())
def test_equals_a_dictionary(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path, count = tmp_path_factory.mktemp("catalog") / "c", 3 * page_records(SHARDS) + 1
    catalog, model = Catalog(path, count, SHARDS), dict[int, bytes]()
    slot_lists = st.lists(st.integers(0, count - 1), min_size=1, max_size=12, unique=True)
    actions = data.draw(st.lists(st.sampled_from(["put", "remove", "clear", "reopen"]), max_size=12))
    for seed, action in enumerate(actions):
        if action == "put":
            batch = put(catalog, data.draw(slot_lists), seed)
            model.update(zip(batch.slots.tolist(), (key.tobytes() for key in batch.keys), strict=True))
        elif action == "remove":
            slots = data.draw(slot_lists)
            catalog.remove(np.array(slots, np.int32))
            model = {slot: key for slot, key in model.items() if slot not in slots}
        elif action == "clear":
            catalog.clear()
            model.clear()
        else:
            catalog = Catalog(path, count, SHARDS)
        for source in (catalog, Catalog(path, count, SHARDS, read_only=True)):
            records = source.records()
            held = [records.keys[16 * i : 16 * i + 16] for i in range(len(records))]
            assert dict(zip(records.slots.tolist(), held, strict=True)) == model
    catalog.close()


def test_other_slot_counts_keep_what_fits(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c", 100, SHARDS)
    put(catalog, np.arange(100))
    catalog.close()
    for count, held in ((57, 57), (100, 57), (300, 57)):  # what was cut off does not come back
        catalog = Catalog(tmp_path / "c", count, SHARDS)
        assert len(catalog.records()) == held
        catalog.close()


def test_flipped_bytes_never_become_records(tmp_path: Path) -> None:
    path, count = tmp_path / "c", 4000
    rng = random.Random(1)
    lost = 0
    for round_number in range(12):
        path.unlink(missing_ok=True)
        catalog = Catalog(path, count, SHARDS)
        batch = put(catalog, np.arange(count), round_number)
        catalog.close()
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 10, 1000])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        catalog = Catalog(path, count, SHARDS)
        records = catalog.records()
        keys = np.frombuffer(records.keys, np.uint64).reshape(-1, 2)
        assert (keys == batch.keys[records.slots]).all()
        assert (records.checksums == checksums_of(batch)[records.slots]).all()
        lost += len(records) < count
        put(catalog, [0, count - 1], 99)  # it can be used on
        catalog.close()
    assert lost > 4


@pytest.mark.parametrize("content", [b"", b"not a database" * 1000])
def test_another_file_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c").write_bytes(content)
    catalog = Catalog(tmp_path / "c", 100, SHARDS)
    assert len(catalog.records()) == 0
    put(catalog, [1])
    catalog.close()
    assert len(Catalog(tmp_path / "c", 100, SHARDS).records()) == 1
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o600


def test_read_only_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="unable to open"):
        Catalog(tmp_path / "c", 100, SHARDS, read_only=True)


def test_a_failed_commit_changes_nothing(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "c", 100, SHARDS)
    put(catalog, [1, 2])
    other = sqlite3.connect(tmp_path / "c", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    catalog._database.execute("PRAGMA busy_timeout = 10")
    before = catalog.records()
    with pytest.raises(StorageError, match="locked"):
        put(catalog, [2, 3], 5)
    with pytest.raises(StorageError, match="locked"):
        catalog.remove(np.array([1], np.int32))
    with pytest.raises(StorageError, match="locked"):
        catalog.clear()
    assert catalog.records().keys == before.keys
    other.execute("ROLLBACK")
    put(catalog, [3])
    assert catalog.records().slots.tolist() == [1, 2, 3]
    catalog.close()


@pytest.mark.parametrize("shards", [1, 8, 300])
def test_files_keep_their_bound(tmp_path: Path, shards: int) -> None:
    count = 20_000
    catalog = Catalog(tmp_path / "c", count, shards)
    rng = np.random.default_rng(0)
    for _ in range(2 * LOG_PAGES // min(BATCH_BLOCKS_MAX, 1024)):
        slots = rng.choice(count, 1024, replace=False).astype(np.int32)
        catalog.put(batch_of(slots), np.ones((1024, shards), np.uint32))
    found = [file.stat() for file in tmp_path.iterdir()]
    size = sum({file.st_ino: file.st_size for file in found}.values())  # the log has two names
    assert size <= catalog_bytes(count, shards)
    catalog.close()


def test_the_log_keeps_its_space_while_nobody_has_it_open(tmp_path: Path) -> None:
    path = tmp_path / "c"
    expected = np.zeros((0, 1), np.uint32)
    inode = 0
    for round_ in range(3):
        catalog = Catalog(path, 300, 1)
        assert (catalog.table["checksums"][: len(expected)] == expected).all()
        log = (tmp_path / "c-wal").stat()
        assert (tmp_path / "c-reserve").stat().st_ino == log.st_ino
        assert log.st_blocks * 512 >= LOG_BYTES
        assert log.st_ino == (inode or log.st_ino), "the space was given away in between"
        inode = log.st_ino
        assert lacking_bytes(path, 300, 1) == 0
        expected = np.full((200, 1), round_ + 7, np.uint32)
        catalog.put(batch_of(np.arange(200, dtype=np.int32)), expected)
        catalog.close()
        assert not (tmp_path / "c-wal").exists()
        assert (tmp_path / "c-spare").stat().st_blocks * 512 >= INDEX_BYTES
        assert lacking_bytes(path, 300, 1) == 0
    assert lacking_bytes(path, 30_000, 1) > 0
