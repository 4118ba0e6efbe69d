"""The figures as one table, printed plainly: where an engine runs, rich may not be installed."""

from __future__ import annotations

from collections.abc import Iterator

Figures = dict[str, float | str]

_COLUMNS = ("4k", "16k", "64k", "256k", "1m")


def table_lines(figures: Figures) -> Iterator[str]:
    """A row a copy, a column a piece size: its ratio to the plain copy, and GB/s of payload."""
    yield f"{figures['gpu']}, driver {figures['driver']}, torch {figures['torch']}, triton {figures['triton']}: ratio to a plain copy, GB/s"
    yield f"{'pieces':<26}" + "".join(f"{column:>16}" for column in _COLUMNS)
    for name, busy in _rows():
        cells = (_cell(figures, f"{name}_{column}{busy}") for column in _COLUMNS)
        yield f"{name + busy:<26}" + "".join(f"{cell:>16}" for cell in cells)
    for name, value in figures.items():
        if name.startswith(("matmul_", "bind_", "calibration_", "pin_", "layers_")):
            yield f"{name:<50}{value if isinstance(value, str) else _number(value)}"


def _rows() -> Iterator[tuple[str, str]]:
    for name in ("device_copy", "device_gather", "device_scatter"):
        yield name, ""
    for busy in ("", "_busy"):
        for way in ("d2h", "h2d"):
            for kind in ("link", "dma", "staged", "direct", "best"):
                yield f"{way}_{kind}", busy
    for name in ("d2h_op_link", "d2h_op", "h2d_op_link", "h2d_op", "h2d_op_unverified"):
        yield name, ""


def _cell(figures: Figures, name: str) -> str:
    return f"{_number(figures.get(name + '_ratio'))} {_number(figures.get(name + '_gbs'))}"


def _number(value: float | str | None) -> str:
    if not isinstance(value, float):
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
