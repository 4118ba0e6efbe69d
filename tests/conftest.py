"""What all tests share: an environment without anyone's FLEXKV_* settings, hypothesis without deadlines, markers by folder."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

from flexkv_core.config import ENV_PREFIX, RESERVED_VARIABLES

E2E_TIMEOUT_S = 900  # a real engine starts in 25-80 s on two cores, more when they are busy

# Two shared cores: a wall-clock deadline an example would fail by chance.
hypothesis.settings.register_profile("flexkv", deadline=None, print_blob=True)
hypothesis.settings.load_profile("flexkv")

for _name in list(os.environ):
    if _name.startswith(ENV_PREFIX) and (_name not in RESERVED_VARIABLES or _name == "FLEXKV_CONFIG_PATH"):
        del os.environ[_name]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--extended", action="store_true", help="run the tests marked extended, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything in the folders tests/e2e… is marked so, and gets the time that an engine needs to start."""
    if not config.getoption("--extended"):
        left_out = [item for item in items if item.get_closest_marker("extended")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0].startswith("e2e"):
            item.add_marker("e2e")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(E2E_TIMEOUT_S))
