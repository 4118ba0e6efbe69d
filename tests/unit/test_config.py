"""Where configuration comes from, who wins, and what is said when it is wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from flexkv_core.config import (
    FlexKVConfig,
    default_host_bytes,
    effective_settings,
    load_config,
    markdown_table,
)
from flexkv_core.errors import ConfigError


def _file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    config = load_config()
    assert config == FlexKVConfig()
    assert 0 < config.host_bytes <= 8 << 30
    assert config.tokens_per_block is None
    assert config.verify_checksums


def test_precedence_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "namespace: from-file\nhost_bytes: 3GiB\nqueue_ops_max: 7\nload_tokens_min: 5\n"
    monkeypatch.setenv("FLEXKV_CONFIG_PATH", str(_file(tmp_path, "c.yaml", text)))
    monkeypatch.setenv("FLEXKV_HOST_BYTES", "2GiB")
    monkeypatch.setenv("FLEXKV_NAMESPACE", "from-environment")
    config = load_config({"namespace": "from-caller"})
    assert config.namespace == "from-caller"
    assert config.host_bytes == 2 << 30
    assert config.queue_ops_max == 7
    assert config.load_tokens_min == 5


def test_path_given_wins_over_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CONFIG_PATH", str(_file(tmp_path, "a.json", json.dumps({"queue_ops_max": 1}))))
    path = _file(tmp_path, "b.json", json.dumps({"queue_ops_max": 2}))
    assert load_config(path=path).queue_ops_max == 2


@pytest.mark.parametrize(
    ("given", "size_bytes"),
    [("4GiB", 4 << 30), ("512MB", 512_000_000), (1 << 30, 1 << 30), ("1.5 GiB", 3 << 29)],
)
def test_sizes(given: object, size_bytes: int) -> None:
    assert load_config({"host_bytes": given}).host_bytes == size_bytes


def test_empty_file_is_no_error(tmp_path: Path) -> None:
    assert load_config(path=_file(tmp_path, "c.yml", "")) == load_config()


def test_keys_of_others_are_ignored_only_when_named() -> None:
    load_config({"theirs": 1}, ignore={"theirs"})
    with pytest.raises(ConfigError, match="theirs"):
        load_config({"theirs": 1})


def test_one_error_names_key_value_origin_and_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_TOKENS_PER_BLOCK", "0")
    with pytest.raises(ConfigError) as caught:
        load_config({"host_bytes": "lots", "eviction": "fifo-ish", "hostbytes": 1})
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 4
    assert [line for line in lines if "host_bytes = 'lots' (from the caller" in line and '"4GiB"' in line]
    assert [
        line
        for line in lines
        if "tokens_per_block = '0' (from environment FLEXKV_TOKENS" in line and "≥ 1" in line
    ]
    assert [line for line in lines if "eviction = 'fifo-ish'" in line and "lru" in line]
    assert [line for line in lines if "hostbytes = 1" in line and "did you mean host_bytes?" in line]


def test_unknown_variable_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_HOST_BYTE", "1GiB")
    with pytest.raises(ConfigError, match=r"FLEXKV_HOST_BYTE = '1GiB'.*did you mean FLEXKV_HOST_BYTES"):
        load_config()


def test_variables_of_scripts_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CACHE_DIR", "somewhere")
    load_config()


def test_wrong_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "c.yaml", "events: perhaps\n")
    with pytest.raises(ConfigError, match=f"events = 'perhaps' .from file {path}.*true or false"):
        load_config(path=path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.toml", "", "must end in"),
        ("c.json", "{", "cannot be read"),
        ("c.yaml", "a: [", "cannot be read"),
        ("c.yaml", "- a\n- b\n", "a mapping"),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(path=_file(tmp_path, name, text))


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CONFIG_PATH", str(tmp_path / "absent.yaml"))
    with pytest.raises(ConfigError, match="named by FLEXKV_CONFIG_PATH"):
        load_config()


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "soon"])
def test_timeout_is_a_positive_number(value: object) -> None:
    with pytest.raises(ConfigError, match="transfer_timeout_s"):
        load_config({"transfer_timeout_s": value})


def test_frozen_picklable_and_deterministic() -> None:
    config = load_config()
    with pytest.raises(ValidationError):
        config.host_bytes = 1  # type: ignore[assignment,misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert default_host_bytes() == default_host_bytes()


def test_direct_construction_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_NAMESPACE", "elsewhere")
    assert FlexKVConfig().namespace == ""


def test_effective_settings_name_their_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_EVENTS", "false")
    settings = {setting.key: setting for setting in effective_settings()}
    assert settings["events"].value is False
    assert settings["events"].origin == "environment FLEXKV_EVENTS"
    assert settings["host_bytes"].origin == "default"


def test_table_has_a_row_for_every_key() -> None:
    rows = markdown_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(FlexKVConfig.model_fields)
    assert all(row.count("|") == 6 for row in rows)
