"""fio (https://github.com/axboe/fio), the yardstick of disk benchmarks, at the settings that favour it: registered buffers and files, and
huge pages where the system gives them."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flexkv_core.errors import ConfigError

TIMEOUT_S = 300
_HUGE_PAGES = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"  # glibc 2.35: its allocations ask for them; not every fio has an option for it


@dataclass(frozen=True)
class Rate:
    """What one measurement moved."""

    bytes_per_s: float
    cpu_us_per_op: float


def find_fio() -> str:
    """Path of the program.

    Raises:
        ConfigError: it is not installed.
    """
    program = shutil.which("fio")
    if program is None:
        raise ConfigError("this benchmark measures against fio, which is not installed: apt-get install fio")
    return program


def run_fio(file: Path, file_bytes: int, write: bool, block_bytes: int, depth: int, total_bytes: int) -> Rate:
    """Move ``total_bytes`` in blocks at random places of an existing file, past the page cache."""
    options = {
        "name": "flexkv",
        "filename": file,
        "size": file_bytes,
        "io_size": total_bytes,
        "rw": "randwrite" if write else "randread",
        "bs": block_bytes,
        "iodepth": depth,
        "ioengine": "io_uring",
        "direct": 1,
        "fixedbufs": 1,
        "registerfiles": 1,
        "norandommap": 1,
        "randrepeat": 0,
        "scramble_buffers": 0,
        "gtod_reduce": 1,
        "output-format": "json",
    }
    command = ["env", _HUGE_PAGES, find_fio(), *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    job = json.loads(done.stdout)["jobs"][0]
    part = job["write" if write else "read"]
    cpu_share = (job["usr_cpu"] + job["sys_cpu"]) / 100
    return Rate(part["bw_bytes"], cpu_share * job["job_runtime"] * 1000 / part["total_ios"])
