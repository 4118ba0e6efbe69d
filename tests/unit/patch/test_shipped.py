"""The patches of this project, and the command on the engine that is installed here."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from flexkv_core.cli.app import app
from flexkv_core.cli.patch import series
from flexkv_core.cli.patch.diff import FileDiff

runner = CliRunner()
FOLDER = series.patches_folder()
SHIPPED = [
    (engine, version) for engine in series.engines(FOLDER) for version in series.versions(FOLDER, engine)
]


@pytest.mark.parametrize(("engine", "version"), SHIPPED)
def test_series_is_whole(engine: str, version: str) -> None:
    """Loading checks that the checksums name the files. The real files are patched by ``scripts/test --matrix``."""
    loaded = series.load(FOLDER, engine, version)
    assert [patch.name for patch in loaded.patches] == sorted(patch.name for patch in loaded.patches)
    files = {path.name for path in (FOLDER / engine / version).iterdir()}
    assert files == {"series", "originals.sha256", *(patch.name for patch in loaded.patches)}
    for patch in loaded.patches:
        assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.patch", patch.name)
        assert all(patch.header.get(key) for key in series.HEADER_KEYS), patch.header
        for diff in patch.files:
            blank = _before(diff)
            assert diff.reversed().apply(diff.apply(blank)) == blank


def _before(diff: FileDiff) -> bytes:
    """A file that holds what the hunks expect, and empty lines elsewhere."""
    lines: list[bytes] = []
    for hunk in diff.hunks:
        lines += [b"\n"] * (hunk.old_start - 1 - len(lines))
        lines += hunk.old
    return b"".join([*lines, b"\n"])


def test_every_version_of_the_range_has_patches() -> None:
    assert series.versions(FOLDER, "vllm")[0] == "0.10.1"
    assert series.versions(FOLDER, "vllm")[-1] == "0.17.1"
    assert series.engines(FOLDER)["vllm"] == "0.18.0"
    assert series.versions(FOLDER, "sglang") == ["0.5.13", "0.5.13.post1", "0.5.14", "0.5.15", "0.5.15.post1"]
    assert series.engines(FOLDER)["sglang"] == "0.5.16"


def test_installed_engine_needs_none() -> None:
    for command in ("status", "check", "apply", "revert"):
        result = runner.invoke(app, ["patch", command, "--engine", "vllm", "--json"])
        assert result.exit_code == 0, result.output
        told = json.loads(result.output)
        assert (told["engine"], told["state"], told["patches"]) == ("vllm", "not needed", [])


def test_list_and_refusals() -> None:
    result = runner.invoke(app, ["patch", "list", "--engine", "vllm"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert "0.17.1  0001-worker-results.patch: " in result.output
    listed = json.loads(runner.invoke(app, ["patch", "list", "--json"]).output)
    assert listed["vllm"]["versions"]["0.12.0"].keys() == {
        "0001-worker-results.patch",
        "0002-connector-reset.patch",
        "0003-aborted-loads.patch",
        "0004-resumed-loads.patch",
    }
    for arguments in (["list", "--engine", "other"], ["apply", "--target", "/nowhere"]):
        refused = runner.invoke(app, ["patch", *arguments, "--json"])
        assert refused.exit_code == 1
        assert json.loads(refused.output).keys() == {"error"}
