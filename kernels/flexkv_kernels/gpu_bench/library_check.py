"""The whole library on the device: a manager stores blocks, loses them from host memory, and brings them back from there and from the SSD.

Needs what :mod:`flexkv_core.config` needs, which may be missing beside an engine; import it only where pydantic is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from flexkv_core.config import load_config
from flexkv_core.layout import KVLayout
from flexkv_core.manager import KVManager, ModelConfig
from flexkv_core.tasks import KVResponseStatus
from flexkv_core.types import Direction
from flexkv_kernels.calibration import ModeTable
from flexkv_kernels.choice import copier_for
from flexkv_kernels.paths import Mode

LAYERS = 8
TOKENS = 16
RUN_BLOCKS = 64  # of a sequence; 16 MiB
HOST_BYTES = "40MiB"  # two sequences and a half
WAIT_S = 20.0


def check_library(device: str, directory: Path) -> list[str]:
    """What was wrong with blocks that went from ``device`` to host memory and to an SSD tier in ``directory``, and back; nothing is the
    wanted answer. On a GPU in each mode, and in the mode that the calibration chose."""
    library = _Library(device, directory)
    try:
        found = library.round_trip("as chosen")
        if device == "cuda":
            for mode in Mode:
                library.copier._modes = ModeTable({direction: [(0, mode)] for direction in Direction})  # type: ignore[attr-defined]
                found += library.round_trip(mode.value)
        return found
    finally:
        library.manager.shutdown()


class _Library:
    def __init__(self, device: str, directory: Path) -> None:
        shape = (2, 4 * RUN_BLOCKS, TOKENS, 8, 64)
        self.layers = [
            torch.zeros(shape, dtype=torch.bfloat16, device=device).view(torch.int16) for _ in range(LAYERS)
        ]
        self.copier = copier_for(self.layers, block_dim=1)
        layout = KVLayout(TOKENS, TOKENS, self.copier.segments.block_bytes)
        config = load_config({"host_bytes": HOST_BYTES, "ssd_dirs": [str(directory)], "ssd_bytes": "512MiB"})
        self.manager = KVManager(ModelConfig({"model": "library check"}, layout), config, self.copier)
        self.manager.start()
        self._next_token = 0

    def round_trip(self, name: str) -> list[str]:
        """Four sequences in, the first of them back from host memory and, when the others have pushed it out, from the SSD."""
        tokens, wanted = self._put(0)
        found = self._get(tokens, wanted, 1, from_ssd=False)
        for place in (1, 2, 3):
            self._put(place)
        found += self._get(tokens, wanted, 2, from_ssd=True)
        return [f"library, {name}: {text}" for text in found]

    def _put(self, place: int) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Store fresh bytes from the ``place``-th quarter of the device's blocks, take the blocks for zeros, and wait for the SSD."""
        tokens = np.arange(self._next_token, self._next_token + RUN_BLOCKS * TOKENS)
        self._next_token += len(tokens)
        wanted = []
        for layer in self.layers:
            quarter = layer[:, place * RUN_BLOCKS : (place + 1) * RUN_BLOCKS]
            quarter.random_(-(1 << 15), 1 << 15)
            wanted.append(quarter.clone())
        written = self.manager.counters().ssd_written_blocks
        task = self.manager.put_async(tokens, _places(place))
        status = self.manager.wait(task, WAIT_S)[task].status
        for layer in self.layers:
            layer[:, place * RUN_BLOCKS : (place + 1) * RUN_BLOCKS] = 0
        assert status is KVResponseStatus.SUCCESS, status
        _wait_until(lambda: self.manager.counters().ssd_written_blocks == written + RUN_BLOCKS)
        return tokens, wanted

    def _get(
        self, tokens: np.ndarray, wanted: list[torch.Tensor], place: int, *, from_ssd: bool
    ) -> list[str]:
        before = self.manager.counters().ssd_read_blocks
        task, mask = self.manager.get_match(tokens)
        self.manager.launch([task], [_places(place)[mask]])
        response = self.manager.wait(task, WAIT_S)[task]
        read = self.manager.counters().ssd_read_blocks - before
        found = []
        if response.status is not KVResponseStatus.SUCCESS or not mask.all():
            found.append(f"get of {len(tokens)} tokens: {int(mask.sum())} found, {response.status.value}")
        if bool(read) != from_ssd:
            found.append(f"{read} blocks came from the SSD")
        for index, (layer, bytes_) in enumerate(zip(self.layers, wanted, strict=True)):
            if not torch.equal(layer[:, place * RUN_BLOCKS : (place + 1) * RUN_BLOCKS], bytes_):
                found.append(f"layer {index} differs, {'SSD' if from_ssd else 'host'}")
        return found


def _places(quarter: int) -> np.ndarray:
    return np.arange(quarter * RUN_BLOCKS * TOKENS, (quarter + 1) * RUN_BLOCKS * TOKENS)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the SSD tier did not write in time"
        time.sleep(0.01)
