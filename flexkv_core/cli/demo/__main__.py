"""``python -m flexkv_core.cli.demo``; ``scripts/demo`` runs it in an environment that has vLLM."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from flexkv_core.cli.demo.acts import first_and_second_act, shared_settings, ssd_settings, third_act
from flexkv_core.cli.demo.engines import Engine, EngineChoice
from flexkv_core.cli.demo.measure import Course, Report
from flexkv_core.cli.demo.table import print_report, record, summary
from flexkv_core.cli.harness.cache_server import CacheServer
from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.server import ServerError
from flexkv_core.config import cache_dir, default_host_bytes


def demo(
    model: Annotated[
        str, typer.Option(help="A model's folder or name; without it SmolLM2-135M-Instruct.")
    ] = "",
    engine: Annotated[
        Engine, typer.Option(help="Which engine to serve with; scripts/demo has an environment for each.")
    ] = Engine.VLLM,
    engine_args: Annotated[
        str, typer.Option(help="More arguments for the engine's server, as one string.")
    ] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every measurement to this file.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, max=48, help="How many questions to ask.")] = 4,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often each kind of hit is measured for a question.")
    ] = 5,
    kv_space_gib: Annotated[int, typer.Option(min=1, help="Memory for vLLM's own KV cache on a CPU.")] = 2,
    shared: Annotated[
        bool,
        typer.Option(help="Play the third act as well: an engine restarts beside flexkv serve."),
    ] = True,
    gpu: Annotated[bool, typer.Option("--gpu", help="Serve with the CUDA build of vLLM.")] = False,
) -> None:
    """Asks a real server with FlexKV about one long document, with and without the engine's own prefix cache."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(
            f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {text}", highlight=False, soft_wrap=True
        )

    if not model:
        say("the model: SmolLM2-135M-Instruct, Apache-2.0 (converted on the first run, about 30 s)")
        model = str(ensure_demo_model())
    signal.signal(signal.SIGTERM, _leave)  # so that the server is stopped then, too
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="demo-", dir=cache_dir()) as folder:
        choice = EngineChoice(engine, model, shlex.split(engine_args), kv_space_gib, gpu)
        cache = CacheServer(Path(folder), default_host_bytes())
        server = choice.server(ssd_settings(Path(folder) / "ssd"), Path(folder) / "server.log")
        sharing = choice.server(shared_settings(cache.socket), Path(folder) / "sharing.log")
        say(server.command_line)
        try:
            course = Course(questions, rounds, say)
            first_and_second_act(server, course, say)
            if shared:
                third_act(sharing, cache, course, say)
        except ServerError as error:
            console.print(str(error), markup=False, highlight=False)
            raise typer.Exit(1) from error
    say("done")
    _finish(course.report, console, json_file)


def _finish(report: Report, console: Console, json_file: Path | None) -> NoReturn:
    print_report(report, console)
    if json_file is not None:
        json_file.write_text(record(report))
    console.file.flush()
    print(json.dumps(summary(report)), flush=True)
    raise typer.Exit(1 if report.faults() else 0)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> None:
    """The command's entry."""
    typer.run(demo)


if __name__ == "__main__":
    main()
