"""What the demo shows: a table of the states, the answers, and one line of JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from flexkv_core.cli.demo.measure import SSD_STATES, Report, State


def print_report(report: Report, console: Console) -> None:
    """The answers, the table and the ratios."""
    _print_answers(report, console)
    table = Table(title="Time to first token, by where the prompt's KV cache comes from")
    table.add_column("KV cache from")
    for heading in ("median TTFT ms", "tokens found in cache", "of them from FlexKV", "answers identical"):
        table.add_column(heading, justify="right")
    for state in report.states:
        table.add_row(
            state.value,
            f"{report.ttft_ms(state):,.1f}",
            f"{report.cached_tokens(state):,}",
            f"{report.external_tokens(state):,}",
            "yes" if report.identical(state) else "NO",
        )
    console.print(table)
    recompute, _, host, ssd = _medians(report)
    shared = _shared(report)
    from_server = "" if shared is None else f", from flexkv serve {recompute / shared:,.1f} times"
    console.print(
        f"FlexKV brought the prefix back {recompute / host:,.1f} times as fast as the engine recomputes it, and after a restart from the "
        f"SSD {recompute / ssd:,.1f} times{from_server}; in the same turn a hit in host memory takes "
        f"{report.host_to_device_ratio():.2f} times as long as one in the engine's own cache (median)."
    )
    for fault in dict.fromkeys(report.faults()):
        console.print(f"[red]not as it should be: {fault}[/red]")


def summary(report: Report) -> dict[str, Any]:
    """The figures of the last line."""
    recompute, device, host, ssd = _medians(report)
    shared = _shared(report)
    return {
        "ttft_recompute_ms": round(recompute, 2),
        "ttft_device_hit_ms": round(device, 2),
        "ttft_host_hit_ms": round(host, 2),
        "ttft_ssd_hit_after_restart_ms": round(ssd, 2),
        **({} if shared is None else {"ttft_shared_hit_after_engine_restart_ms": round(shared, 2)}),
        "identical": all(report.identical(state) for state in State),
    }


def record(report: Report) -> str:
    """All measurements as one JSON object, for ``--json``."""
    recompute, _, host, ssd = _medians(report)
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
        "speed_up": round(recompute / host, 2),
        "speed_up_ssd": round(recompute / ssd, 2),
        "faults": report.faults(),
        "asks": asks,
    }
    return json.dumps(figures, indent=1) + "\n"


def _shared(report: Report) -> float | None:
    """Time to the first token from ``flexkv serve``, where that act was played."""
    return report.ttft_ms(State.SHARED_HIT) if State.SHARED_HIT in report.states else None


def _medians(report: Report) -> tuple[float, float, float, float]:
    """Times to the first token: recomputed, from the device, from host memory, from the SSD (restarted and killed together)."""
    one = (report.ttft_ms(state) for state in (State.RECOMPUTE, State.DEVICE_HIT, State.HOST_HIT))
    return (*one, report.ttft_ms(*SSD_STATES))  # type: ignore[return-value]


def _print_answers(report: Report, console: Console) -> None:
    console.print()
    answers = {ask.text: ask.answer.text for ask in report.asks if ask.state is State.RECOMPUTE}
    for question, answer in answers.items():
        console.print(f"  [bold]{question}[/bold]")
        console.print(f"  {answer.strip()}", markup=False)
    console.print()
