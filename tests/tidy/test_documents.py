"""What the documents say must be there: named paths, equal halves of the two READMEs, the generated table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flexkv_core.cli.bench import BENCHES
from tests.tidy.configuration_table import DOCUMENTS, with_table
from tests.tidy.repository import ROOT, read

README, README_ZH, ARCHITECTURE = Path("README.md"), Path("README_zh.md"), Path("ARCHITECTURE.md")


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _heading_levels(path: Path) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", _without_code(read(path)), flags=re.MULTILINE)]


def _tables(path: Path) -> list[tuple[int, int]]:
    """Rows and columns of each table, in order."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", _without_code(read(path)), flags=re.MULTILINE)
    return [(block.count("\n"), block.splitlines()[0].count("|")) for block in blocks]


def _code(path: Path) -> list[str]:
    """Fenced code without its comments, which are translated."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", read(path), flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"(?m)(^|\s+)# .*$", "", block).strip() for block in blocks]


def _figures(path: Path) -> list[str]:
    """Numbers in tables, row by row in any order: what was measured must be the same in both languages."""
    rows = re.findall(r"^\|.*\|$", _without_code(read(path)), flags=re.MULTILINE)
    return [number for row in rows for number in sorted(re.findall(r"\d+(?:[.,]\d+)*", row))]


def _links(path: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)]+)\)", _without_code(read(path)))
    return [target for target in targets if Path(target).name not in (README.name, README_ZH.name)]


@pytest.mark.parametrize("part", [_heading_levels, _tables, _code, _figures, _links])
def test_readmes_are_the_same(part: Callable[[Path], list[object]]) -> None:
    english = part(README)
    assert english
    assert part(README_ZH) == english


@pytest.mark.parametrize("path", DOCUMENTS)
def test_configuration_table_is_fresh(path: Path) -> None:
    assert read(path) == with_table(read(path)), "stale: run scripts/check --fix"


def test_paths_in_architecture_exist() -> None:
    named = re.findall(r"`([\w.*-]+(?:/[\w.*-]*)+|[\w-]+\.(?:md|toml|py))`", read(ARCHITECTURE))
    assert len(named) > 30, "the scan found too little to mean anything"
    assert not [path for path in named if not list(ROOT.glob(path.rstrip("/")))]


def test_architecture_opens_with_what_a_reader_wants() -> None:
    headings = re.findall(r"^## (.*)$", read(ARCHITECTURE), flags=re.MULTILINE)
    assert headings[0].startswith("I want to")


def test_every_folder_of_the_core_is_in_architecture() -> None:
    text = read(ARCHITECTURE)
    folders = [path.parent for path in (ROOT / "flexkv_core").glob("*/__init__.py")]
    assert folders
    assert not [folder.name for folder in folders if f"flexkv_core/{folder.name}/" not in text]


@pytest.mark.parametrize(
    "path", [README, README_ZH, Path("CONTRIBUTING.md"), ARCHITECTURE, Path("CHANGELOG.md")]
)
def test_relative_links_lead_somewhere(path: Path) -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", read(path)) if "://" not in t]
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_every_benchmark_is_in_the_readme() -> None:
    text = read(README)
    assert not [name for name in BENCHES if name not in text]
