"""Loads are admitted so that the device always has room for whichever request comes next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flexkv_vllm import admission
from flexkv_vllm.admission import LoadAdmission

BLOCK_TOKENS = 16


def admission_of(
    monkeypatch: pytest.MonkeyPatch, blocks: int, reserves: bool = False, groups: int = 1
) -> LoadAdmission:
    monkeypatch.setattr(admission, "RESERVES_BLOCKS", reserves)
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK_TOKENS))
    cache: Any = SimpleNamespace(num_blocks=blocks + 1, kv_cache_groups=[group] * groups)
    config: Any = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024), speculative_config=None)
    return LoadAdmission(config, cache)


def request(name: str, blocks: int) -> Any:
    """One that needs ``blocks`` blocks to its end, vLLM's spare one included."""
    return SimpleNamespace(
        request_id=name, num_prompt_tokens=(blocks - 2) * BLOCK_TOKENS, max_tokens=BLOCK_TOKENS
    )


def test_one_alone_is_vllms_own_business(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = admission_of(monkeypatch, 10)
    one = request("one", 30)
    assert loads.may_enter(one)
    assert loads.admits(one, 9 * BLOCK_TOKENS)


def test_loads_that_would_fill_the_device_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four requests of 10 blocks, 8 of them loaded, on 32 blocks: all four at once would leave none for anybody's ninth."""
    loads = admission_of(monkeypatch, 32)
    four = [request(str(i), 10) for i in range(4)]
    for each in four[:3]:
        assert loads.may_enter(each)
        assert loads.admits(each, 8 * BLOCK_TOKENS)
        loads.holds(each.request_id, 8)
    assert not loads.may_enter(four[3]), "24 are held, and it needs 10"
    loads.ran(["0"])
    assert loads.may_enter(four[3])
    assert loads.admits(four[3], 8 * BLOCK_TOKENS)
    loads.holds("3", 8)
    assert not loads.may_enter(four[0]), "were it preempted, the other three must run first"


def test_a_load_leaves_room_for_the_rest_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = admission_of(monkeypatch, 20)
    long, short = request("long", 16), request("short", 5)
    assert loads.may_enter(long)
    assert loads.admits(long, 4 * BLOCK_TOKENS)
    loads.holds("long", 4)
    assert loads.may_enter(short)
    assert not loads.admits(short, 5 * BLOCK_TOKENS), "9 held, and the long one lacks 12"
    assert loads.admits(short, 4 * BLOCK_TOKENS)
    loads.left("long")
    assert loads.admits(short, 5 * BLOCK_TOKENS)


def test_blocks_of_all_groups_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests of the test above, with a second group that takes as many blocks again."""
    loads = admission_of(monkeypatch, 40, groups=2)
    long, short = request("long", 16), request("short", 5)
    assert loads.may_enter(long)
    assert loads.admits(long, 4 * BLOCK_TOKENS)
    loads.holds("long", 8)
    assert not loads.may_enter(request("whole", 17)), "8 are held, and it needs 34"
    loads.left("whole")
    assert loads.may_enter(short)
    assert not loads.admits(short, 5 * BLOCK_TOKENS), "18 held, and the long one lacks 24"
    assert loads.admits(short, 4 * BLOCK_TOKENS)


def test_asked_again_is_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that brought nothing, or a preemption."""
    loads = admission_of(monkeypatch, 20)
    one, other = request("one", 10), request("other", 15)
    loads.may_enter(one)
    loads.holds("one", 8)
    assert not loads.may_enter(other)
    loads.may_enter(one)
    assert loads.may_enter(other)


def test_nothing_is_held_back_where_vllm_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = admission_of(monkeypatch, 4, reserves=True)
    for i in range(4):
        each = request(str(i), 10)
        assert loads.may_enter(each)
        assert loads.admits(each, 8 * BLOCK_TOKENS)
        loads.holds(each.request_id, 8)


def test_a_large_request_does_not_wait_for_load_after_load(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = admission_of(monkeypatch, 20)
    small, large, later = request("small", 4), request("large", 18), request("later", 4)
    assert loads.may_enter(small)
    loads.holds("small", 3)
    assert not loads.may_enter(large)
    assert loads.may_enter(later)
    assert not loads.admits(later, 2 * BLOCK_TOKENS), "the large one comes first"
    loads.ran(["small"])
    assert not loads.admits(later, 2 * BLOCK_TOKENS)
    assert loads.may_enter(large)
    assert loads.admits(later, 2 * BLOCK_TOKENS)
    loads.holds("later", 2)
    assert loads.may_enter(large)
    loads.holds("small", 3)
    assert not loads.may_enter(large)
    loads.left("large")
    assert loads.admits(later, 2 * BLOCK_TOKENS), "it went away"
