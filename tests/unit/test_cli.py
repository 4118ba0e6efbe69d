"""The flexkv command: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from flexkv_core.cli.app import app
from flexkv_core.cli.bench import BENCHES, Bar, Bench
from flexkv_core.config import markdown_table

runner = CliRunner()


@pytest.fixture
def toy_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("toy_bench")
    module.run = lambda quick=False: {"time_us": 5.25, "ratio": 0.5, "quick": quick}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_bench", module)
    bars = {"time_us": Bar("<=", 10), "ratio": Bar(">=", 0.9)}
    monkeypatch.setitem(BENCHES, "toy", Bench("toy_bench", "a toy", bars))


@pytest.mark.usefixtures("toy_bench")
def test_bench_prints_bars_and_writes_one_flat_object(tmp_path: Path) -> None:
    file = tmp_path / "toy.json"
    result = runner.invoke(app, ["bench", "toy", "--quick", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "met" in result.output
    assert "missed" in result.output
    assert json.loads(file.read_text()) == {"time_us": 5.25, "ratio": 0.5, "quick": True}


def test_unknown_bench_lists_the_known_ones() -> None:
    result = runner.invoke(app, ["bench", "nothing"])
    assert result.exit_code == 2
    assert "control-plane" in result.output


def test_config_shows_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_NAMESPACE", "blue")
    result = runner.invoke(app, ["config"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "blue" in result.output
    assert "environment FLEXKV_NAMESPACE" in result.output


def test_config_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_HUGE_PAGES", "perhaps")
    result = runner.invoke(app, ["config"])
    assert result.exit_code == 1
    assert "FLEXKV_HUGE_PAGES" in result.output


def test_config_markdown_is_the_generated_table() -> None:
    assert runner.invoke(app, ["config", "--markdown"]).output.strip() == markdown_table()
