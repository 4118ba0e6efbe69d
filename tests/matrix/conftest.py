"""Tests of one engine version each: ``scripts/test --matrix`` runs this folder in the environment of every lock file that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An engine's start, or a download, takes longer than other tests."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
