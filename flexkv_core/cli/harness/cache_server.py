"""A real ``flexkv serve``, which is gone whatever way the block that uses it is left."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from flexkv_core.cli.harness.server import ServerError
from flexkv_core.config import as_environment

_START_S = 60.0
_STOP_S = 30.0


class CacheServer:
    """Starts ``flexkv serve`` with a socket and a log in ``folder`` (which exists), and stops it; a context manager, which may be entered
    again.

    ``settings``: more of FlexKV's, by key; ``models``: for how many it has room. Entering returns once the socket is there, and raises
    ServerError when the process dies before that.
    """

    def __init__(
        self,
        folder: Path,
        host_bytes: int | str,
        settings: Mapping[str, object] | None = None,
        models: int = 1,
    ) -> None:
        self.socket = folder / "serve.sock"
        self._log = folder / "serve.log"
        variables = as_environment({"host_bytes": str(host_bytes), **(settings or {})})
        self._command = [
            *("env", *(f"{name}={value}" for name, value in variables.items())),
            *(sys.executable, "-m", "flexkv_core.cli", "serve", "--socket", str(self.socket)),
            *("--models", str(models)),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> CacheServer:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stderr=log)
        deadline = time.monotonic() + _START_S
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._stop()
                raise ServerError(f"flexkv serve did not start\n{self._log.read_text()}")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
