"""What the demo shows: a table of the three states, the answers, and one line of JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from flexkv_core.cli.demo.measure import Report, State


def print_report(report: Report, console: Console) -> None:
    """The answers, the table and the ratios."""
    _print_answers(report, console)
    table = Table(title="Time to first token, by where the prompt's KV cache comes from")
    table.add_column("KV cache from")
    for heading in ("median TTFT ms", "tokens found in cache", "of them from FlexKV", "answers identical"):
        table.add_column(heading, justify="right")
    for state in State:
        table.add_row(
            state.value,
            f"{report.ttft_ms(state):,.1f}",
            f"{report.cached_tokens(state):,}",
            f"{report.external_tokens(state):,}",
            "yes" if report.identical(state) else "NO",
        )
    console.print(table)
    speed_up = report.ttft_ms(State.RECOMPUTE) / report.ttft_ms(State.HOST_HIT)
    console.print(
        f"FlexKV brought the prefix back {speed_up:,.1f} times as fast as the engine recomputes it; in the same turn a hit in host "
        f"memory takes {report.host_to_device_ratio():.2f} times as long as one in the engine's own cache (median)."
    )
    for fault in dict.fromkeys(report.faults()):
        console.print(f"[red]not as it should be: {fault}[/red]")


def summary(report: Report) -> dict[str, Any]:
    """The four figures of the last line."""
    return {
        "ttft_recompute_ms": round(report.ttft_ms(State.RECOMPUTE), 2),
        "ttft_device_hit_ms": round(report.ttft_ms(State.DEVICE_HIT), 2),
        "ttft_host_hit_ms": round(report.ttft_ms(State.HOST_HIT), 2),
        "identical": all(report.identical(state) for state in State),
    }


def record(report: Report) -> str:
    """All measurements as one JSON object, for ``--json``."""
    asks = [
        {
            "question": ask.question,
            "state": ask.state.name.lower(),
            "ttft_ms": round(ask.answer.ttft_ms, 3),
            "total_ms": round(ask.answer.total_ms, 3),
            "prompt_tokens": ask.answer.prompt_tokens,
            "cached_tokens": ask.answer.cached_tokens,
            "external_tokens": ask.external_tokens,
        }
        for ask in report.asks
    ]
    figures = {
        **summary(report),
        "host_to_device_ratio": round(report.host_to_device_ratio(), 4),
        "speed_up": round(report.ttft_ms(State.RECOMPUTE) / report.ttft_ms(State.HOST_HIT), 2),
        "faults": report.faults(),
        "asks": asks,
    }
    return json.dumps(figures, indent=1) + "\n"


def _print_answers(report: Report, console: Console) -> None:
    console.print()
    for ask in report.asks:
        if ask.state is State.RECOMPUTE:
            console.print(f"  [bold]{report.document.questions[ask.question]}[/bold]")
            console.print(f"  {ask.answer.text.strip()}", markup=False)
    console.print()
