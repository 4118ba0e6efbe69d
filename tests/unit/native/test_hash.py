"""Block keys against python-xxhash, and tokens out of sequences."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexkv_core.native import twin

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
PARENT = bytes(range(16))
TOKENS = st.lists(st.integers(INT32_MIN, INT32_MAX), max_size=200)

# The fixture only chooses the implementation; it holds no state that examples could share.
shared_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


class View(Sequence):
    """A sequence that is neither list nor tuple, as engines wrap their token lists."""

    def __init__(self, items: list[int]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at):
        return self.items[at]


def reference_keys(parent: bytes, tokens: list[int], tokens_per_block: int) -> bytes:
    keys = []
    for at in range(0, len(tokens) - tokens_per_block + 1, tokens_per_block):
        message = parent + np.array(tokens[at : at + tokens_per_block], "<i4").tobytes()
        parent = xxhash.xxh3_128(message).digest()
        keys.append(parent)
    return b"".join(keys)


@shared_fixture
@given(tokens=TOKENS, tokens_per_block=st.integers(1, 40), parent=st.binary(min_size=16, max_size=16))
def test_keys_are_chained_xxh3_whatever_the_width(implementation, tokens, tokens_per_block, parent):
    expected = reference_keys(parent, tokens, tokens_per_block)
    for dtype in (np.int32, np.int64):
        assert implementation.hash_blocks(parent, np.array(tokens, dtype), tokens_per_block) == expected


@pytest.mark.parametrize("tokens_per_block", [1, 8, 16, 28, 29, 32, 56, 57, 64, 128, 1000, 2000])
def test_keys_for_every_branch_of_the_hash_and_many_batches(implementation, tokens_per_block):
    tokens = np.random.default_rng(3).integers(0, 200_000, 5 * 2000 + 7)
    expected = reference_keys(PARENT, tokens.tolist(), tokens_per_block)
    assert implementation.hash_blocks(PARENT, tokens, tokens_per_block) == expected
    assert implementation.hash_blocks(PARENT, tokens.astype(np.int32), tokens_per_block) == expected


def test_keys_can_be_continued_from_any_block(implementation):
    tokens = np.arange(160, dtype=np.int32)
    keys = implementation.hash_blocks(PARENT, tokens, 16)
    assert implementation.hash_blocks(keys[48:64], tokens[64:], 16) == keys[64:]


@pytest.mark.parametrize("count", [0, 1, 15])
def test_a_tail_that_fills_no_block_has_no_key(implementation, count):
    assert implementation.hash_blocks(PARENT, np.zeros(count, np.int64), 16) == b""


@pytest.mark.parametrize("token", [INT32_MIN - 1, INT32_MAX + 1, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("at", [0, 17, 4095])
def test_a_token_out_of_range_is_refused(implementation, token, at):
    tokens = np.zeros(4096, np.int64)
    tokens[at] = token
    with pytest.raises(ValueError, match=rf"token {token} "):
        implementation.hash_blocks(PARENT, tokens, 16)


def test_a_token_out_of_range_in_the_dropped_tail_does_not_matter(implementation):
    tokens = np.zeros(17, np.int64)
    tokens[16] = 2**40
    assert len(implementation.hash_blocks(PARENT, tokens, 16)) == 16


@pytest.mark.parametrize(
    ("parent", "tokens", "tokens_per_block", "error"),
    [
        (b"short", np.zeros(16, np.int32), 16, ValueError),
        (PARENT, np.zeros(16, np.int32), 0, ValueError),
        (PARENT, np.zeros(16, np.int32), -1, ValueError),
        (PARENT, np.zeros(16, np.uint32), 16, TypeError),
        (PARENT, np.zeros(16, np.float64), 16, TypeError),
        (PARENT, np.zeros((4, 4), np.int32), 16, TypeError),
        (PARENT, np.zeros(32, np.int32)[::2], 16, TypeError),
        (PARENT, [1] * 16, 16, TypeError),
    ],
)
def test_wrong_arguments_of_hash_blocks(implementation, parent, tokens, tokens_per_block, error):
    with pytest.raises(error):
        implementation.hash_blocks(parent, tokens, tokens_per_block)


@shared_fixture
@given(tokens=TOKENS, data=st.data())
def test_packed_tokens_are_int32_whatever_the_container(implementation, tokens, data):
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    expected = np.array(tokens[start:stop], "<i4").tobytes()
    containers = [
        tokens,
        tuple(tokens),
        View(tokens),
        array("i", tokens),
        np.array(tokens, np.int64),
        list(np.array(tokens, int)),
    ]
    for container in containers:
        assert implementation.pack_tokens(container, start, stop) == expected


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4), (4, 4)])
def test_a_range_outside_of_the_tokens_is_refused(implementation, start, stop):
    for tokens in ([1, 2, 3], np.arange(3), View([1, 2, 3])):
        with pytest.raises(ValueError, match="does not lie in 3 tokens"):
            implementation.pack_tokens(tokens, start, stop)


@pytest.mark.parametrize("container", [list, tuple, View, np.array])
def test_packing_refuses_tokens_out_of_range(implementation, container):
    with pytest.raises(ValueError, match="token 2147483648 "):
        implementation.pack_tokens(container([1, 2**31]), 0, 2)
    assert implementation.pack_tokens(container([1, 2**31]), 0, 1) == b"\x01\0\0\0"


@pytest.mark.parametrize("tokens", [[1.5], ["a"], np.zeros(1), np.zeros(1, np.uint8), {1}, 5])
def test_packing_refuses_what_are_no_tokens(implementation, tokens):
    with pytest.raises(TypeError):
        implementation.pack_tokens(tokens, 0, 1)


def test_a_token_that_shrinks_its_list_is_survived(native_module: ModuleType):
    tokens: list[object] = []

    class Shrinking:
        def __index__(self) -> int:
            tokens.clear()
            return 1

    tokens += [Shrinking()] * 1000
    with pytest.raises(ValueError, match="shrank"):
        native_module.pack_tokens(tokens, 0, 1000)


def test_long_prompts_agree_with_the_twin(native_module: ModuleType):
    tokens = np.random.default_rng(5).integers(INT32_MIN, INT32_MAX, 131_072)
    assert native_module.hash_blocks(PARENT, tokens, 16) == twin.hash_blocks(PARENT, tokens, 16)
