"""``flexkv fsck``: says what an SSD tier's directory holds, whether it is whole, and what lies there that nobody uses."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from flexkv_core.errors import StorageError
from flexkv_core.storage.fsck import FsckReport, check_directory
from flexkv_core.storage.old_tiers import TierUse, others, remove, tiers_in

_DAY_S = 86_400


def run_fsck(directory: Path, repair: bool, as_json: bool) -> int:
    """Print a report a tier; the exit code: 0 all is well (now), 1 something is wrong, 2 it could not be checked."""
    console = Console()
    clean = True
    try:
        for report in check_directory(directory, repair):
            clean &= report.is_clean
            if as_json:
                print(json.dumps({**asdict(report), "clean": report.is_clean}))
            else:
                console.print(_as_text(report), markup=False, highlight=False)
        if not as_json:
            _list_others(console, directory)
    except StorageError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0 if clean else 1


def run_remove_others(directory: Path, as_json: bool) -> int:
    """Remove the tiers in a directory that are not in use, but for the one that was used last; the exit code: 0 done, 2 not all."""
    try:
        for tier in others(tiers_in(directory)):
            remove(tier)
            content = {"removed": [str(folder) for folder in tier.folders], "bytes": tier.bytes_on_disk}
            text = f"removed {tier.folders[0]}: {_size_and_age(tier)}"
            print(json.dumps(content) if as_json else text)
    except StorageError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def _list_others(console: Console, directory: Path) -> None:
    for tier in others(tiers_in(directory)):
        console.print(
            f"{tier.folders[0]}: another identity, {_size_and_age(tier)}; --remove-other-identities removes it",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _size_and_age(tier: TierUse) -> str:
    age_days = max(0.0, time.time() - tier.last_used_unix_s) / _DAY_S
    return f"{tier.bytes_on_disk / 2**30:.2f} GiB, last used {age_days:.1f} days ago"


def _as_text(report: FsckReport) -> str:
    state = "in use" if report.live else "not in use"
    lines = [
        f"{report.folder} ({state})",
        f"  {report.blocks} blocks in {report.slots} slots, {report.checked_blocks} compared with their checksums",
        f"  {len(report.corrupt_slots)} corrupt {list(report.corrupt_slots[:16]) or ''}".rstrip(),
        f"  {report.bad_catalog_rows} unreadable rows of the catalogue",
    ]
    if report.duplicate_blocks:
        lines.append(f"  {report.duplicate_blocks} blocks are there twice (harmless)")
    if report.removed_records:
        lines.append(f"  {report.removed_records} records removed")
    lines.append("  clean" if report.is_clean else "  NOT clean")
    return "\n".join(lines)
