"""Paged copies of every implementation against plain slicing in numpy; nothing outside of the pieces may change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexkv_core.native import twin

# The fixture only chooses the implementation; it holds no state that examples could share.
shared_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@dataclass(frozen=True)
class Case:
    """A paged cache and a pool of random bytes, and who goes where."""

    paged: npt.NDArray[np.uint8]  # [paged_offset + segments * block_count * block_stride]
    pool: npt.NDArray[np.uint8]  # [pool_offset + slot_count * slot_stride]
    paged_offset: int
    pool_offset: int
    segments: int
    block_stride: int
    piece_bytes: int
    block_count: int
    slot_stride: int
    slot_count: int
    blocks: npt.NDArray[Any]
    slots: npt.NDArray[Any]
    blocks_per_slot: int
    shard_offset: int
    keys: bytes

    @classmethod
    def make(
        cls,
        *,
        piece_bytes: int,
        segments: int = 3,
        blocks_per_slot: int = 1,
        count: int = 4,
        gap: int = 0,
        paged_offset: int = 0,
        pool_offset: int = 0,
        shard_offset: int = 0,
        dtype: type = np.int64,
        seed: int = 0,
    ) -> Case:
        rng = np.random.default_rng(seed)
        block_count, slot_count = count * blocks_per_slot + 2, count + 2
        slot_stride = shard_offset + blocks_per_slot * segments * piece_bytes + gap
        return cls(
            paged=rng.integers(0, 256, paged_offset + segments * block_count * (piece_bytes + gap), np.uint8),
            pool=rng.integers(0, 256, pool_offset + slot_count * slot_stride, np.uint8),
            paged_offset=paged_offset,
            pool_offset=pool_offset,
            segments=segments,
            block_stride=piece_bytes + gap,
            piece_bytes=piece_bytes,
            block_count=block_count,
            slot_stride=slot_stride,
            slot_count=slot_count,
            blocks=rng.permutation(block_count)[: count * blocks_per_slot].astype(dtype),
            slots=rng.permutation(slot_count)[:count].astype(dtype),
            blocks_per_slot=blocks_per_slot,
            shard_offset=shard_offset,
            keys=rng.integers(0, 256, 16 * count, np.uint8).tobytes(),
        )

    def copy(self) -> Case:
        return replace(self, paged=self.paged.copy(), pool=self.pool.copy())

    def arguments(self, **changes: Any) -> dict[str, Any]:
        addrs = (
            self.paged.ctypes.data
            + self.paged_offset
            + np.arange(self.segments) * self.block_count * self.block_stride
        )
        given = {
            "segment_addrs": addrs.astype(np.int64),
            "block_strides": np.full(self.segments, self.block_stride, np.int64),
            "piece_bytes": self.piece_bytes,
            "blocks": self.blocks,
            "block_count": self.block_count,
            "slot_base": self.pool.ctypes.data + self.pool_offset,
            "slot_stride": self.slot_stride,
            "slots": self.slots,
            "slot_count": self.slot_count,
            "blocks_per_slot": self.blocks_per_slot,
            "shard_offset": self.shard_offset,
        }
        return given | changes

    def piece(self, block: int, segment: int) -> npt.NDArray[np.uint8]:
        at = self.paged_offset + (segment * self.block_count + block) * self.block_stride
        return self.paged[at : at + self.piece_bytes]

    def image(self, i: int) -> npt.NDArray[np.uint8]:
        at = self.pool_offset + int(self.slots[i]) * self.slot_stride + self.shard_offset
        return self.pool[at : at + self.blocks_per_slot * self.segments * self.piece_bytes]

    def pairs(self, i: int) -> list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        """(piece of the paged cache, its part of slot i's image), as views."""
        k, parts = self.blocks_per_slot, self.image(i).reshape(-1, self.piece_bytes)
        blocks = self.blocks[i * k : (i + 1) * k].tolist()
        return [
            (self.piece(b, s), parts[j * self.segments + s])
            for j, b in enumerate(blocks)
            for s in range(self.segments)
        ]

    def gathered(self) -> Case:
        expected = self.copy()
        for i in range(len(self.slots)):
            for piece, part in expected.pairs(i):
                part[:] = piece
        return expected

    def scattered(self, zeros: tuple[int, ...] = ()) -> Case:
        expected = self.copy()
        for i in range(len(self.slots)):
            for piece, part in expected.pairs(i):
                piece[:] = 0 if i in zeros else part
        return expected

    def crcs(self) -> npt.NDArray[np.uint32]:
        keys = [self.keys[16 * i : 16 * i + 16] for i in range(len(self.slots))]
        return np.array([twin.crc32c(key + self.image(i).tobytes()) for i, key in enumerate(keys)], np.uint32)

    def assert_equal(self, expected: Case) -> None:
        np.testing.assert_array_equal(self.paged, expected.paged)
        np.testing.assert_array_equal(self.pool, expected.pool)


CASES = st.builds(
    Case.make,
    piece_bytes=st.one_of(st.integers(1, 700), st.sampled_from([4096, 8192, 8256, 16384])),
    segments=st.integers(0, 4),
    blocks_per_slot=st.integers(1, 3),
    count=st.integers(0, 5),
    gap=st.integers(0, 65),
    paged_offset=st.integers(0, 65),
    pool_offset=st.integers(0, 65),
    shard_offset=st.integers(0, 130),
    dtype=st.sampled_from([np.int32, np.int64]),
    seed=st.integers(0, 2**16),
)

# More than the 4 MiB from which on the C code goes past the caches; unaligned, with a tail.
LARGE = {
    "piece_bytes": 40_003,
    "segments": 4,
    "blocks_per_slot": 2,
    "count": 16,
    "pool_offset": 5,
    "paged_offset": 3,
    "gap": 9,
}


@shared_fixture
@given(case=CASES)
def test_gather_fills_images_and_nothing_else(implementation, case):
    expected = case.gathered()
    implementation.gather(**case.arguments())
    case.assert_equal(expected)


@shared_fixture
@given(case=CASES)
def test_scatter_fills_pieces_and_nothing_else(implementation, case):
    expected = case.scattered()
    implementation.scatter(**case.arguments())
    case.assert_equal(expected)


@shared_fixture
@given(case=CASES, data=st.data())
def test_some_segments_of_an_image_alone(implementation, case, data):
    """As a load layer by layer copies them; the others' pieces stay as they are."""
    first = data.draw(st.integers(0, case.segments))
    stop = data.draw(st.integers(first, case.segments))
    given = case.arguments()
    given |= {
        "segment_addrs": given["segment_addrs"][first:stop],
        "block_strides": given["block_strides"][first:stop],
        "shard_offset": case.shard_offset + first * case.piece_bytes,
        "image_stride": case.segments * case.piece_bytes,
    }
    some = [at for at in range(case.blocks_per_slot * case.segments) if first <= at % case.segments < stop]
    gathered, scattered = case.copy(), case.copy()
    for i in range(len(case.slots)):
        for at in some:
            piece, part = gathered.pairs(i)[at]
            part[:] = piece
            piece, part = scattered.pairs(i)[at]
            piece[:] = part
    untouched = case.copy()
    implementation.scatter(**given)
    case.assert_equal(scattered)
    case.paged[:] = untouched.paged
    implementation.gather(**given)
    case.assert_equal(gathered)


@shared_fixture
@given(case=CASES)
def test_gather_crc_sums_what_it_wrote(implementation, case):
    expected, crcs = case.gathered(), np.zeros(len(case.slots), np.uint32)
    implementation.gather_crc(**case.arguments(), keys=case.keys, crc_out=crcs)
    case.assert_equal(expected)
    np.testing.assert_array_equal(crcs, expected.crcs())


@shared_fixture
@given(case=CASES, data=st.data())
def test_scatter_verify_leaves_nothing_of_what_is_not_whole(implementation, case, data):
    crcs = case.crcs()
    bad = tuple(i for i in range(len(case.slots)) if data.draw(st.booleans(), label=f"slot {i} is damaged"))
    for i in bad:
        if case.image(i).size:
            case.image(i)[data.draw(st.integers(0, case.image(i).size - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
        else:
            crcs[i] ^= 1
    expected, ok = case.scattered(zeros=bad), np.full(len(case.slots), 9, np.uint8)
    mismatches = implementation.scatter_verify(
        **case.arguments(), keys=case.keys, crc_expected=crcs, ok_out=ok
    )
    case.assert_equal(expected)
    assert mismatches == len(bad)
    assert ok.tolist() == [i not in bad for i in range(len(case.slots))]


@pytest.mark.parametrize(
    "shape", [LARGE, LARGE | {"piece_bytes": 65_536, "gap": 0, "pool_offset": 0, "paged_offset": 0}]
)
def test_large_transfers_past_the_caches(implementation, shape):
    case = Case.make(**shape)
    expected, crcs, ok = case.gathered(), np.zeros(16, np.uint32), np.zeros(16, np.uint8)
    implementation.gather_crc(**case.arguments(), keys=case.keys, crc_out=crcs)
    case.assert_equal(expected)
    np.testing.assert_array_equal(crcs, case.crcs())
    case.paged[:] = 0
    expected = case.scattered(zeros=(3, 15))
    case.image(3)[-1] ^= 1
    case.image(15)[0] ^= 128
    expected.pool[:] = case.pool
    mismatches = implementation.scatter_verify(
        **case.arguments(), keys=case.keys, crc_expected=crcs, ok_out=ok
    )
    case.assert_equal(expected)
    assert mismatches == 2
    assert np.flatnonzero(ok == 0).tolist() == [3, 15]


def test_a_swapped_image_is_noticed(implementation):
    case = Case.make(piece_bytes=64)
    crcs, ok = case.crcs(), np.zeros(4, np.uint8)
    first = case.image(0).copy()
    case.image(0)[:], case.image(1)[:] = case.image(1), first
    expected = case.scattered(zeros=(0, 1))
    swapped = crcs[[1, 0, 2, 3]]  # checksums that went along with the bytes do not help: the key is in them
    assert (
        implementation.scatter_verify(**case.arguments(), keys=case.keys, crc_expected=swapped, ok_out=ok)
        == 2
    )
    case.assert_equal(expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"blocks": np.array([0, 1, 2, 6])}, IndexError, r"blocks\[3\] is 6, expected 0 <= id < 6"),
        ({"blocks": np.array([0, -1, 2, 3])}, IndexError, r"blocks\[1\] is -1"),
        ({"slots": np.array([0, 1, 6, 2], np.int32)}, IndexError, r"slots\[2\] is 6, expected 0 <= id < 6"),
        ({"slots": np.array([0, 1, -7, 2], np.int32)}, IndexError, r"slots\[2\] is -7"),
        ({"blocks": np.array([0, 1, 2])}, ValueError, "blocks has length 3, expected 4"),
        ({"slots": np.array([0, 1, 2])}, ValueError, "blocks has length 4, expected 3"),
        ({"block_strides": np.zeros(2, np.int64)}, ValueError, "block_strides has length 2, expected 3"),
        ({"piece_bytes": -1}, ValueError, "piece_bytes is -1"),
        ({"blocks_per_slot": 0}, ValueError, "blocks_per_slot is 0"),
        ({"shard_offset": -1}, ValueError, "shard_offset -1"),
        ({"image_stride": 191}, ValueError, "image_stride is 191, expected 0 or at least the 192 bytes"),
        ({"image_stride": -1}, ValueError, "image_stride is -1"),
        (
            {"shard_offset": 1},
            ValueError,
            "an image of 192 bytes at shard_offset 1 does not lie in a slot of 192 bytes",
        ),
        ({"slot_stride": 191}, ValueError, "does not lie in a slot of 191 bytes"),
        ({"blocks": np.zeros(4)}, TypeError, "blocks must be"),
        ({"slots": np.zeros(4, np.uint32)}, TypeError, "slots must be"),
        ({"segment_addrs": np.zeros(3, np.int32)}, TypeError, "segment_addrs must be"),
        ({"blocks": np.zeros(8, np.int64)[::2]}, TypeError, "blocks must be"),
        ({"blocks": np.zeros((2, 2), np.int64)}, TypeError, "blocks must be"),
        ({"blocks": [0, 1, 2, 3]}, TypeError, "bytes-like|buffer|list"),
    ],
)
@pytest.mark.parametrize("function", ["gather", "scatter"])
def test_wrong_geometry_copies_nothing(implementation, function, change, error, message):
    case = Case.make(piece_bytes=64)
    before = case.copy()
    with pytest.raises(error, match=message):
        getattr(implementation, function)(**case.arguments(**change))
    case.assert_equal(before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": bytes(63)}, ValueError, "keys has length 63, expected 64"),
        ({"crc": np.zeros(3, np.uint32)}, ValueError, "has length 3, expected 4"),
        ({"crc": np.zeros(4, np.int64)}, TypeError, "must be a contiguous 1-D buffer of uint32"),
        ({"ok_out": np.zeros(5, np.uint8)}, ValueError, "ok_out has length 5, expected 4"),
        ({"ok_out": np.zeros(4, np.int32)}, TypeError, "ok_out must be"),
        ({"ok_out": bytes(4)}, TypeError, "ok_out must be writable"),
        ({"crc_out": bytes(16)}, TypeError, "crc_out must be"),
        ({"blocks": np.array([0, 1, 2, 6])}, IndexError, r"blocks\[3\]"),
    ],
)
def test_wrong_checksum_arguments_copy_nothing(implementation, change, error, message):
    case = Case.make(piece_bytes=64)
    before = case.copy()
    geometry = case.arguments(**{name: value for name, value in change.items() if name == "blocks"})
    keys, crc = change.get("keys", case.keys), change.get("crc", np.zeros(4, np.uint32))
    ok = change.get("ok_out", np.zeros(4, np.uint8))
    if "crc_out" not in change:
        with pytest.raises(error, match=message):
            implementation.scatter_verify(**geometry, keys=keys, crc_expected=crc, ok_out=ok)
    if "ok_out" not in change:
        with pytest.raises(error, match=message):
            implementation.gather_crc(**geometry, keys=keys, crc_out=change.get("crc_out", crc))
    case.assert_equal(before)


def test_sizes_that_overflow_are_refused(native_module):
    case = Case.make(piece_bytes=64)
    for change in ({"blocks_per_slot": 2**62}, {"piece_bytes": 2**62}):
        with pytest.raises(ValueError, match=r"overflow|has length|does not lie"):
            native_module.gather(**case.arguments(**change))
