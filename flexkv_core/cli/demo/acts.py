"""The order of the demo: one server, a stop, the next, a kill, the one after that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flexkv_core.cli.demo.measure import Course, Report, State
from flexkv_core.cli.harness.server import EngineServer

_SSD_BYTES = "4GiB"


def run_acts(server: EngineServer, course: Course, say: Callable[[str], None]) -> Report:
    """The first act, a stop, the second act, a kill, and the second act again."""
    with server, server.client() as client:
        say("the server is up")
        course.first_act(client)
        course.prepare_restart(client)
        say("stopping the server and starting it again")
    with server, server.client() as client:
        course.after_restart(client, State.SSD_HIT)
        say("killing the server and starting it again")
        server.kill()
    with server, server.client() as client:
        course.after_restart(client, State.SSD_HIT_AFTER_KILL)
    return Report(tuple(course.asks))


def ssd_settings(directory: Path) -> dict[str, object]:
    """FlexKV's settings for an SSD tier in ``directory``, which is made."""
    directory.mkdir()
    return {"ssd_dirs": [str(directory)], "ssd_bytes": _SSD_BYTES}


def with_ssd_tier(transfer_config: str, directory: Path) -> str:
    """vLLM's one-line configuration, and an SSD tier in ``directory``, which is made."""
    return json.dumps(
        {**json.loads(transfer_config), "kv_connector_extra_config": ssd_settings(directory)},
        separators=(",", ":"),
    )
