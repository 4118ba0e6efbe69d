"""Other weights under the same name are another identity."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexkv_core.weights import weights_identity


def test_folder_changes_with_its_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * 100)
    os.utime(weights, ns=(1, 1))
    first = weights_identity(str(tmp_path), None)
    assert first == weights_identity(str(tmp_path), None)
    (tmp_path / "README.md").write_text("no weights")
    assert first == weights_identity(str(tmp_path), None)
    os.utime(weights, ns=(2, 2))
    second = weights_identity(str(tmp_path), None)
    weights.write_bytes(b"a" * 101)
    os.utime(weights, ns=(2, 2))
    assert len({first, second, weights_identity(str(tmp_path), None)}) == 3


def test_hub_name_is_the_commit_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert weights_identity("someone/model", None) is None
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    assert weights_identity("someone/model", None) == commit
