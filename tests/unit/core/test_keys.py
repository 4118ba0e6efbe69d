"""Keys: chained, equal for equal content however it arrives, different for everything that must not share."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core.keys import KeyChain, Salt, fingerprint, hash_tokens, namespace_root

ROOT = fingerprint({"model": "m"})
TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=0, max_size=200)


def chain(tokens: list[int], size: int, salts: tuple[Salt, ...] = (), steps: tuple[int, ...] = ()) -> bytes:
    keys = KeyChain(ROOT, size, salts)
    for stop in (*steps, len(tokens)):
        keys.extend(tokens, stop)
    return keys.keys(len(keys))


@given(TOKENS, st.sampled_from([1, 4, 16]), st.lists(st.integers(0, 200), max_size=4))
def test_chain_equals_one_hash_however_it_grows(tokens: list[int], size: int, cuts: list[int]) -> None:
    steps = tuple(sorted(min(cut, len(tokens)) for cut in cuts))
    assert chain(tokens, size, steps=steps) == hash_tokens(ROOT, np.array(tokens, np.int64), size)


@given(TOKENS, st.sampled_from([4, 16]), st.integers(0, 199), st.lists(st.integers(0, 200), max_size=3))
def test_salt_changes_its_block_and_all_after_it(
    tokens: list[int], size: int, place: int, cuts: list[int]
) -> None:
    plain = chain(tokens, size)
    steps = tuple(sorted(min(cut, len(tokens)) for cut in cuts))
    salted = chain(tokens, size, (Salt(place, "image"),), steps)
    assert len(plain) == len(salted)
    for block in range(len(plain) // 16):
        same = plain[block * 16 : block * 16 + 16] == salted[block * 16 : block * 16 + 16]
        assert same == (block < place // size)


def test_salts_differ_by_content_place_and_number() -> None:
    tokens = list(range(64))
    variants = [
        (),
        (Salt(17, "a"),),
        (Salt(17, "b"),),
        (Salt(18, "a"),),
        (Salt(17, "a"), Salt(17, "b")),
        (Salt(17, "a"), Salt(40, "b")),
    ]
    assert len({chain(tokens, 16, salts) for salts in variants}) == len(variants)


def test_key_depends_on_every_token_before_it() -> None:
    tokens = [random.randrange(50000) for _ in range(64)]
    base = chain(tokens, 16)
    for place in range(64):
        other = chain([*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]], 16)
        first = place // 16
        assert other[: first * 16] == base[: first * 16]
        assert all(other[b * 16 : b * 16 + 16] != base[b * 16 : b * 16 + 16] for b in range(first, 4))


def test_fingerprint_ignores_order_and_sees_values() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})


def test_namespace_parts_do_not_run_together() -> None:
    assert namespace_root(ROOT, ()) == ROOT
    assert (
        len({namespace_root(ROOT, parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("abc", "")]}) == 4
    )


def test_token_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="2147483648"):
        KeyChain(ROOT, 1).extend([2**31], 1)
