"""An installed engine with the patches for its version, and without them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from flexkv_core.cli.patch import job, series
from flexkv_core.cli.patch.job import State
from flexkv_core.cli.patch.target import Target, find


@contextmanager
def patched(engine: str) -> Iterator[Target]:
    """``engine`` of this environment, patched where its version needs it; afterwards every file is what it was."""
    target, patches = find(engine, None, None, (engine,)), series.patches_folder()
    job.revert(target, patches)  # what an interrupted run has left
    before = _digests(target)
    assert job.apply(target, patches).state in (State.APPLIED, State.NOT_NEEDED)
    print(f"{engine} {target.version}: {job.look(target, patches).state.value}")
    try:
        yield target
    finally:
        job.revert(target, patches)
    assert _digests(target) == before


def _digests(target: Target) -> dict[str, str]:
    """The checksum of every source file of the engine."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(target.package.rglob("*.py"))
    }
