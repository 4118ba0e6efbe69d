"""Commands of ``flexkv``. Each loads what it needs when it is called, so that ``flexkv --help`` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flexkv_core.cli.bench import BENCHES, results_table, run_bench, write_json
from flexkv_core.cli.patch.command import app as patch_app
from flexkv_core.config import FlexKVConfig, Setting, default_socket, effective_settings, markdown_table
from flexkv_core.errors import ConfigError

app = typer.Typer(
    help="FlexKV, a tiered KV-cache manager for LLM inference engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(patch_app, name="patch")


@app.callback()
def _commands() -> None:
    """Makes a group, so that commands keep their names however many there are."""


@app.command()
def config(
    file: Annotated[Path | None, typer.Option("--file", help="Read this YAML or JSON file.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of all keys instead.")
    ] = False,
) -> None:
    """Show the configuration in force here and where each value comes from."""
    if markdown:
        print(markdown_table())
        return
    try:
        settings = effective_settings(file)
    except ConfigError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    Console().print(_settings_table(settings))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(BENCHES)}.")],
    engine: Annotated[
        str, typer.Option("--engine", help="Measure with this engine, where there is a choice.")
    ] = "vllm",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write one flat JSON object here.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer repetitions: a smoke test, no figures.")
    ] = False,
    blocks: Annotated[
        int | None,
        typer.Option("--blocks", min=1, help="Blocks to work on, for benchmarks that let one choose."),
    ] = None,
) -> None:
    """Measure one part of FlexKV on this machine."""
    if engine != "vllm":
        name = f"{name}-{engine}"
    if name not in BENCHES:
        raise typer.BadParameter(f"no benchmark {name!r}; there are: {', '.join(BENCHES)}")
    console = Console()
    console.print(f"{name}: {BENCHES[name].summary} …", highlight=False)
    try:
        results = run_bench(name, quick, blocks)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(results_table(name, results))
    if json_file is not None:
        write_json(json_file, results)


@app.command()
def fsck(
    directory: Annotated[Path, typer.Argument(help="A directory of ssd_dirs, or a folder in it.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is wrong; the directory must not be in use.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a tier.")] = False,
    remove_others: Annotated[
        bool,
        typer.Option(
            "--remove-other-identities",
            help="Instead of a check: delete the tiers that are not in use, but the one that was used last.",
        ),
    ] = False,
) -> None:
    """Check the SSD tier in DIRECTORY: every recorded block against its checksum. Changes nothing without --repair."""
    from flexkv_core.cli.fsck import run_fsck, run_remove_others

    if remove_others:
        raise typer.Exit(run_remove_others(directory, as_json))
    raise typer.Exit(run_fsck(directory, repair, as_json))


@app.command()
def serve(
    socket: Annotated[Path | None, typer.Option("--socket", help="Listen on this unix socket.")] = None,
    host_bytes: Annotated[
        str | None, typer.Option("--host-bytes", help='Size of the host tier, such as "64GiB".')
    ] = None,
    ssd_dirs: Annotated[
        list[Path] | None, typer.Option("--ssd-dirs", help="A directory of the SSD tier; may be repeated.")
    ] = None,
    ssd_bytes: Annotated[
        str | None, typer.Option("--ssd-bytes", help="What the SSD tier takes in each directory.")
    ] = None,
    models: Annotated[
        int, typer.Option("--models", min=1, max=16, help="Models to hold; the memory is divided among them.")
    ] = 1,
) -> None:
    """Keep one cache for several engines of this machine; each names the socket as its `server`. Other settings come from the environment and
    FLEXKV_CONFIG_PATH."""
    from flexkv_core.cli.serve import run_serve

    overrides = {
        "host_bytes": host_bytes,
        "ssd_dirs": [str(directory) for directory in ssd_dirs] if ssd_dirs else None,
        "ssd_bytes": ssd_bytes,
    }
    raise typer.Exit(run_serve(socket or default_socket(), models, overrides))


@app.command()
def status(
    socket: Annotated[Path | None, typer.Option("--socket", help="Of the server.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a running `flexkv serve` holds, and for whom."""
    from flexkv_core.cli.serve import run_status

    raise typer.Exit(run_status(socket or default_socket(), as_json))


def _settings_table(settings: list[Setting]) -> Table:
    table = Table("key", "value", "from", "meaning", title="FlexKV's configuration")
    for setting in settings:
        meaning = FlexKVConfig.model_fields[setting.key].description
        table.add_row(setting.key, str(setting.value), setting.origin, meaning)
    return table
