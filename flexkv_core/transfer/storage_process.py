"""The manager's side of the storage process, which owns the SSD tier."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection

import numpy as np

from flexkv_core.errors import FlexKVError
from flexkv_core.storage.base import BlockStatus, Records, SsdSpec, Statuses, key_words
from flexkv_core.storage.catalog import record_dtype, records_of
from flexkv_core.storage.directory import slot_count
from flexkv_core.storage.memory import HostSegment
from flexkv_core.transfer.ring import Array, CommandKind
from flexkv_core.transfer.supervisor import (
    ONE,
    RING_RECORDS,
    Pending,
    ProcessLink,
    Progress,
    Supervised,
    make_commands,
)
from flexkv_core.transfer.worker import attach_table
from flexkv_core.types import Slots

logger = logging.getLogger(__name__)

FORGET_RECORDS = RING_RECORDS // 2
"""Sent at a time, so that the other side removes some while the next are waiting."""


class StorageProcess(Supervised):
    """See the base. What a process that died had recorded stays recorded, so the index needs no rebuilding.

    Args:
        spec: the tier.
        on_corrupt: called on the supervisor's thread with the SSD slots that the scrubber put into quarantine.
        host, on_progress, on_tick, cpus: see the base.
    """

    def __init__(
        self,
        spec: SsdSpec,
        host: HostSegment,
        on_progress: Callable[[Progress], None],
        on_corrupt: Callable[[Slots], None] = lambda slots: None,
        on_tick: Callable[[], None] = lambda: None,
        cpus: Collection[int] | None = None,
    ) -> None:
        super().__init__(
            "storage process",
            "flexkv_core.transfer.worker",
            spec.as_dict(),
            host,
            on_progress,
            on_tick,
            cpus=cpus,
        )
        self.slot_count = slot_count(spec)
        self._spec = spec
        self._on_corrupt = on_corrupt
        self._clear_owed = False
        self._table: Array = np.empty(0, record_dtype(spec.layout.shard_count))

    def start(self) -> Records:
        """Start the process and wait until it serves; what the tier holds from before. Call once.

        Raises:
            ConfigError: a directory cannot be used, or is in use.
            CapacityError: the disk is too small.
            StorageError: the process cannot be started, or said something else.
        """
        size = self.slot_count * self._table.dtype.itemsize
        self._table_fd = os.memfd_create("flexkv-catalog", os.MFD_CLOEXEC)
        os.ftruncate(self._table_fd, size)
        self._table = attach_table(self._table_fd, self.slot_count, self._spec.layout.shard_count)
        link = self._new_link()
        try:
            link.wait_ready(self._wake_fd)
        except FlexKVError:
            link.end()
            raise
        records = records_of(self._table)
        self._link = link
        self._thread.start()
        logger.info("SSD tier: %d blocks, %d of them warm", self.slot_count, len(records))
        return records

    def read(self, op: int, keys: bytes, ssd_slots: Slots, host_slots: Slots) -> bool:
        """Read blocks into host slots; False when nothing was accepted. Each host slot's ``arrivals`` is marked with ``op``, OK or not,
        before its progress is reported.

        ``op``: > 0, of no other batch that is under way. ``keys``: ``16 * n`` bytes. The caller keeps the SSD slots unchanged and the
        host slots for itself until they are reported.
        """
        commands = make_commands(CommandKind.READ, op, ssd_slots, host_slots)
        commands["key"] = key_words(keys)
        return self._send(commands, CommandKind.READ, op)

    def write(self, op: int, keys: bytes, parents: bytes, ssd_slots: Slots, host_slots: Slots) -> bool:
        """Write blocks; False when nothing was accepted. ``parents``: the key before each block in its chain, ``16 * n`` bytes."""
        commands = make_commands(CommandKind.WRITE, op, ssd_slots, host_slots)
        commands["key"], commands["parent"] = key_words(keys), key_words(parents)
        return self._send(commands, CommandKind.WRITE, op)

    def forget(self, ssd_slots: Slots, timeout_s: float = 0.0) -> bool:
        """Remove records, in order with the writes. Not answered; one that is lost costs nothing but a record that is still right.

        Any number: what the ring has no room for is sent as it empties, for up to ``timeout_s``. False: not all were sent.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            for start in range(0, len(ssd_slots), FORGET_RECORDS):
                part = ssd_slots[start : start + FORGET_RECORDS]
                commands = make_commands(CommandKind.FORGET, 0, part, part)
                if self._link is None or not self._link.commands.push(commands, deadline - time.monotonic()):
                    return False
        return True

    def flush(self, op: int) -> bool:
        """Report ``op`` when all writes before it have been reported."""
        return self._send(make_commands(CommandKind.FLUSH, op, ONE, ONE), CommandKind.FLUSH, op)

    def clear(self, op: int) -> bool:
        """Remove all records. Reads that overtake it still find what they ask for. Kept in mind while the process is down: it happens
        before any write then, and ``op`` is dropped."""
        with self._lock:
            self._clear_owed = True
        return self._send(make_commands(CommandKind.CLEAR, op, ONE, ONE), CommandKind.CLEAR, op)

    # Hooks of the base

    def _prepare(self, link: ProcessLink) -> None:
        if self._clear_owed:
            # Asked again under a number of its own; the one that asked first has been told that it was dropped.
            op = max(self._pending, default=0) + (1 << 62)
            self._pending[op] = Pending(CommandKind.CLEAR, np.ones(1, np.bool_), 1, ONE, is_own=True)
            self._records_under_way += 1
            link.commands.push(make_commands(CommandKind.CLEAR, op, ONE, ONE))

    def _note(self, kind: CommandKind, statuses: Statuses) -> None:
        if kind is CommandKind.CLEAR and statuses[0] == BlockStatus.OK:
            self._clear_owed = False

    def _take_unasked(self, records: Array) -> None:
        self._on_corrupt(records["index"].astype(np.int32))
