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

from flexkv_core.cli.demo.acts import run_acts, with_ssd_tier
from flexkv_core.cli.demo.measure import Course, Report
from flexkv_core.cli.demo.table import print_report, record, summary
from flexkv_core.cli.harness.checkpoint import ensure_demo_model
from flexkv_core.cli.harness.server import (
    CPU_ARGUMENTS,
    CPU_ENVIRONMENT,
    KV_TRANSFER_CONFIG,
    ServerError,
    VllmServer,
)
from flexkv_core.config import cache_dir

_GPU_ARGUMENTS = ("--dtype", "float32", "--enable-prompt-tokens-details")
_GPU_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}


def demo(
    model: Annotated[
        str, typer.Option(help="A model's folder or name; without it SmolLM2-135M-Instruct.")
    ] = "",
    engine_args: Annotated[str, typer.Option(help="More arguments for vllm serve, as one string.")] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every measurement to this file.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, max=48, help="How many questions to ask.")] = 4,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often each kind of hit is measured for a question.")
    ] = 5,
    kv_space_gib: Annotated[
        int, typer.Option(min=1, help="Memory for the engine's own KV cache on a CPU.")
    ] = 2,
    gpu: Annotated[bool, typer.Option("--gpu", help="Serve with the CUDA build of vLLM.")] = False,
) -> None:
    """Asks a real vLLM server with FlexKV about one long document, with and without the engine's own prefix cache."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(
            f"[dim]{time.monotonic() - began:6.1f} s[/dim]  {text}", highlight=False, soft_wrap=True
        )

    if not model:
        say("the model: SmolLM2-135M-Instruct, Apache-2.0 (converted on the first run, about 30 s)")
        model = str(ensure_demo_model())
    environment = dict(
        _GPU_ENVIRONMENT if gpu else {**CPU_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(kv_space_gib)}
    )
    if not Path(model).is_dir():  # a name that has to be fetched
        environment.pop("HF_HUB_OFFLINE", None)
    signal.signal(signal.SIGTERM, _leave)  # so that the server is stopped then, too
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="demo-", dir=cache_dir()) as folder:
        arguments = [
            *(_GPU_ARGUMENTS if gpu else CPU_ARGUMENTS),
            *("--kv-transfer-config", with_ssd_tier(KV_TRANSFER_CONFIG, Path(folder) / "ssd")),
            *shlex.split(engine_args),
        ]
        server = VllmServer(model, arguments, environment, Path(folder) / "server.log")
        say(f"vllm serve {model} {shlex.join(arguments)}")
        try:
            report = run_acts(server, Course(questions, rounds, say), say)
        except ServerError as error:
            console.print(str(error), markup=False, highlight=False)
            raise typer.Exit(1) from error
    say("done")
    _finish(report, console, json_file)


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
