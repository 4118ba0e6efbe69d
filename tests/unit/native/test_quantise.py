"""Rounding to fp8 of every implementation against torch's own casts; nothing outside of images and pieces may change."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

shared_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)

Bits = npt.NDArray[np.uint16]
EVERY = np.arange(1 << 16, dtype=np.uint16)
FINITE = EVERY[(EVERY & 0x7F80) != 0x7F80]


def by_torch(piece: Bits) -> tuple[npt.NDArray[np.uint8], float, Bits]:
    """The 8-bit floats, the scale and what comes back, of one piece."""
    values = torch.from_numpy(piece.view(np.int16).copy()).view(torch.bfloat16).float()
    largest = values.abs().max() if len(values) else torch.tensor(0.0)
    scale = torch.tensor(1.0) if largest == 0 else largest / 448
    rounded = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    back = (rounded.float() * scale).to(torch.bfloat16)
    return rounded.view(torch.uint8).numpy(), float(scale), back.view(torch.int16).numpy().view(np.uint16)


class Paged:
    """``paged``: segments of blocks of bfloat16 with gaps between, and images with room around each."""

    def __init__(self, pieces: npt.NDArray[np.uint16], gap: int, spare: int, seed: int) -> None:
        """``pieces``: [segments, blocks, values]."""
        rng = np.random.default_rng(seed)
        self.pieces = pieces
        segments, blocks, values = pieces.shape
        self.paged = rng.integers(0, 1 << 16, (segments, blocks, values + gap), np.uint16)
        self.paged[:, :, :values] = pieces
        self.scales_offset = -(-segments * values // 4) * 4
        self.image_bytes = -(-(self.scales_offset + 4 * (segments + spare)) // 16) * 16
        self.images = rng.integers(0, 256, (2 * blocks + 1, self.image_bytes), np.uint8)
        self.order, self.rows = rng.permutation(blocks), 2 * rng.permutation(blocks) + 1

    def arguments(self, **changes: Any) -> dict[str, Any]:
        segments, blocks, values = self.pieces.shape
        return {
            "segment_addrs": self.paged.ctypes.data
            + np.arange(segments, dtype=np.int64) * self.paged.strides[0],
            "block_strides": np.full(segments, self.paged.strides[1], np.int64),
            "piece_bytes": 2 * values,
            "blocks": self.order.astype(np.int64),
            "block_count": blocks,
            "images": self.images.ctypes.data + self.rows.astype(np.int64) * self.image_bytes,
            "scales_offset": self.scales_offset,
            "image_bytes": self.image_bytes,
        } | changes

    def wanted_images(self) -> npt.NDArray[np.uint8]:
        images = self.images.copy()
        segments, _, values = self.pieces.shape
        for block, row in zip(self.order, self.rows, strict=True):
            images[row] = 0
            scales = images[row, self.scales_offset :].view(np.float32)
            for s in range(segments):
                images[row, s * values : (s + 1) * values], scales[s], _ = by_torch(self.pieces[s, block])
        return images

    def wanted_back(self) -> npt.NDArray[np.uint16]:
        paged = self.paged.copy()
        segments, blocks, values = self.pieces.shape
        for s in range(segments):
            for block in range(blocks):
                paged[s, block, :values] = by_torch(self.pieces[s, block])[2]
        return paged


def check(implementation: ModuleType, paged: Paged, parts: list[slice] | None = None) -> None:
    """There and back."""
    images = paged.wanted_images()
    implementation.quantise(**paged.arguments())
    assert (paged.images == images).all()
    back = paged.wanted_back()
    paged.paged[:, :, : paged.pieces.shape[2]] = 0
    arguments = paged.arguments()
    for part in parts or [slice(0, len(paged.pieces))]:
        own = {name: arguments[name][part] for name in ("segment_addrs", "block_strides")}
        implementation.dequantise(**arguments | own, first_segment=part.start)
    assert (paged.paged == back).all()
    assert (paged.images == images).all()


def values_of(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Bits:
    if kind == "zeros":
        return rng.choice(np.array([0, 0x8000], np.uint16), shape)
    if kind == "any finite":
        return rng.choice(FINITE, shape)
    if kind == "subnormal":
        return rng.choice(EVERY[(EVERY & 0x7F80) == 0], shape)
    magnitude = {"usual": 0, "huge": 37, "tiny": -37}[kind]
    values = torch.from_numpy(rng.standard_normal(shape) * 10.0**magnitude).to(torch.bfloat16)
    return values.nan_to_num().view(torch.int16).numpy().view(np.uint16)


KINDS = ("usual", "zeros", "any finite", "subnormal", "huge", "tiny")


@shared_fixture
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    blocks=st.integers(1, 4),
    values=st.integers(1, 200),
    gap=st.integers(0, 3),
    spare=st.integers(0, 5),
    seed=st.integers(0, 1 << 20),
)
def test_bytes_are_those_of_torch(
    implementation: ModuleType, kinds: list[str], blocks: int, values: int, gap: int, spare: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pieces = np.stack([values_of(kind, rng, (blocks, values)) for kind in kinds])
    whole = [slice(0, len(pieces))]
    layers = [slice(s, s + 1) for s in range(len(pieces))]
    check(implementation, Paged(pieces, gap, spare, seed), layers if seed % 2 else whole)


@pytest.mark.parametrize("largest", [1.0, 448.0, 3.0, 65280.0, 1e-38, 3e38, 7e-41])
def test_every_value_up_to_a_largest(implementation: ModuleType, largest: float) -> None:
    """With 448 the scale is 1: every bfloat16, ties included."""
    top = int(torch.tensor(largest, dtype=torch.bfloat16).view(torch.int16)) & 0x7FFF
    check(implementation, Paged(FINITE[top >= (FINITE & 0x7FFF)][None, None], 1, 0, 0))


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81])
def test_what_is_not_finite_shows_in_the_scale(implementation: ModuleType, bits: int) -> None:
    pieces = values_of("usual", np.random.default_rng(0), (3, 2, 40))
    pieces[1, 0, 17] = bits
    paged = Paged(pieces, 0, 0, 1)
    implementation.quantise(**paged.arguments())
    scales = paged.images[paged.rows][:, paged.scales_offset :].view(np.float32)[:, :3]
    finite = np.isfinite(scales)
    assert finite.sum() == 5
    assert not finite[list(paged.order).index(0), 1]


def test_relative_error_is_what_is_promised(implementation: ModuleType) -> None:
    """Half a step of 3 bits of mantissa for what is not far below the largest, plus a bfloat16's own rounding."""
    pieces = values_of("usual", np.random.default_rng(3), (2, 3, 500))
    paged = Paged(pieces, 0, 0, 0)
    implementation.quantise(**paged.arguments())
    implementation.dequantise(**paged.arguments())
    before, after = (
        torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float()
        for bits in (pieces, paged.paged)
    )
    largest = before.abs().amax(-1, keepdim=True)
    assert ((after - before).abs() <= before.abs() / 15.5 + largest / 448 / 1024).all()
    assert (after - before).abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"blocks": np.array([0, 9])}, IndexError),
        ({"blocks": np.array([0, -1])}, IndexError),
        ({"blocks": np.array([0])}, ValueError),
        ({"piece_bytes": 79}, ValueError),
        ({"piece_bytes": -2}, ValueError),
        ({"scales_offset": 116}, ValueError),
        ({"image_bytes": 131}, ValueError),
        ({"images": np.zeros(2, np.int32)}, TypeError),
        ({"segment_addrs": np.zeros(2, np.int64)}, ValueError),
    ],
)
def test_what_does_not_fit_is_refused(
    implementation: ModuleType, changes: dict[str, Any], error: type[Exception]
) -> None:
    paged = Paged(values_of("usual", np.random.default_rng(0), (3, 2, 40)), 0, 0, 0)
    images, bits = paged.images.copy(), paged.paged.copy()
    for copy in (implementation.quantise, implementation.dequantise):
        with pytest.raises(error):
            copy(**paged.arguments(**changes))
    with pytest.raises(ValueError, match="do not fit"):
        implementation.dequantise(**paged.arguments(), first_segment=1)
    assert (paged.images == images).all()
    assert (paged.paged == bits).all()
