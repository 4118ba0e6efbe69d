"""What survives a kill: memory that the killed process shares with its parent."""

from __future__ import annotations

import mmap
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from flexkv_core.cli.torture.observer import Observer
from flexkv_core.types import Slots


class Word(IntEnum):
    """Numbers that the parent and the child tell each other."""

    READY = 0  # the child has read everything back and is under load
    STORAGE_PID = 1  # 0 while there is none
    PAUSE = 2  # the parent asks for a check
    PAUSED = 3  # done
    STOP = 4  # the parent asks for an orderly end
    CHECKED = 5  # blocks that were compared
    WRONG = 6  # bytes
    LOST = 7  # durable blocks that were not served
    LEAKED = 8  # slots
    WRITTEN = 9  # blocks that were reported as durable, ever


class Ledger(Observer):
    """Made by the parent before it forks; the child, whose manager it observes, writes.

    A slot is *kept* from the moment at which its block was reported as durable until its place is given to another. The order of the
    stores makes it right at any moment at which the child may die: a key is there before the slot is kept, and not touched while it is.
    """

    def __init__(self, slot_count: int) -> None:
        self.words: npt.NDArray[np.int64] = _shared(len(Word) * 8).view(np.int64)
        self.kept: npt.NDArray[np.bool_] = _shared(slot_count).view(np.bool_)
        self.keys: npt.NDArray[np.uint64] = _shared(slot_count * 16).view(np.uint64).reshape(-1, 2)

    def will_write(self, slots: Slots) -> None:
        """They are not kept any more."""
        self.kept[slots] = False

    def did_write(self, slots: Slots, keys: npt.NDArray[np.uint64]) -> None:
        """They are kept."""
        self.keys[slots] = keys
        self.kept[slots] = True
        self.words[Word.WRITTEN] += len(slots)


def _shared(size: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)
