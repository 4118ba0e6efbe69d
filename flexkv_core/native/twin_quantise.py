"""The rounding of one piece of bfloat16 to float8_e4m3fn and back, in numpy: by the table of all values, where the C code works on bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]


def _magnitudes() -> npt.NDArray[np.float32]:
    """float32 [127]: the finite magnitudes of float8_e4m3fn by their code: a sign, 4 bits of exponent (bias 7), 3 of mantissa; code 127 is
    NaN."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return values.astype(np.float32)


MAGNITUDES = _magnitudes()
LARGEST = MAGNITUDES[-1]
_MIDDLES = (MAGNITUDES[:-1] + MAGNITUDES[1:]) / np.float32(2)  # exact: they have one bit more


def quantised(values: _Array) -> tuple[_Array, np.float32]:
    """uint8 [n] and the scale of bfloat16 ``values``, uint16 [n]; zeros and a scale that is not finite where a value is not."""
    floats = _floats(values)
    largest = np.abs(floats).max() if len(floats) else np.float32(0)
    with np.errstate(all="ignore"):
        scale = largest / LARGEST if largest != 0 else np.float32(1)
    if not np.isfinite(largest):
        return np.zeros(len(values), np.uint8), scale
    ratios = floats / scale
    magnitudes = np.minimum(np.abs(ratios), LARGEST)
    codes = np.searchsorted(_MIDDLES, magnitudes)  # a tie goes down here
    is_tie = magnitudes == _MIDDLES[np.minimum(codes, len(_MIDDLES) - 1)]
    codes += is_tie & (codes % 2 == 1)
    return (codes | np.signbit(ratios) * 128).astype(np.uint8), scale


def dequantised(codes: _Array, scale: np.float32) -> _Array:
    """bfloat16 values as uint16 [n] of uint8 ``codes``, none of which is NaN."""
    floats = MAGNITUDES[np.minimum(codes & 127, 126)] * scale
    bits = floats.view(np.uint32) | (codes & 128).astype(np.uint32) << np.uint32(24)
    return _to_bfloat16(bits)


def _floats(values: _Array) -> npt.NDArray[np.float32]:
    floats: npt.NDArray[np.float32] = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return floats


def _to_bfloat16(bits: _Array) -> _Array:
    """The upper half of float32 ``bits``, rounded to the nearest, ties to even."""
    low, half = bits & np.uint32(0xFFFF), np.uint32(0x8000)
    upper = bits >> np.uint32(16)
    is_up = (low > half) | ((low == half) & (upper % 2 == 1))
    rounded: _Array = (upper + is_up).astype(np.uint16)
    return rounded
