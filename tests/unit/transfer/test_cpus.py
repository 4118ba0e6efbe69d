"""Which CPUs an engine leaves: read from real threads that are bound to some, each test in a session of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CPUS = sorted(os.sched_getaffinity(0))
ENGINE = """
import os, subprocess, sys, threading, time
from flexkv_core.transfer.cpus import engine_cpus

started = threading.Barrier(2)

def compute(cpus):
    os.sched_setaffinity(0, cpus)
    started.wait()
    time.sleep(60)

def thread(*cpus):
    threading.Thread(target=compute, args=(cpus,), daemon=True).start()
    started.wait()

def process(*cpus, **options):
    code = f"import os; os.sched_setaffinity(0, {cpus}); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    child.stdout.readline()
"""
TELL = "import json; cpus = engine_cpus(); print(json.dumps([sorted(cpus.allowed), sorted(cpus.spare)]))"

pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU leaves none")


def told(engine: str) -> list[list[int]]:
    """``allowed`` and ``spare``, in a process that has done what ``engine`` says."""
    command = [sys.executable, "-c", f"{ENGINE}\n{engine}\n{TELL}"]
    run = subprocess.run(
        command, start_new_session=True, timeout=60, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(run.stdout)


def test_what_nobody_is_bound_to_is_spare() -> None:
    assert told("") == [CPUS, CPUS]


def test_a_bound_thread_of_this_process_takes_its_cpu() -> None:
    assert told(f"thread({CPUS[0]})") == [CPUS, CPUS[1:]]


def test_a_bound_worker_takes_its_cpu() -> None:
    assert told(f"process({CPUS[0]})") == [CPUS, CPUS[1:]]


def test_a_process_of_another_session_takes_none() -> None:
    assert told(f"process({CPUS[0]}, start_new_session=True)") == [CPUS, CPUS]


def test_an_engine_that_binds_all_leaves_all() -> None:
    assert told("\n".join(f"thread({cpu})" for cpu in CPUS)) == [CPUS, CPUS]


def test_the_bound_thread_may_be_the_one_that_asks() -> None:
    started_before = f"thread({', '.join(map(str, CPUS))})"
    assert told(f"{started_before}\nos.sched_setaffinity(0, [{CPUS[0]}])") == [CPUS, CPUS[1:]]


def test_an_engine_that_was_kept_to_some_cpus_stays_there() -> None:
    assert told(f"os.sched_setaffinity(0, [{CPUS[0]}])") == [CPUS[:1], CPUS[:1]]
