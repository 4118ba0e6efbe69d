"""The proxy in a process of its own. In the process that measures it would hold the interpreter's lock, and be measured with the engine.

Its weight is the least, as that of the store behind it should be: both stand for another machine, which takes no processor time from the
engine.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator

from flexkv_core.cli.harness.proxy import Fault, proxy_to
from flexkv_core.cli.harness.server import die_with_parent

LEAST_WEIGHT = 19
"""The ``nice`` value of what stands for another machine."""
_PIECE_BYTES = 1 << 20


class ProxyProcess:
    """``port``: where clients connect."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self.port = port

    def set(self, fault: Fault, delay_s: float = 0.0) -> None:
        """What happens to answers from now on; returns when that holds. ``delay_s``: of SLOW."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{fault.name} {delay_s}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().strip() == fault.name, "the proxy has ended"


@contextlib.contextmanager
def proxy_process(target: int) -> Iterator[ProxyProcess]:
    """A proxy to a server on loopback."""
    command = [
        *die_with_parent(),
        "nice",
        "-n",
        str(LEAST_WEIGHT),
        sys.executable,
        "-m",
        __name__,
        str(target),
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = process.stdout.readline()
        assert port, f"the proxy ended with {process.wait()}"
        yield ProxyProcess(process, int(port))
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Prints the port, then takes a fault and its delay a line, and answers each with the fault's name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=int)
    with proxy_to(parser.parse_args().target, piece_bytes=_PIECE_BYTES) as proxy:
        print(proxy.port, flush=True)
        for line in sys.stdin:
            name, delay_s = line.split()
            proxy.fault, proxy.delay_s = Fault[name], float(delay_s)
            print(name, flush=True)


if __name__ == "__main__":
    main()
