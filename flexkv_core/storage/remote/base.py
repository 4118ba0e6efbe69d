"""What a store owes that many machines share: values by name, in batches, each call with a deadline.

A store knows names and bytes and nothing of models, tiers or policies: what a value must hold is
:mod:`flexkv_core.storage.remote.values`' business, and who asks when is :mod:`flexkv_core.transfer.remote_worker`'s.

A new store is a class here or in another distribution, and one line in the registry or one entry point in the group
``flexkv.remote_stores``; ``tests/contract/storage/test_remote_store.py`` runs on each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from flexkv_core.layout import KVLayout
from flexkv_core.storage.base import BlockStatus, Statuses

Bytes = npt.NDArray[np.uint8]
"""A view of memory, shape [bytes]."""


class Checks(Protocol):
    """Takes the checksums of a payload that is read, while a cache still has its bytes."""

    def arrived(self, count: int) -> None:
        """The next ``count`` bytes of the payload, from the first on, are where they belong and stay as they are."""

    def land(self, payload: Bytes) -> None:
        """Copy a whole payload to where it belongs, with its checksums on the way; for stores whose library hands out memory of its own."""


class Value(NamedTuple):
    """Where a value lies in memory: its header and, elsewhere, its payload. A store reads into both or writes from both.

    ``checks``: of a value that is read, for stores that know how much of it has arrived. On any thread, one at a time; who does not call it
    has the checksums taken when the whole batch has been read.
    """

    header: Bytes
    payload: Bytes
    checks: Checks | None = None

    @property
    def size(self) -> int:
        """Bytes of the whole value."""
        return len(self.header) + len(self.payload)

    def arrived(self, count: int) -> None:
        """See :class:`Checks`; does nothing where there are none."""
        if self.checks is not None:
            self.checks.arrived(count)


@dataclass(frozen=True)
class RemoteSpec:
    """A remote tier: which store, and what is kept in it. Holds no secret: these come from files and the environment.

    Attributes:
        url: of the store; the scheme chooses it.
        prefix: before every name; deployments that may not share have different ones.
        layout: of a slot.
        options: of the store's client.
        timeout_s: bound of one call.
        username, password_file: for stores that ask for them; the file is read at each connection.
        write_bytes_per_s, read_bytes_per_s: bounds, 0 for none.
    """

    url: str
    prefix: str
    layout: KVLayout
    options: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 5.0
    username: str | None = None
    password_file: str | None = None
    write_bytes_per_s: int = 0
    read_bytes_per_s: int = 0

    @property
    def scheme(self) -> str:
        """What chooses the store."""
        return self.url.partition(":")[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RemoteSpec:
        """The reverse of :meth:`as_dict`."""
        return cls(**{**values, "layout": KVLayout(**values["layout"])})


class RemoteStore(ABC):
    """One store. Methods may be called on several threads at a time. None raises for what the outside does: a store that cannot be
    reached, refuses, or is late answers IO_ERROR.

    ``deadline`` is of ``time.monotonic()``. A call ends by then, or as soon after it as the client's library lets it: at most
    ``spec.timeout_s`` later.

    Args of the constructor:
        spec: of the tier.
        regions: all memory that values will lie in, for clients that must register it. It stays where it is until :meth:`close`.

    Raises (the constructor):
        ConfigError: the URL or an option cannot be used. A store that cannot be reached is no error: it is tried at each call.
    """

    probes_max: ClassVar[int]
    """Names whose existence is asked for in one round trip."""

    @abstractmethod
    def __init__(self, spec: RemoteSpec, regions: Sequence[Bytes]) -> None: ...

    @abstractmethod
    def exists(self, names: Sequence[str], deadline: float) -> Statuses:
        """OK, DROPPED (there is no such value) or IO_ERROR of each; at most :attr:`probes_max` names."""

    @abstractmethod
    def read(self, names: Sequence[str], values: Sequence[Value], deadline: float) -> Statuses:
        """Read whole values. OK: all bytes are there. DROPPED: there is none. CORRUPT: it has another length. What the memory holds
        after anything but OK is undefined."""

    @abstractmethod
    def write(self, names: Sequence[str], values: Sequence[Value], deadline: float) -> Statuses:
        """Write whole values, replacing what is there; never a part of one that a read would take for whole."""

    @abstractmethod
    def delete(self, names: Sequence[str], deadline: float) -> None:
        """Remove values; those that are not there, or cannot be removed, are passed over."""

    @abstractmethod
    def close(self) -> None:
        """End the client. No call is under way."""


def statuses_of(count: int, status: BlockStatus) -> Statuses:
    """uint32 [count], all the same."""
    return np.full(count, status, np.uint32)


StoreFactory = Callable[[RemoteSpec, Sequence[Bytes]], RemoteStore]
"""A store's class, or what makes one."""
