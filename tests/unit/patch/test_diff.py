"""Unified diffs, applied exactly or not at all; the system's own diff is the source."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_core.cli.patch.diff import FileDiff, parse
from flexkv_core.errors import PatchError

LINES = st.lists(
    st.sampled_from([b"a\n", b"b\n", b"c\n", b"\n", b"- x\n", b"+ y\n", b"--- z\n", b"\r\n"]), max_size=30
)
ENDS = st.sampled_from([b"", b"end without a newline"])


def diff_of(folder: Path, old: bytes, new: bytes) -> bytes:
    for side, content in (("a", old), ("b", new)):
        (folder / side).mkdir(exist_ok=True)
        (folder / side / "file.py").write_bytes(content)
    command = ["diff", "-u", "--text", "a/file.py", "b/file.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).stdout


@given(old=LINES, new=LINES, old_end=ENDS, new_end=ENDS)
def test_what_diff_writes_leads_there_and_back(
    tmp_path_factory: pytest.TempPathFactory,
    old: list[bytes],
    new: list[bytes],
    old_end: bytes,
    new_end: bytes,
) -> None:
    before, after = b"".join(old) + old_end, b"".join(new) + new_end
    text = diff_of(tmp_path_factory.mktemp("diff"), before, after)
    if before == after:
        assert not text
        return
    (found,) = parse(b"Why: a header\n\n" + text, "x")
    assert found.apply(before) == after
    assert found.reversed().apply(after) == before


@pytest.fixture
def found(tmp_path: Path) -> FileDiff:
    (found,) = parse(diff_of(tmp_path, b"1\n2\n3\n4\n5\n", b"1\n2\nx\n4\n5\n"), "x")
    return found


@pytest.mark.parametrize(
    "content", [b"0\n1\n2\n3\n4\n5\n", b"1\n2\n3\n4\n", b"1\n2\nx\n4\n5\n", b"1\n2\n3\r\n4\n5\n", b""]
)
def test_nothing_but_an_exact_fit(found: FileDiff, content: bytes) -> None:
    with pytest.raises(PatchError, match=r"file\.py: hunk 1 of 1 does not fit at line 1"):
        found.apply(content)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"no diff\n", "holds no unified diff"),
        (b"--- /dev/null\n+++ b/new.py\n@@ -0,0 +1 @@\n+x\n", "no change of one file"),
        (b"--- a/../x.py\n+++ b/../x.py\n@@ -1 +1 @@\n-x\n+y\n", "no change of one file"),
        (b"--- a/x.py\n+++ b/y.py\n@@ -1 +1 @@\n-x\n+y\n", "no change of one file"),
        (b"--- a/x.py\n", "no change of one file"),
        (b"--- a/x.py\n+++ b/x.py\n", "a file without hunks"),
        (b"--- a/x.py\n+++ b/x.py\n@@ -1,2 +1 @@\n-x\n+y\n", "has not as many lines as it says"),
        (b"--- a/x.py\n+++ b/x.py\n@@ -1 +1,2 @@\n-x\n+y\n", "has not as many lines as it says"),
    ],
)
def test_what_is_no_patch(text: bytes, said: str) -> None:
    with pytest.raises(PatchError, match=said):
        parse(text, "x.patch")
