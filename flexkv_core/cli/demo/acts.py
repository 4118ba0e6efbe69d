"""The order of the demo: one server, a stop, the next, a kill, the one after that; then two, one after the other, beside ``flexkv serve``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flexkv_core.cli.demo.measure import Course, State
from flexkv_core.cli.harness.cache_server import CacheServer
from flexkv_core.cli.harness.server import EngineServer

_SSD_BYTES = "4GiB"
_SERVER_DEADLINE_MS = 500.0
"""The engine computes on all cores of a CPU, and the cache server may have to wait for one of them longer than the 5 ms of the default."""


def first_and_second_act(server: EngineServer, course: Course, say: Callable[[str], None]) -> None:
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


def third_act(sharing: EngineServer, cache: CacheServer, course: Course, say: Callable[[str], None]) -> None:
    """``sharing`` keeps its cache in the process ``cache``, is stopped, and is started again. After the other acts, whose questions it asks."""
    with cache:
        say(f"flexkv serve is up, with an empty cache; beside it {sharing.command_line}")
        with sharing, sharing.client() as client:
            course.fill_shared(client)
            say("stopping the engine and starting it again; flexkv serve goes on")
        with sharing, sharing.client() as client:
            course.after_engine_restart(client)


def ssd_settings(directory: Path) -> dict[str, object]:
    """FlexKV's settings for an SSD tier in ``directory``, which is made."""
    directory.mkdir()
    return {"ssd_dirs": [str(directory)], "ssd_bytes": _SSD_BYTES}


def shared_settings(socket: Path) -> dict[str, object]:
    """FlexKV's settings for the tiers of the ``flexkv serve`` at ``socket``."""
    return {"server": str(socket), "server_deadline_ms": _SERVER_DEADLINE_MS}
