"""Every implementation of the native functions: the Python twin, and the C module with each set of instructions."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from flexkv_core.native import twin

try:
    from flexkv_core.native import _native
except ImportError:
    _native = None

INSTRUCTIONS = ("generic", "sse42", "avx2", "avx512")


@pytest.fixture(params=["twin", *INSTRUCTIONS])
def implementation(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """A module with the functions of ``_native.pyi``."""
    if request.param == "twin":
        yield twin
        return
    module = _require_native()
    try:
        module.select_instructions(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield module
    module.select_instructions(None)


@pytest.fixture
def native_module() -> ModuleType:
    """The C module with the machine's best instructions."""
    return _require_native()


def _require_native() -> ModuleType:
    if _native is None:
        pytest.skip("the C extension is not built")
    return _native
