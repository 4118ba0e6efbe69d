"""The kernels byte for byte against the torch reference, in Triton's interpreter: tiny copies of every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv_kernels.gpu_bench.geometry import DTYPES, LAYOUTS, Geometry
from flexkv_kernels.gpu_bench.quantised_trip import QuantisedCase
from flexkv_kernels.gpu_bench.round_trip import Case
from tests.unit.kernels.interpreter import Interpreter

BLOCK_SIZES = (1, 2, 16, 64, 256)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype_at_every_block_size(
    interpreter: Interpreter, layout: str, dtype: str
) -> None:
    for tokens in BLOCK_SIZES:
        case = Case(Geometry(layout, dtype, blocks=4, tokens=tokens), seed=tokens, moved=3, gap=16)
        assert not interpreter.differences(case), case


@pytest.mark.parametrize("gap", [16, 8, 4, 2, 1])
def test_every_width(interpreter: Interpreter, gap: int) -> None:
    """The gap between images decides how wide an access may be."""
    case = Case(Geometry("kv_inner", "bf16", 4, 16), seed=gap, moved=4, gap=gap, skip=True)
    assert not interpreter.differences(case)


def test_pieces_longer_than_a_tile_with_a_tail(interpreter: Interpreter) -> None:
    case = Case(
        Geometry("kv_outer", "bf16", 3, tokens=67, layers=1, heads=3, dim=24), seed=1, moved=3, gap=16
    )
    assert not interpreter.differences(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_by_layer(interpreter: Interpreter, layout: str) -> None:
    case = Case(Geometry(layout, "bf16", 4, 16, layers=3), seed=5, moved=3, gap=16, layerwise=True)
    assert not interpreter.differences(case)


@pytest.mark.parametrize("gap", [16, 8, 4])
def test_checksum_on_the_way(interpreter: Interpreter, gap: int) -> None:
    case = Case(Geometry("pools", "bf16", 4, 33), seed=gap, moved=3, gap=gap, checksum=True)
    assert not interpreter.differences(case)
    assert not interpreter.differences(replace(case, skip=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounding_to_fp8(interpreter: Interpreter, layout: str) -> None:
    """Odd pieces with left-out blocks and back layer by layer; whole ones with spare scales."""
    odd = QuantisedCase(Geometry(layout, "bf16", 4, 3, layers=2), 3, moved=3, skip=True, layerwise=True)
    whole = QuantisedCase(Geometry(layout, "bf16", 4, 16, layers=2), 16, moved=2, spare=1)
    for case in (odd, whole):
        assert not interpreter.differences(case), case


@pytest.mark.parametrize("dim", [24, 1])
def test_rounding_pieces_longer_than_a_tile_with_a_tail(interpreter: Interpreter, dim: int) -> None:
    """Both widths of access, by what divides a piece."""
    case = QuantisedCase(
        Geometry("kv_outer", "bf16", 3, tokens=1501 if dim < 24 else 67, layers=1, heads=1, dim=dim),
        dim,
        moved=3,
    )
    assert not interpreter.differences(case)


geometries = st.builds(
    Geometry,
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(sorted(DTYPES)),
    blocks=st.integers(1, 6),
    tokens=st.sampled_from([1, 2, 3, 5, 7, 16, 17, 32, 48, 128, 256]),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim=st.integers(1, 17),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    geometry = draw(geometries)
    return Case(
        geometry,
        seed=draw(st.integers(0, 2**20)),
        moved=draw(st.integers(1, geometry.blocks)),
        gap=draw(st.sampled_from([0, 1, 2, 4, 8, 16, 24, 64])),
        programs=draw(st.integers(1, 9)),
        skip=draw(st.booleans()),
    )


@settings(max_examples=60)
@given(case=cases())
def test_random_layouts(interpreter: Interpreter, case: Case) -> None:
    assert not interpreter.differences(case)
