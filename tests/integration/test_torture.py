"""The crash test and the media test, short. ``scripts/crashtest`` and ``scripts/mediatest`` run them long."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *arguments: str, timeout_s: float = 240) -> dict[str, int]:
    """The last line; a process of its own, because the crash test forks."""
    done = subprocess.run(
        [sys.executable, "-m", f"flexkv_core.cli.torture.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdict: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return verdict


def test_ten_kills(tmp_path: Path) -> None:
    file = tmp_path / "verdict.json"
    verdict = run("crash", "--rounds", "10", "--seed", "7", "--json", str(file), "--directory", str(tmp_path))
    assert list(verdict) == ["rounds", "blocks_checked", "wrong_bytes", "lost_durable", "leaked_slots"]
    assert verdict["rounds"] == 10
    assert verdict["blocks_checked"] > 5000
    assert json.loads(file.read_text()) == verdict


def test_damage_on_the_media(tmp_path: Path) -> None:
    verdict = run("media", "--counts", "1", "--counts", "100", "--seed", "7", "--directory", str(tmp_path))
    assert verdict["flips"] == 3 * 101
    assert verdict["flips_in_occupied_slots"] > 30
    assert verdict["blocks_checked"] > 1000


def test_a_crash_test_that_is_killed_leaves_nobody_behind(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "flexkv_core.cli.torture.crash",
        "--rounds",
        "999",
        "--directory",
        str(tmp_path),
    ]
    test = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (left := family_of(test.pid)) or not any(map(family_of, left)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        left += [pid for child in left for pid in family_of(child)]
    finally:
        test.kill()
        test.wait()
    while any(is_alive(pid) for pid in left):
        assert time.monotonic() < deadline, "a writer or its storage process goes on"
        time.sleep(0.05)


def family_of(pid: int) -> list[int]:
    """Its children."""
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
