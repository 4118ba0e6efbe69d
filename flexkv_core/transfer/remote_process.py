"""The manager's side of the remote process, which talks to the store that many machines share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Mapping

import numpy as np

from flexkv_core.storage.base import key_words
from flexkv_core.storage.memory import HostSegment
from flexkv_core.storage.remote.base import RemoteSpec
from flexkv_core.transfer.ring import Array, CommandKind
from flexkv_core.transfer.supervisor import Progress, Supervised, make_commands
from flexkv_core.types import KEY_BYTES, Slots


class RemoteProcess(Supervised):
    """See the base. It starts beside everything else: nothing waits for it, and a store that cannot be reached is no error.

    ``environment``, ``cpus``: of the process. ``epoch``: enters the name of every value; see :func:`~flexkv_core.storage.remote.values.names_of`.
    """

    def __init__(
        self,
        spec: RemoteSpec,
        environment: Mapping[str, str],
        host: HostSegment,
        on_progress: Callable[[Progress], None],
        on_tick: Callable[[], None] = lambda: None,
        cpus: Collection[int] | None = None,
    ) -> None:
        super().__init__(
            "remote process",
            "flexkv_core.transfer.remote_worker",
            spec.as_dict(),
            host,
            on_progress,
            on_tick,
            environment,
            cpus,
        )

    def start(self) -> None:
        """Begin to start the process; :attr:`is_up` tells when it takes commands. Call once."""
        self._thread.start()

    def lookup(self, op: int, keys: bytes, epoch: int) -> bool:
        """Ask which blocks of a sequence (``16 * n`` bytes) the store has: OK for the longest prefix that was found, DROPPED behind it,
        IO_ERROR for all when the store did not answer. False when nothing was accepted."""
        slots = _no_slots(keys)
        return self._send(_commands(CommandKind.EXISTS, op, keys, slots, epoch), CommandKind.EXISTS, op)

    def read(self, op: int, keys: bytes, host_slots: Slots, epoch: int) -> bool:
        """Read blocks into host slots, and set these slots' checksums; False when nothing was accepted. OK: the bytes are what the key
        says. CORRUPT: the value was not. DROPPED: there is none. The caller keeps the host slots for itself until they are reported."""
        return self._send(_commands(CommandKind.READ, op, keys, host_slots, epoch), CommandKind.READ, op)

    def write(self, op: int, keys: bytes, host_slots: Slots, epoch: int) -> bool:
        """Write blocks, consecutive ones of a sequence, but those that the store has already; False when nothing was accepted. The
        caller keeps the host slots unchanged until they are reported."""
        return self._send(_commands(CommandKind.WRITE, op, keys, host_slots, epoch), CommandKind.WRITE, op)

    def forget(self, keys: bytes, epoch: int) -> None:
        """Remove values, if they can be. Not answered."""
        commands = _commands(CommandKind.FORGET, 0, keys, _no_slots(keys), epoch)
        with self._lock:
            if self._link is not None:
                self._link.commands.push(commands)

    def kill(self) -> None:
        """End the process; another takes its place. For tests."""
        if self.pid > 0:
            os.kill(self.pid, signal.SIGKILL)

    # Hooks of the base

    def _gives_up(self, starts: int) -> bool:
        return False  # a store's library that crashes today may not tomorrow; the pauses bound what it costs


def _commands(kind: CommandKind, op: int, keys: bytes, host_slots: Slots, epoch: int) -> Array:
    commands = make_commands(kind, op, host_slots, host_slots)
    commands["key"], commands["epoch"] = key_words(keys), epoch
    return commands


def _no_slots(keys: bytes) -> Slots:
    return np.zeros(len(keys) // KEY_BYTES, np.int32)
