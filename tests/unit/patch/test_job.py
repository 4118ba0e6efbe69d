"""Apply and revert on a small engine: exact, all or nothing whatever fails, and clear about what is refused."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_core.cli.patch import job, record
from flexkv_core.cli.patch.job import State
from flexkv_core.cli.patch.target import Target, find
from flexkv_core.errors import PatchError
from tests.unit.patch.toy_engine import VERSION, contents, in_a_process, make_engine, make_patches

STEPS_MAX = 100


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    return make_patches(tmp_path / "patches")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_engine(tmp_path / "site-packages")


@pytest.fixture
def target(root: Path) -> Target:
    return find("vllm", root, None, ("vllm", "sglang"))


def test_apply_and_revert_leave_every_byte(target: Target, patches: Path, root: Path) -> None:
    before = contents(root)
    assert job.look(target, patches).state is State.PRISTINE
    assert job.apply(target, patches).state is State.APPLIED
    core = (root / "vllm/core.py").read_text()
    assert "line_3 = 3\nhook = 4\nline_4" in core
    assert "line_50" not in core
    assert (root / "vllm/deep/worker.py").read_text().endswith("last = 2\n")
    assert (root / "vllm/core.py").stat().st_mode & 0o777 == 0o640
    applied = contents(root)
    assert applied.keys() - before.keys() == {f"vllm/{record.FILE}"}
    assert job.apply(target, patches).state is State.APPLIED
    assert contents(root) == applied, "a second time changes nothing"
    assert job.revert(target, patches).state is State.PRISTINE
    assert contents(root) == before
    assert job.revert(target, patches).state is State.PRISTINE, "nothing to take back"


def test_links_of_a_package_manager_keep_the_old_bytes(target: Target, patches: Path, root: Path) -> None:
    kept = root.parent / "cache-of-a-package-manager.py"
    os.link(root / "vllm/core.py", kept)
    before = kept.read_bytes()
    job.apply(target, patches)
    assert kept.read_bytes() == before != (root / "vllm/core.py").read_bytes()


@pytest.mark.parametrize("kill", [False, True], ids=["error", "killed"])
@pytest.mark.parametrize("reverting", [False, True], ids=["apply", "revert"])
def test_failure_at_every_step(
    target: Target, patches: Path, root: Path, reverting: bool, kill: bool
) -> None:
    """Whatever a change fails or dies at, the files are all old or all new afterwards; the next call mends and succeeds."""
    pristine = contents(root)
    job.apply(target, patches)
    applied = contents(root)
    if not reverting:
        job.revert(target, patches)
    old, new = (applied, pristine) if reverting else (pristine, applied)
    action = job.revert if reverting else job.apply
    for step in range(1, STEPS_MAX):
        status = in_a_process(lambda: action(target, patches), root, step, kill)
        if status == 0:
            break
        assert status in ((-signal.SIGKILL,) if kill else (1, 2))
        if not kill:
            left = {name: data for name, data in contents(root).items() if not name.endswith(".flexkv-old")}
            assert left == (new if status == 2 else old), f"step {step}: all or nothing"
        job.revert(target, patches)
        assert contents(root) == pristine, f"step {step}"
        if reverting:
            job.apply(target, patches)
            assert contents(root) == applied
    assert 10 < step < STEPS_MAX - 1, "every step was tried"
    assert contents(root) == new


def test_half_way_state_is_said_and_mended(target: Target, patches: Path, root: Path) -> None:
    before = contents(root)
    said = set()
    for step in range(1, STEPS_MAX):
        if in_a_process(lambda: job.apply(target, patches), root, step, kill=True) == 0:
            break
        said.add(job.look(target, patches).reason)
        job.revert(target, patches)
        assert contents(root) == before
    assert "a change was left half-way; `flexkv patch revert` undoes it" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=1k", "tmpfs", str(folder)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk: Path, patches: Path) -> None:
    root = make_engine(small_disk / "site-packages")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    before = contents(root)
    target = find("vllm", root, None, ("vllm",))
    with pytest.raises(PatchError, match=r"nothing was changed: .*No space left"):
        job.apply(target, patches)
    assert contents(root) == before
    filler.unlink()
    assert job.apply(target, patches).state is State.APPLIED


def test_folder_that_cannot_be_written(target: Target, patches: Path, root: Path) -> None:
    before = contents(root)
    deep = root / "vllm" / "deep"
    bind = ["mount", "--bind", str(deep), str(deep)]
    if subprocess.run(bind, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(deep)], check=True)
        with pytest.raises(PatchError, match=r"nothing was changed: .*worker\.py.*Read-only"):
            job.apply(target, patches)
        assert contents(root) == before
    finally:
        subprocess.run(["umount", str(deep)], check=True)


def test_one_hunk_that_does_not_fit(target: Target, patches: Path, root: Path) -> None:
    patch = patches / "vllm" / VERSION / "0002-worker.patch"
    patch.write_text(
        patch.read_text()
        .replace("     return 6\n", "     return 66\n")
        .replace("-    return 7\n", "-    return 77\n")
    )
    before = contents(root)
    with pytest.raises(
        PatchError, match=r"0002-worker\.patch: vllm/deep/worker\.py: hunk 1 of 2 does not fit"
    ):
        job.apply(target, patches)
    assert contents(root) == before


def test_dirty_file_is_refused(target: Target, patches: Path, root: Path) -> None:
    with (root / "vllm/core.py").open("a") as file:
        file.write("# mine\n")
    before = contents(root)
    with pytest.raises(PatchError, match=r"is dirty: not as vllm 1\.2\.0 ships them: vllm/core\.py"):
        job.apply(target, patches)
    assert contents(root) == before


def test_file_changed_after_apply_is_not_reverted(target: Target, patches: Path, root: Path) -> None:
    job.apply(target, patches)
    with (root / "vllm/core.py").open("a") as file:
        file.write("# mine\n")
    before = contents(root)
    assert job.look(target, patches).state is State.DIRTY
    with pytest.raises(PatchError, match=r"changed since the patches were applied: vllm/core\.py"):
        job.revert(target, patches)
    assert contents(root) == before


def test_later_version_of_the_patches_takes_back_what_is_there(
    target: Target, patches: Path, root: Path, tmp_path: Path
) -> None:
    before = contents(root)
    job.apply(target, patches)
    later = make_patches(tmp_path / "later")
    series = later / "vllm" / VERSION / "series"
    series.write_text(series.read_text().splitlines()[0] + "\n")
    digests = later / "vllm" / VERSION / "originals.sha256"
    digests.write_text(digests.read_text().splitlines()[0] + "\n")
    found = job.look(target, later)
    assert found.state is State.OTHER_PATCHES
    with pytest.raises(PatchError, match="`flexkv patch revert` takes them back"):
        job.apply(target, later)
    assert job.revert(target, later).state is State.PRISTINE
    assert contents(root) == before


def test_engine_installed_anew_over_a_record(target: Target, patches: Path, root: Path) -> None:
    job.apply(target, patches)
    make_engine(root)
    assert job.look(target, patches).state is State.PRISTINE
    assert job.apply(target, patches).state is State.APPLIED


@pytest.mark.parametrize(
    ("version", "state", "reason"),
    [
        ("1.1.0", State.UNSUPPORTED, "the nearest that has some is 1.2.0, and 2.0.0 needs none"),
        ("1.9.0", State.UNSUPPORTED, "the nearest that has some is 1.10.1, and"),
        ("1.11.0", State.UNSUPPORTED, "the nearest that has some is 1.10.1, and"),
        ("2.0.0", State.NOT_NEEDED, "vllm has every hook since 2.0.0"),
        ("2.1.0+cpu", State.NOT_NEEDED, "vllm has every hook since 2.0.0"),
    ],
)
def test_version_without_patches(tmp_path: Path, version: str, state: State, reason: str) -> None:
    patches = make_patches(tmp_path / "patches", ("1.2.0", "1.10.1") if version != "1.9.0" else ("1.10.1",))
    root = make_engine(tmp_path / "site-packages", version)
    found = job.look(find(None, root, None, ("vllm", "sglang")), patches)
    assert (found.state, reason in found.reason) == (state, True), found.reason


def test_source_checkout_and_what_is_no_engine(tmp_path: Path, patches: Path) -> None:
    checkout = make_engine(tmp_path / "checkout")
    (checkout / "vllm/_version.py").unlink()
    with pytest.raises(PatchError, match="cannot be told; name it with --version"):
        find("vllm", checkout, None, ("vllm",))
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", f"v{VERSION}"]):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(checkout), *identity, *command], check=True)
    target = find("vllm", checkout, None, ("vllm",))
    assert target.version == VERSION
    assert job.apply(target, patches).state is State.APPLIED
    sglang = tmp_path / "sglang" / "python" / "sglang"
    sglang.mkdir(parents=True)
    (sglang / "__init__.py").touch()
    (sglang / "version.py").write_text('__version__ = "0.5.3.post1"\n')
    assert find(None, tmp_path / "sglang", None, ("vllm", "sglang")).version == "0.5.3.post1"
    with pytest.raises(PatchError, match=r"no vllm or sglang in .*; name its folder with --target"):
        find(None, tmp_path, None, ("vllm", "sglang"))
    with pytest.raises(PatchError, match="--engine other: must be one of vllm, sglang"):
        find("other", None, None, ("vllm", "sglang"))


def test_two_at_once(target: Target, patches: Path) -> None:
    handle = os.open(target.package, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(PatchError, match="another process is patching"):
            job.apply(target, patches)
    finally:
        os.close(handle)


def test_broken_record(target: Target, patches: Path) -> None:
    job.apply(target, patches)
    file = target.package / record.FILE
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(PatchError, match="written by a newer FlexKV"):
        job.look(target, patches)
    file.write_text("{")
    with pytest.raises(PatchError, match="cannot be read"):
        job.revert(target, patches)
