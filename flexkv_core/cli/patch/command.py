"""``flexkv patch list | check | apply | revert | status``: words and exit codes.

0: done, or nothing to do. 1: refused, or it failed; nothing was changed. 2: the command line is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flexkv_core.cli.patch import job, series
from flexkv_core.cli.patch.job import Finding, State
from flexkv_core.cli.patch.target import find
from flexkv_core.errors import PatchError

app = typer.Typer(
    help="Patches for engines whose version lacks a hook: apply them, take them back byte for byte.",
    no_args_is_help=True,
)

_Engine = Annotated[
    str | None, typer.Option("--engine", help="The engine; needed where several are installed.")
]
_TargetPath = Annotated[
    Path | None,
    typer.Option("--target", help="A site-packages folder or source checkout; default: this Python's."),
]
_Version = Annotated[
    str | None, typer.Option("--version", help="The engine's version, where its files do not tell it.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_patches(engine: _Engine = None, as_json: _Json = False) -> None:
    """Show which versions have patches, and why."""
    _end(lambda: _listed(engine), as_json)


@app.command()
def status(
    engine: _Engine = None, target: _TargetPath = None, version: _Version = None, as_json: _Json = False
) -> None:
    """Show what the engine is and which patches it has. Changes nothing."""
    _end(lambda: _told(job.look(find(engine, target, version, _known()), series.patches_folder())), as_json)


@app.command()
def check(
    engine: _Engine = None, target: _TargetPath = None, version: _Version = None, as_json: _Json = False
) -> None:
    """Try in memory whether all patches would apply. Changes nothing."""
    _end(
        lambda: _checked(job.look(find(engine, target, version, _known()), series.patches_folder())), as_json
    )


@app.command()
def apply(
    engine: _Engine = None, target: _TargetPath = None, version: _Version = None, as_json: _Json = False
) -> None:
    """Apply all patches for the engine's version, or none."""
    _end(lambda: _told(job.apply(find(engine, target, version, _known()), series.patches_folder())), as_json)


@app.command()
def revert(
    engine: _Engine = None, target: _TargetPath = None, version: _Version = None, as_json: _Json = False
) -> None:
    """Take back what was applied; every file is then byte for byte what it was."""
    _end(lambda: _told(job.revert(find(engine, target, version, _known()), series.patches_folder())), as_json)


def _known() -> tuple[str, ...]:
    return tuple(series.engines(series.patches_folder()))


def _end(action: Callable[[], dict[str, object]], as_json: bool) -> None:
    """Run, print, exit."""
    try:
        result, failed = action(), False
    except PatchError as error:
        result, failed = {"error": str(error)}, True
    if as_json:
        print(json.dumps(result))
    else:
        _print(result)
    if failed:
        raise typer.Exit(1)


def _listed(engine: str | None) -> dict[str, object]:
    folder = series.patches_folder()
    known = series.engines(folder)
    if engine is not None and engine not in known:
        raise PatchError(f"--engine {engine}: must be one of {', '.join(known)}")
    result: dict[str, object] = {}
    for name in [engine] if engine else known:
        result[name] = {
            "needs no patch since": known[name],
            "versions": {
                version: {
                    patch.name: dict(patch.header) for patch in series.load(folder, name, version).patches
                }
                for version in series.versions(folder, name)
            },
        }
    return result


def _told(found: Finding) -> dict[str, object]:
    patches = found.record.patches if found.record else found.series.patches if found.series else ()
    result: dict[str, object] = {
        "engine": found.target.engine,
        "version": found.target.version,
        "target": str(found.target.root),
        "state": found.state.value,
    }
    if found.reason:
        result["reason"] = found.reason
    return result | {"patches": [patch.name for patch in patches]}


def _checked(found: Finding) -> dict[str, object]:
    if found.state is State.PRISTINE and found.series is not None:
        _, contents = job.planned(found.series, found.target)
        return _told(found) | {"would change": sorted(contents)}
    if found.state not in (State.APPLIED, State.NOT_NEEDED):
        target = found.target
        raise PatchError(
            f"{target.engine} {target.version} in {target.root} is {found.state.value}: {found.reason}"
        )
    return _told(found)


def _print(result: dict[str, object]) -> None:
    console = Console(stderr="error" in result)
    for name, value in result.items():
        if isinstance(value, dict):
            _print_versions(console, name, value)
        else:
            text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            console.print(f"{name}: {text}", markup=False, highlight=False, soft_wrap=True)


def _print_versions(console: Console, engine: str, told: dict[str, object]) -> None:
    console.print(f"{engine}: needs no patch since {told['needs no patch since']}", highlight=False)
    versions = told["versions"]
    assert isinstance(versions, dict)
    for version, patches in versions.items():
        for patch, header in patches.items():
            console.print(
                f"  {version}  {patch}: {header.get('Why', '')}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
