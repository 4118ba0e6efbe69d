"""The parts of the remote tier that need no store: the search, the breaker, what is known, the bandwidth bound, the registry."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core.config import FlexKVConfig, load_config
from flexkv_core.errors import ConfigError
from flexkv_core.layout import KVLayout
from flexkv_core.remote_link import remote_spec
from flexkv_core.storage import remote
from flexkv_core.storage.remote.breaker import Allow, Breaker
from flexkv_core.storage.remote.presence import Presence
from flexkv_core.storage.remote.search import longest_prefix
from flexkv_core.storage.remote.values import names_of
from flexkv_core.transfer.rate import Rate


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def search(there: npt.NDArray[np.bool_], width: int) -> tuple[int, int]:
    """What was found, and the round trips."""
    rounds = 0

    def ask(places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        nonlocal rounds
        rounds += 1
        assert 0 < len(places) <= width
        assert (np.diff(places) > 0).all()
        return there[places]

    return longest_prefix(len(there), ask, width), rounds


@given(st.integers(0, 9000), st.integers(0, 9000), st.sampled_from([1, 2, 16, 64, 1024]))
def test_the_search_finds_the_prefix(count: int, has: int, width: int) -> None:
    has = min(has, count if width > 1 else 40, count)
    assert search(np.arange(count) < has, width)[0] == has


@pytest.mark.parametrize("width", [16, 64, 1024])
def test_8192_blocks_take_at_most_16_round_trips(width: int) -> None:
    for has in [0, 1, 2, 17, 4095, 4096, 8191, 8192, *range(3, 8192, 97)]:
        found, rounds = search(np.arange(8192) < has, width)
        assert found == has
        assert rounds <= 4


@given(st.lists(st.booleans(), max_size=300))
def test_a_hole_ends_what_is_found_at_a_block_that_is_missing(there: list[bool]) -> None:
    found, _ = search(np.array(there, np.bool_), 16)
    assert found == len(there) or not there[found]
    assert found == 0 or there[found - 1]


def test_the_breaker_opens_probes_and_closes() -> None:
    clock = Clock()
    breaker = Breaker(failures_max=3, pause_s=1, pause_max_s=4, clock=clock)
    for _ in range(2):
        breaker.failed()
    assert breaker.ask() is Allow.YES
    breaker.succeeded()
    for _ in range(3):
        assert breaker.ask() is Allow.YES
        breaker.failed()
    for pause in (1, 2, 4, 4):
        assert breaker.ask() is Allow.NO
        clock.now += pause + 0.01
        assert breaker.ask() is Allow.PROBE
        assert breaker.ask() is Allow.NO, "one probe at a time"
        breaker.failed()
    clock.now += 4.01
    assert breaker.ask() is Allow.PROBE
    breaker.succeeded()
    assert breaker.ask() is Allow.YES
    assert breaker.openings == 1


def test_a_probe_that_is_never_answered_is_followed_by_another() -> None:
    clock = Clock()
    breaker = Breaker(failures_max=1, pause_s=1, clock=clock)
    breaker.failed()
    clock.now += 1.01
    assert breaker.ask() is Allow.PROBE
    clock.now += 1.01
    assert breaker.ask() is Allow.PROBE


def keys_of(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(16 * count)


def test_what_is_known_speaks_for_the_prefix_and_expires() -> None:
    clock = Clock()
    presence = Presence(10, 1, clock)
    keys = keys_of(8)
    presence.note_found(keys[: 16 * 5])
    presence.note_missing(keys[16 * 5 : 16 * 6])
    assert presence.prefix(keys) == 5
    assert presence.prefix(keys[: 16 * 4]) == 0, "a shorter one's last block was not noted"
    assert presence.prefix(keys, 6) == 6
    assert presence.is_missing(keys[16 * 5 : 16 * 6])
    clock.now += 2
    assert not presence.is_missing(keys[16 * 5 : 16 * 6])
    assert presence.prefix(keys) == 5
    presence.forget_found(keys, 4)
    assert presence.prefix(keys) == 0
    presence.note_found(keys)
    clock.now += 11
    assert presence.prefix(keys) == 0


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_core.storage.remote.presence.ENTRIES_MAX", 10)
    presence = Presence(10, 10)
    for seed in range(50):
        presence.note_found(keys_of(1, seed))
        presence.note_missing(keys_of(1, 100 + seed))
    assert len(presence._found) == len(presence._missing) == 10
    assert presence.prefix(keys_of(1, 49)) == 1


def test_the_rate_bounds_what_goes_after_a_burst() -> None:
    rate = Rate(1 << 20)
    started = time.monotonic()
    for _ in range(4):
        rate.wait(1 << 18)
    assert time.monotonic() - started > 0.5
    assert Rate(0).wait(1 << 40) is None


def test_names_hold_the_deployment_the_key_and_the_epoch() -> None:
    keys = np.arange(4, dtype=np.uint64).reshape(2, 2)
    first, second = names_of("flexkv/v1/ab", keys, 0)
    assert first.startswith("flexkv/v1/ab/")
    assert first != second
    assert set(names_of("flexkv/v1/ab", keys, 7)).isdisjoint([first, second])


@pytest.mark.parametrize(
    "url", ["s3://user:hunter2@bucket/x", "valkey://:hunter2@host:6379", "valkey://hunter2@host"]
)
def test_credentials_in_the_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="remote_username") as error:
        load_config({"remote_url": url})
    assert "hunter2" not in str(error.value)


def test_an_unknown_store_is_refused_with_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"no such store 'ftp'; known are dir, .*mooncake"):
        remote.check_available("ftp")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"obstore.*flexkv\[remote\]"):
        remote.check_available("s3")


@pytest.mark.parametrize(
    ("url", "options", "word"),
    [
        ("dir:relative/path", {}, "absolute"),
        ("valkey://host:port", {}, "remote_url"),
        ("valkey://host:6379", {"clutser": "true"}, "clutser"),
        ("valkey://host:6379", {"expire_s": "soon"}, "expire_s"),
        ("mooncake://host", {}, "mooncake://"),
        ("mooncake://host:1", {"replicas": "two"}, "replicas"),
        ("s3://bucket/x", {"no_such_option": "1"}, "no_such_option"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_anything_is_taken(
    url: str, options: dict[str, str], word: str
) -> None:
    config = FlexKVConfig(remote_url=url, remote_options=options)
    with pytest.raises(ConfigError, match=word):
        remote_spec(config, KVLayout(16, 16, 64), bytes(16))


def test_a_relative_password_file_is_refused() -> None:
    with pytest.raises(ValueError, match="absolute"):
        FlexKVConfig(remote_password_file="password")


def test_options_that_are_credentials_are_refused(tmp_path: Path) -> None:
    from flexkv_core.storage.remote.base import RemoteSpec

    spec = RemoteSpec("s3://bucket/x", "p", KVLayout(16, 16, 64), {"aws_secret_access_key": "hunter2"})
    with pytest.raises(ConfigError, match="aws_secret_access_key") as error:
        remote.open_store(spec, [])
    assert "hunter2" not in str(error.value)
