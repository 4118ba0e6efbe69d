"""The generated table of settings in both READMEs. Run as a program it writes them; `scripts/check --fix` does so."""

from __future__ import annotations

from pathlib import Path

from flexkv_core.config import markdown_table
from tests.tidy.repository import ROOT, read

BEGIN, END = "<!-- configuration: begin -->", "<!-- configuration: end -->"
DOCUMENTS = (Path("README.md"), Path("README_zh.md"))


def with_table(text: str) -> str:
    """``text`` with the current table between its markers."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{markdown_table()}\n{END}{tail}"


if __name__ == "__main__":
    for document in DOCUMENTS:
        (ROOT / document).write_text(with_table(read(document)), encoding="utf-8")
