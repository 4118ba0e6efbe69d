"""``flexkv fsck``: says what an SSD tier's directory holds and whether it is whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from flexkv_core.errors import StorageError
from flexkv_core.storage.fsck import FsckReport, check_directory


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
    except StorageError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0 if clean else 1


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
