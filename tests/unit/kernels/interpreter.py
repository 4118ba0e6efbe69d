"""Triton's interpreter in a process of its own.

The interpreter is chosen by an environment variable when a kernel's module is imported; in the tests' own process it would keep other
tests from compiling. One process serves all cases: ``Interpreter`` sends each as a pickle, the process answers with the differences.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

from flexkv_kernels.gpu_bench.quantised_trip import QuantisedCase
from flexkv_kernels.gpu_bench.round_trip import Case

_ROOT = Path(__file__).parents[3]


class Interpreter:
    """A process that runs cases one after another; it ends when it is closed."""

    def __init__(self) -> None:
        paths = [str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.kernels.interpreter"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def differences(self, case: Case | QuantisedCase) -> list[str]:
        """What :func:`~flexkv_kernels.gpu_bench.round_trip.differences`, or the function of the same kind for what is rounded, says there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        _send(self._process.stdin, case)
        answer = _receive(self._process.stdout)
        assert isinstance(answer, list), f"the interpreter failed: {answer}"
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _send(stream: BinaryIO, value: object) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO) -> object:
    header = stream.read(4)
    if len(header) < 4:
        return None
    return pickle.loads(stream.read(struct.unpack("<I", header)[0]))


def _serve() -> None:
    import traceback

    from flexkv_kernels.gpu_bench.quantised_trip import quantised_differences
    from flexkv_kernels.gpu_bench.round_trip import differences

    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    while isinstance(case := _receive(sys.stdin.buffer), Case | QuantisedCase):
        try:
            _send(output, differences(case) if isinstance(case, Case) else quantised_differences(case))
        except Exception:  # noqa: BLE001  the process's edge: the test shows it
            _send(output, traceback.format_exc())


if __name__ == "__main__":
    _serve()
