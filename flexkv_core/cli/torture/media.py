"""``scripts/mediatest``: flips bits of an SSD tier's files under load, and looks at every byte that comes back.

First in the data files, while a manager works on them. Reads find some of the damage; then the manager is started again, everything is
read, and the scrubber runs. No wrong byte may come out, and every flip in a slot that held a block must be noticed, unless the slot
was written anew first. Then in the catalogue, under load and at rest: whatever SQLite makes of it, no wrong byte may come out.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from flexkv_core.block_manager import BlockManager
from flexkv_core.cli.torture.device import NumpyDevice
from flexkv_core.cli.torture.flips import Account, FlipLedger, flip_anywhere
from flexkv_core.cli.torture.load import (
    CHAIN_BLOCKS_MAX,
    THREADS,
    Client,
    Load,
    Tally,
    chain_keys,
    make_manager,
    settings,
)
from flexkv_core.cli.torture.observer import install
from flexkv_core.config import cache_dir
from flexkv_core.storage.directory import CATALOG_NAME, DATA_NAME

COUNTS = (1, 10, 1000)
SSD_SLOTS = 768
HOST_SLOTS = 256
DIRECTORIES = 2
WRITE_BYTES = 512 << 10
CHAINS = 30
"""Their blocks find room, so that most damage is met before its slot is written anew; what is lost is put again, and that is
all that is written."""
FILL = 0.75  # of the slots, before damage is done
FILL_S = 30.0
LOAD_S = 0.5  # under load, after the damage
FLIPPING_S = 1.0  # over which the flips are spread
SCRUB_BYTES_PER_S = 256 << 20
SCRUB_S = 30.0  # one round takes a fraction of a second


@dataclass
class Verdict:
    """The last line of the output."""

    flips: int = 0
    flips_in_occupied_slots: int = 0
    detected: int = 0
    wrong_bytes: int = 0
    flips_overwritten: int = 0
    flips_in_catalog: int = 0
    false_alarms: int = 0
    blocks_checked: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether nothing wrong came out, all damage was noticed, and only damage."""
        return not (self.wrong_bytes or self.false_alarms) and self.detected == self.flips_in_occupied_slots


@dataclass
class MediaTest:
    """One tier, damaged again and again; ``folder`` is empty at first."""

    folder: Path
    seed: int
    verdict: Verdict = field(default_factory=Verdict)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._ledger = FlipLedger(self._rng)
        self._account = Account()
        self._directories = [str(self.folder / f"ssd{i}") for i in range(DIRECTORIES)]
        install(self._ledger, WRITE_BYTES)

    def damage_data(self, count: int) -> None:
        """``count`` flips under load."""
        with self._manager(scrub=False) as (manager, device):
            load = self._fill(manager, device)
            for _ in range(count):
                self._ledger.flip_data(self._files(DATA_NAME))
                time.sleep(FLIPPING_S / count)
            time.sleep(LOAD_S)
            self._add(load.stop())
            self._ledger.settle(self._account, at_end=False)
        with self._manager(scrub=True) as (manager, device):
            self._read_all(manager, device)
            deadline = time.monotonic() + SCRUB_S
            while self._ledger.missing() and time.monotonic() < deadline:
                time.sleep(0.01)
            self._ledger.settle(self._account, at_end=True)
        verdict, account = self.verdict, self._account
        verdict.flips += count
        verdict.flips_in_occupied_slots, verdict.detected = account.occupied, account.detected
        verdict.flips_overwritten, verdict.false_alarms = account.overwritten, account.false_alarms

    def damage_catalog(self, count: int) -> None:
        """``count`` flips under load and as many at rest. Rows that turn back into older ones are alarms that are not false."""
        with self._manager(scrub=False) as (manager, device):
            load = self._fill(manager, device)
            self._flip_catalog(count)
            time.sleep(LOAD_S)
            self._add(load.stop())
        self._flip_catalog(count)
        with self._manager(scrub=True) as (manager, device):
            self._read_all(manager, device)
            load = Load(manager, device, self._rng.randrange(1 << 30), CHAINS)
            time.sleep(LOAD_S)
            self._add(load.stop())
        self._ledger.settle(Account(), at_end=True)
        self.verdict.flips += 2 * count
        self.verdict.flips_in_catalog += 2 * count

    @contextmanager
    def _manager(self, scrub: bool) -> Iterator[tuple[BlockManager, NumpyDevice]]:
        rate = SCRUB_BYTES_PER_S if scrub else 0
        config = settings(self._directories, SSD_SLOTS, HOST_SLOTS, scrub_bytes_per_s=rate)
        manager, device = make_manager(config)
        try:
            yield manager, device
            manager.check_integrity()
        finally:
            manager.shutdown()

    def _fill(self, manager: BlockManager, device: NumpyDevice) -> Load:
        """A load, once the tier is as good as full."""
        load = Load(manager, device, self._rng.randrange(1 << 30), CHAINS)
        deadline = time.monotonic() + FILL_S
        assert self._ledger.process is not None
        table = self._ledger.process.table
        while (table["generation"] > 0).mean() < FILL and time.monotonic() < deadline:
            time.sleep(0.01)
        return load

    def _read_all(self, manager: BlockManager, device: NumpyDevice) -> None:
        client = Client(manager, device, THREADS * CHAIN_BLOCKS_MAX)
        for chain in range(CHAINS):
            client.get(chain_keys(manager.root, chain))
        self._add(client.tally)

    def _add(self, tally: Tally) -> None:
        self.verdict.blocks_checked += tally.blocks
        self.verdict.wrong_bytes += tally.wrong

    def _flip_catalog(self, count: int) -> None:
        files = [Path(path) for path in self._files(CATALOG_NAME + "*") if not path.name.endswith("-shm")]
        for _ in range(count):
            flip_anywhere(self._rng.choice(files), self._rng)

    def _files(self, pattern: str) -> list[Path]:
        return [
            path for directory in self._directories for path in sorted(Path(directory).glob(f"*/{pattern}"))
        ]


def run(
    folder: Path, seed: int, counts: Sequence[int], say: Callable[[str], None] = lambda text: None
) -> Verdict:
    """Both kinds of damage, ``counts`` flips at a time."""
    test = MediaTest(folder, seed)
    for count in counts:
        test.damage_data(count)
        say(f"{count} in the data files: {test.verdict}")
    for count in counts:
        test.damage_catalog(count)
        say(f"2 * {count} in the catalogue: {test.verdict}")
    return test.verdict


def main(
    counts: Annotated[
        list[int] | None, typer.Option(min=1, help="Flips at a time; may be given several times.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random but the scheduler.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the last line here too.")] = None,
    directory: Annotated[Path | None, typer.Option(help="On the file system to be tested.")] = None,
) -> None:
    """Flip bits in the files of an SSD tier under load and compare every byte that comes back."""
    logging.getLogger("flexkv_core").setLevel(logging.CRITICAL)  # alarms are expected
    seed = random.SystemRandom().randrange(1 << 30) if seed is None else seed
    counts = counts or list(COUNTS)
    print(f"mediatest: {', '.join(map(str, counts))} flips, seed {seed}", flush=True)
    place = directory or cache_dir()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mediatest-", dir=place) as folder:
        verdict = run(Path(folder), seed, counts, lambda text: print(f"  {text}", flush=True))
    line = json.dumps(vars(verdict))
    if json_file is not None:
        json_file.write_text(line + "\n", encoding="utf-8")
    print(line)
    sys.exit(0 if verdict.is_clean else 1)


if __name__ == "__main__":
    typer.run(main)
