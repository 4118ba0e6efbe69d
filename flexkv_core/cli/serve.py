"""``flexkv serve`` and ``flexkv status``."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flexkv_core.config import load_config
from flexkv_core.errors import FlexKVError
from flexkv_core.serve.link import ask_status
from flexkv_core.serve.server import Server
from flexkv_core.storage.memory import check_capacity

SWITCH_INTERVAL_S = 0.0005
"""The thread that serves waits so long for others of this process, a tenth of Python's default: a match takes 0.1 ms."""
_STATUS_TIMEOUT_S = 5.0


def run_serve(socket: Path, models: int, overrides: Mapping[str, object]) -> int:
    """Serve until SIGTERM or SIGINT; the command's status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        config = load_config({key: value for key, value in overrides.items() if value is not None})
        config = config.model_copy(update={"server": None})
        check_capacity(int(config.host_bytes), config.huge_pages)
        server = Server(socket, config, models)
    except FlexKVError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        return 1
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    logging.getLogger(__name__).info("listening on %s, %d bytes of host memory", socket, config.host_bytes)
    server.run()
    return 0


def run_status(socket: Path, as_json: bool) -> int:
    """Print what the server at ``socket`` holds and for whom; the command's status."""
    try:
        status = ask_status(socket, _STATUS_TIMEOUT_S)
    except (OSError, FlexKVError) as error:
        Console(stderr=True).print(f"{socket}: {error}", style="red", markup=False, highlight=False)
        return 1
    if as_json:
        print(json.dumps(status, indent=2))
    else:
        Console().print(*_tables(status))
    return 0


def _tables(status: Mapping[str, Any]) -> list[Table]:
    title = f"{status['socket']}: process {status['pid']}, up {status['uptime_s']:,.0f} s"
    if not status["models"]:
        return [Table("no model yet: it comes with the first engine", title=title)]
    return [_model_table(model, title) for model in status["models"]]


def _model_table(model: Mapping[str, Any], title: str) -> Table:
    counters = model["counters"]
    table = Table("", "value", title=title, caption=model["model"])
    table.columns[1].justify = "right"
    share = model["host_blocks_used"] / max(1, model["host_blocks"])
    size = model["host_bytes"] / (1 << 30)
    table.add_row(
        "host tier, blocks", f"{model['host_blocks_used']:,} of {model['host_blocks']:,} ({share:.0%})"
    )
    table.add_row("host tier, GiB", f"{size:,.2f}")
    asked, hit = counters["lookup_tokens"], counters["hit_tokens"]
    table.add_row("tokens found", f"{hit:,} of {asked:,} ({hit / max(1, asked):.0%})")
    for key, value in counters.items():
        if value and key not in ("lookup_tokens", "hit_tokens"):
            table.add_row(key, f"{value:,.1f}" if isinstance(value, float) else f"{value:,}")
    for client in model["clients"]:
        state = "connected" if client["connected"] else "gone, not yet released"
        table.add_row(
            f"client: {client['name']}", f"{state}, {client['requests']:,} requests, {client['tasks']} tasks"
        )
    return table
