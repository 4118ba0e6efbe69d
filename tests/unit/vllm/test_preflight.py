"""What is refused before the weights, and that nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexkv_core.config import FlexKVConfig
from flexkv_core.errors import CapacityError, ConfigError
from flexkv_vllm.preflight import check_block_size, check_directory


def test_block_size() -> None:
    check_block_size(FlexKVConfig(tokens_per_block=None), 64)
    check_block_size(FlexKVConfig(tokens_per_block=128), 64)
    with pytest.raises(ConfigError, match=r"tokens_per_block = 96: must be a multiple .* 64"):
        check_block_size(FlexKVConfig(tokens_per_block=96), 64)


def test_directory(tmp_path: Path) -> None:
    check_directory(tmp_path, 1)
    check_directory(tmp_path / "new", 1)
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "new", tmp_path / "no" / "parent"):
        with pytest.raises(ConfigError, match=r"cannot be used: .* is no directory"):
            check_directory(bad, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"], "nothing is made"


def test_space(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="ssd_bytes: 1152921504606846976 bytes asked for"):
        check_directory(tmp_path, 1 << 60)
    (tmp_path / "flexkv-0").mkdir()  # a tier's files are there: how much they need is looked at later
    check_directory(tmp_path, 1 << 60)
