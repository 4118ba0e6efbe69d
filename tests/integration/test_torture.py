"""The crash test and the media test, short. ``scripts/crashtest`` and ``scripts/mediatest`` run them long."""

from __future__ import annotations

import json
import subprocess
import sys
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
