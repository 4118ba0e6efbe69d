"""A real engine's server in a process group of its own, which is gone whatever way the block that uses it is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx
from typing_extensions import Self

from flexkv_core.cli.harness.client import VllmClient

KV_TRANSFER_CONFIG = '{"kv_connector":"FlexKVConnector","kv_role":"kv_both"}'
"""All that a user of vLLM types to have FlexKV."""


def transfer_config(settings: Mapping[str, object], role: str = "kv_both") -> str:
    """The one line with FlexKV's ``settings`` in it, and vLLM's ``kv_role``."""
    values = {**json.loads(KV_TRANSFER_CONFIG), "kv_role": role, "kv_connector_extra_config": dict(settings)}
    return json.dumps(values, separators=(",", ":"))


CPU_ENVIRONMENT: Mapping[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # POST /reset_prefix_cache exists in development mode only.
    "VLLM_SERVER_DEV_MODE": "1",
    # Without it the first request with log-probabilities compiles for 15 s.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
CPU_ARGUMENTS: Sequence[str] = (
    *("--enforce-eager", "--dtype", "float32", "--block-size", "64"),
    *("--max-num-batched-tokens", "2048", "--enable-prompt-tokens-details"),
)
"""float32, because only there a hit and a recomputation are equal token for token; 64 is a block size that the CPU build takes."""

TURN_PAUSE_S = 1.2
"""Between a request to one server and the next to another on the same cores. For a second after a request vLLM's processes poll for the next
one, and OpenMP's threads for 0.2 s: a request that begins on the other server meanwhile took 0.7 s longer in one of the two directions."""

_POLL_S = 0.2
_GRACE_S = 30.0
"""vLLM's own shutdown takes up to 15 s on a loaded machine; only after this long is the group killed."""

_LOG_PREFIX = re.compile(r"^\(\w+ pid=\d+\) (?:[A-Z]+ \S+ \S+ \[[\w.]+:\d+\] )?", re.MULTILINE)
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception): .+(?:\n  \S.*)*", re.MULTILINE)
"""The last line of a traceback and the lines of a longer message that follow it."""


class ServerError(RuntimeError):
    """The server did not start, or died; the message ends with the tail of its log."""


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class EngineServer:
    """Starts an engine's server and stops it; use it as a context manager, in the thread that outlives it.

    ``command`` starts it, the address and the port are added; ``environment`` is added to the caller's. The log goes to ``log_path``
    (its folder must exist). ``host``: the address to listen on. ``prefix``: a command that runs the server, in a network namespace for
    instance. Entering returns once ``/health`` answers, and raises ServerError when the process dies before that or
    ``deadline_s`` passes. Leaving sends SIGTERM, and SIGKILL to the whole process group when that was not enough.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        deadline_s: float = 300.0,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        self.port = free_port()
        self.base_url = f"http://{host}:{self.port}"
        self.log_path = log_path
        self._deadline_s = deadline_s
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [
            *die_with_parent(),
            *prefix,
            "env",
            *(f"{name}={value}" for name, value in environment.items()),
            *command,
            *("--host", host, "--port", str(self.port)),
        ]

    def client(self) -> VllmClient:
        """A new connection to the server, in the words of its engine; use it as a context manager."""
        return VllmClient(self.base_url)

    @property
    def command_line(self) -> str:
        """How the server is started, without the caller's environment."""
        return shlex.join(self._command[self._command.index("-m") + 1 :])

    @property
    def pid(self) -> int:
        """The server's process id, which is its group's too."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the server's first process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def group_alive(self) -> bool:
        """Whether any process of the server's group is left."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and waits for ``/health``."""
        self.launch()
        self.wait_healthy()

    def launch(self) -> None:
        """Starts the server and waits for nothing, so that several start at once; whoever calls this calls :meth:`stop`."""
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_healthy(self) -> None:
        """Waits for ``/health``. A server that does not get there is stopped, and ServerError raised."""
        try:
            self._wait_healthy()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGTERM, 30 s of grace, then SIGKILL for whatever of the group is left. A second call does nothing."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        # The first process may go before its children, which still have shared memory to remove.
        while time.monotonic() < deadline and (self._process.poll() is None or self.group_alive):
            time.sleep(_POLL_S / 4)
        self.kill()

    def kill(self) -> None:
        """SIGKILL for the whole group, at once; returns when the first process was reaped."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def log_text(self) -> str:
        """All that the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def _wait_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._deadline_s
        with httpx.Client(base_url=self.base_url, timeout=5.0) as client:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise ServerError(
                        f"the server ended with status {self._process.returncode} before it served\n{self._words()}"
                    )
                try:
                    if client.get("/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(_POLL_S)
        raise ServerError(f"the server did not answer within {self._deadline_s:.0f} s\n{self._words()}")

    def _words(self) -> str:
        """The errors in the log, whose cause engines print long before its end, and the end of it."""
        errors = dict.fromkeys(_ERROR.findall(_LOG_PREFIX.sub("", self.log_text())))
        return "\n".join(["errors in the log:", *errors, f"the end of {self.log_path}:", self.log_tail()])


class VllmServer(EngineServer):
    """``vllm serve``; ``arguments`` follow the model's name on the command line."""

    def __init__(
        self,
        model: str | Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        deadline_s: float = 300.0,
        python: str = sys.executable,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *arguments]
        super().__init__(command, environment, log_path, deadline_s, host, prefix)


def die_with_parent() -> list[str]:
    """A prefix that has the kernel end the server when the starting thread dies, even by SIGKILL (util-linux; Linux only)."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []
