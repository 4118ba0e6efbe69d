"""Tests of one engine version each: ``scripts/test --matrix`` runs this folder in the environment of every lock file that it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flexkv_core.config import cache_dir

TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An engine's start, or a download, takes longer than other tests."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama that the other tests have made, with a tokenizer that older transformers know too."""
    (source,) = sorted((cache_dir() / "models").glob("tiny-llama-*"))[-1:]
    folder = tmp_path_factory.mktemp("model")
    for file in source.iterdir():
        shutil.copy(file, folder)
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps(content | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
