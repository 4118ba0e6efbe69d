"""``scripts/crashtest``: kills a manager and its storage process at random moments, starts again, and looks at every block.

A child process has a manager under full load on a small SSD tier, whose slots are always used anew. It, its storage process, or both
are killed with SIGKILL. Then every block that the catalogue records is compared with what its key says, first in the files, then
through a new manager, which goes on from there. What the first child reported as durable must still be there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from flexkv_core.block_manager import BlockManager
from flexkv_core.cli.torture.device import NumpyDevice
from flexkv_core.cli.torture.disk import Image, take_image
from flexkv_core.cli.torture.ledger import Ledger, Word
from flexkv_core.cli.torture.load import (
    CHAIN_BLOCKS_MAX,
    THREADS,
    Client,
    Load,
    leaked_slots,
    make_manager,
    settings,
)
from flexkv_core.cli.torture.observer import install
from flexkv_core.config import FlexKVConfig, cache_dir
from flexkv_core.storage.base import key_words
from flexkv_core.types import KEY_BYTES

SSD_SLOTS = 768
HOST_SLOTS = 256
DIRECTORIES = 2
WRITE_BYTES = 512 << 10
LOAD_S = 0.8  # at most, before the first kill of a round
START_S = 0.6  # about what a start takes; some are killed meanwhile
KILLED_STARTS = 0.15
PAUSES = 0.5  # of the rounds in which the manager survives its storage process
KILLED_BEFORE_THEIR_MANAGER = 0.5  # of the storage processes that were started again
_PATIENCE_S = 60.0
_POLL_S = 0.002
_PR_SET_PDEATHSIG = 1  # of prctl(2)
MODES = {"manager": 1, "storage": 1, "both": 2}
"""Whom to kill, and how often. A storage process that outlives its manager ends in order, so those deaths cut no write in two."""


@dataclass
class Verdict:
    """The last line of the output; all but the first two must be 0."""

    rounds: int = 0
    blocks_checked: int = 0
    wrong_bytes: int = 0
    lost_durable: int = 0
    leaked_slots: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.wrong_bytes or self.lost_durable or self.leaked_slots)


class CrashTest:
    """One tier through many rounds; ``folder`` is empty at first."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.verdict = Verdict()
        self.durable_blocks = 0
        self.kills = dict.fromkeys((*MODES, "start"), 0)
        self._rng = random.Random(seed)
        directories = [str(folder / f"ssd{i}") for i in range(DIRECTORIES)]
        self._directories = directories
        self._ledger = Ledger(SSD_SLOTS)

    def run(self, rounds: int, say: Callable[[int], None] = lambda done: None) -> Verdict:
        """Every kill is followed by a look at what is left.

        Raises:
            RuntimeError: a child ended by itself, or does not answer: the test could not go on.
        """
        image: Image | None = None
        for done in range(rounds):
            if self._rng.random() < KILLED_STARTS:
                image = self._kill_start(image)
            with self._child(image) as child:
                self._disturb(child)
            image = self._inspect()
            self.verdict.rounds = done + 1
            say(done + 1)
        with self._child(image) as child:
            self._check_while_it_lives(child)
            self._tell(child, Word.STOP)
            child.join(_PATIENCE_S)
            if child.exitcode != 0:
                raise RuntimeError(f"the last manager did not end well: {child.exitcode}")
        self._inspect()
        words = self._ledger.words
        self.verdict.blocks_checked += int(words[Word.CHECKED])
        self.verdict.wrong_bytes += int(words[Word.WRONG])
        self.verdict.lost_durable += int(words[Word.LOST])
        self.verdict.leaked_slots += int(words[Word.LEAKED])
        self.durable_blocks = int(words[Word.WRITTEN])
        return self.verdict

    # The parent

    @contextlib.contextmanager
    def _child(self, image: Image | None, wait: bool = True) -> Iterator[BaseProcess]:
        """A child that has a manager. Forked, so that a round costs no import; this process has no threads."""
        words = self._ledger.words
        words[[Word.READY, Word.STORAGE_PID, Word.PAUSE, Word.PAUSED, Word.STOP]] = 0
        engine = self._rng.choice(("auto", "threads"))
        config = settings(self._directories, SSD_SLOTS, HOST_SLOTS, io_engine=engine, scrub_bytes_per_s=0)
        child = multiprocessing.get_context("fork").Process(
            target=_serve, args=(config, self._ledger, image, self._rng.randrange(1 << 30), os.getpid())
        )
        child.start()
        try:
            if wait:
                self._wait_for(child, Word.READY)
            yield child
        finally:
            child.kill()
            child.join()

    def _disturb(self, child: BaseProcess) -> None:
        mode = self._rng.choices(list(MODES), list(MODES.values()))[0]
        self.kills[mode] += 1
        self._sleep(LOAD_S)
        if mode == "manager":
            return  # leaving the context kills it
        killed = self._kill_storage(child)
        if mode == "both" or not killed:
            return
        self._wait_for(child, Word.STORAGE_PID)
        self._sleep(LOAD_S / 2)
        if self._rng.random() < PAUSES:
            self._check_while_it_lives(child)
            self._sleep(LOAD_S / 4)
        if self._rng.random() < KILLED_BEFORE_THEIR_MANAGER:
            self._kill_storage(child)

    def _kill_storage(self, child: BaseProcess) -> bool:
        pid = int(self._ledger.words[Word.STORAGE_PID])
        if pid <= 0 or _parent_of(pid) != child.pid:
            return False
        os.kill(pid, signal.SIGKILL)
        while self._ledger.words[Word.STORAGE_PID] == pid and child.is_alive():
            time.sleep(_POLL_S)
        return True

    def _kill_start(self, image: Image | None) -> Image | None:
        self.kills["start"] += 1
        with self._child(image, wait=False):
            self._sleep(START_S)
        return self._inspect() if image is not None else None

    def _check_while_it_lives(self, child: BaseProcess) -> None:
        self._tell(child, Word.PAUSE)
        self._wait_for(child, Word.PAUSED)

    def _inspect(self) -> Image:
        """Compare the files with the ledger, and bring the ledger to what they hold."""
        ledger, image = self._ledger, take_image(self._directories, SSD_SLOTS)
        records = image.records
        held = np.zeros((SSD_SLOTS, 2), np.uint64)
        held[records.slots] = key_words(records.keys)
        kept = ledger.kept & ~(ledger.keys == held).all(axis=1)
        self.verdict.lost_durable += int(kept.sum())
        self.verdict.blocks_checked += len(records)
        self.verdict.wrong_bytes += image.wrong + image.bad_rows  # no kill may tear a row
        ledger.keys[:] = held
        ledger.kept[:] = False
        ledger.kept[records.slots] = True
        return image

    def _tell(self, child: BaseProcess, word: Word) -> None:
        self._ledger.words[word] = 1

    def _wait_for(self, child: BaseProcess, word: Word) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while self._ledger.words[word] <= 0:
            if not child.is_alive():
                raise RuntimeError(f"the manager ended by itself, exit code {child.exitcode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the manager does not answer: {word.name}")
            time.sleep(_POLL_S)

    def _sleep(self, seconds_max: float) -> None:
        time.sleep(self._rng.random() * seconds_max)


# The child


def _serve(config: FlexKVConfig, ledger: Ledger, image: Image | None, seed: int, parent: int) -> None:
    """Read back what there was, then work until killed or told to stop."""
    _end_with(parent)
    install(ledger, WRITE_BYTES)
    manager, device = make_manager(config)
    assert ledger.process is not None
    assert ledger.process.slot_count == SSD_SLOTS, ledger.process.slot_count
    words = ledger.words
    if image is not None:
        _read_back(manager, device, image, ledger)
    words[Word.READY] = 1
    load = Load(manager, device, seed)
    while not words[Word.STOP]:
        words[Word.STORAGE_PID] = max(0, ledger.process.pid)
        if words[Word.PAUSE]:
            _book(ledger, load)
            words[Word.LEAKED] += leaked_slots(manager)
            words[Word.PAUSE], words[Word.PAUSED] = 0, 1
            load = Load(manager, device, seed + 1)
        time.sleep(_POLL_S)
    _book(ledger, load)
    manager.shutdown()


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the test dies, however that happens: nobody else would stop its load."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it had died before the kernel was told
        os._exit(1)


def _book(ledger: Ledger, load: Load) -> None:
    tally = load.stop()
    ledger.words[Word.CHECKED] += tally.blocks
    ledger.words[Word.WRONG] += tally.wrong


def _read_back(manager: BlockManager, device: NumpyDevice, image: Image, ledger: Ledger) -> None:
    """Get every block of every chain once."""
    client = Client(manager, device, THREADS * CHAIN_BLOCKS_MAX)
    seen: set[bytes] = set()
    for keys in image.chains():
        own = [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
        start = next(i for i, key in enumerate(own) if key not in seen)
        came = client.get(keys, start)
        ledger.words[Word.LOST] += int((~came).sum())
        seen.update(own)
    ledger.words[Word.CHECKED] += client.tally.blocks
    ledger.words[Word.WRONG] += client.tally.wrong
    ledger.words[Word.LEAKED] += leaked_slots(manager)


def _parent_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often to kill.")] = 20,
    seed: Annotated[int | None, typer.Option(help="Of all that is random but the scheduler.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the last line here too.")] = None,
    directory: Annotated[Path | None, typer.Option(help="On the file system to be tested.")] = None,
) -> None:
    """Kill the manager and the storage process under load, again and again, and compare every byte that is left."""
    logging.getLogger("flexkv_core").setLevel(logging.CRITICAL)  # what kills leave behind is expected
    seed = random.SystemRandom().randrange(1 << 30) if seed is None else seed
    print(f"crashtest: {rounds} rounds, seed {seed}", flush=True)
    place = directory or cache_dir()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="crashtest-", dir=place) as folder:
        test = CrashTest(Path(folder), seed)
        step = max(1, rounds // 10)
        verdict = test.run(
            rounds,
            lambda done: print(f"  {done} rounds: {test.verdict}", flush=True) if done % step == 0 else None,
        )
    print(f"killed: {test.kills}; {test.durable_blocks} blocks were reported as durable")
    line = json.dumps(asdict(verdict))
    if json_file is not None:
        json_file.write_text(line + "\n", encoding="utf-8")
    print(line)
    sys.exit(0 if verdict.is_clean else 1)


if __name__ == "__main__":
    typer.run(main)
