"""The order of the demo: one server, a stop, the next, a kill, the one after that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flexkv_core.cli.demo.measure import Course, Report, State
from flexkv_core.cli.harness.client import VllmClient
from flexkv_core.cli.harness.server import VllmServer

_SSD_BYTES = "4GiB"


def run_acts(server: VllmServer, course: Course, say: Callable[[str], None]) -> Report:
    """The first act, a stop, the second act, a kill, and the second act again."""
    with server, VllmClient(server.base_url) as client:
        say("the server is up")
        course.first_act(client)
        course.prepare_restart(client)
        say("stopping the server and starting it again")
    with server, VllmClient(server.base_url) as client:
        course.after_restart(client, State.SSD_HIT)
        say("killing the server and starting it again")
        server.kill()
    with server, VllmClient(server.base_url) as client:
        course.after_restart(client, State.SSD_HIT_AFTER_KILL)
    return Report(tuple(course.asks))


def with_ssd_tier(transfer_config: str, directory: Path) -> str:
    """The one-line configuration, and an SSD tier in ``directory``, which is made."""
    directory.mkdir()
    extra = {"ssd_dirs": [str(directory)], "ssd_bytes": _SSD_BYTES}
    return json.dumps(
        {**json.loads(transfer_config), "kv_connector_extra_config": extra}, separators=(",", ":")
    )
