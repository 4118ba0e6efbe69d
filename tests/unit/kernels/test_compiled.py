"""Every kernel variant, compiled ahead of time for GPUs that are not there: wide accesses, few registers, nothing spilled."""

from __future__ import annotations

import re

import pytest

from flexkv_kernels.access import Access, all_accesses
from flexkv_kernels.quantised_copy import all_variants
from tests.unit.kernels.compiled import TARGETS, compiled, compiled_rounding, machine_code, resources

REGISTERS_MAX = 40

# Payload accesses by width, (load, store). The tables are read with 8-byte loads, which is why loads are looked for by presence.
SASS = {16: "{}.E.128", 8: "{}.E.64", 4: r"{}.E(?= |\.)", 2: "{}.E.U16", 1: "{}.E.U8"}
AMD = {16: "dwordx4", 8: "dwordx2", 4: "dword", 2: "u?short", 1: "u?byte"}
PTX = {16: r"\.v4\.b32", 8: r"\.v2\.b32", 4: r"\.b32", 2: r"\.b16", 1: r"\.b8"}


@pytest.mark.parametrize("to_images", [True, False], ids=["gather", "scatter"])
@pytest.mark.parametrize("access", all_accesses(), ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_variant_is_wide_and_small(target: str, access: Access, to_images: bool) -> None:
    kernel = compiled(target, access, to_images)
    found = resources(target, kernel)
    assert found.spilled == 0
    assert 8 <= found.registers <= REGISTERS_MAX
    code = machine_code(target, kernel)
    for access_pattern in _payload_patterns(target, access.vector_bytes):
        assert re.search(access_pattern, code), f"no {access_pattern} in:\n{code[:4000]}"
    if access.vector_bytes == 16:
        assert len(_narrow_stores(target, code)) == 0


@pytest.mark.parametrize("to_images", [True, False], ids=["quantise", "dequantise"])
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, id=str(variant), marks=[] if variant[0] > 1 else [pytest.mark.extended])
        for variant in all_variants()
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_rounding_variant_is_wide_and_small(target: str, variant: tuple[int, int], to_images: bool) -> None:
    """bfloat16 values are read or written as wide as the variant says, their 8-bit forms half as wide."""
    kernel = compiled_rounding(target, variant, to_images)
    found = resources(target, kernel)
    assert found.spilled == 0
    assert 8 <= found.registers <= REGISTERS_MAX
    code = machine_code(target, kernel)
    values, codes = 2 * variant[0], variant[0]
    for width, way in zip((values, codes) if to_images else (codes, values), (0, 1), strict=True):
        pattern = _payload_patterns(target, width)[way]
        assert re.search(pattern, code), f"no {pattern} in:\n{code[:4000]}"


def _payload_patterns(target: str, width: int) -> list[str]:
    if target == "gfx942":
        return [rf"(?:global|buffer)_{way}_{AMD[width]}\b" for way in ("load", "store")]
    return [SASS[width].format(way).replace(".E", r"\.E") for way in ("LDG", "STG")]


def _narrow_stores(target: str, code: str) -> list[str]:
    pattern = (
        r"(?:global|buffer)_store_(?!dwordx4)\w+"
        if target == "gfx942"
        else r"STG\.E(?!\.128)[.\w]*|ST\.E[.\w]*"
    )
    return re.findall(pattern, code)


@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("sm_")])
def test_ptx_has_vectors_of_the_width(target: str) -> None:
    for access in all_accesses():
        ptx = compiled(target, access, True).asm["ptx"]
        assert re.search(r"ld\.global\S*" + PTX[access.vector_bytes], ptx), access
        assert re.search(r"st\.global\S*" + PTX[access.vector_bytes], ptx), access
