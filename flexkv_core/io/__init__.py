"""Reads and writes of whole batches between memory and files.

- ``base.py``     the contract: :class:`IoEngine`, operations, completions
- ``uring.py``    io_uring, by the C extension
- ``threads.py``  ``preadv``/``pwritev`` on threads
- ``probe.py``    which of the two this host can run
- ``faults.py``   for tests: an engine that fails, and files after a power loss
"""

from flexkv_core.io.base import IO_OP, PAGE_BYTES, Completions, IoEngine, IoKind, IoOps, Region, make_ops
from flexkv_core.io.probe import open_engine

__all__ = [
    "IO_OP",
    "PAGE_BYTES",
    "Completions",
    "IoEngine",
    "IoKind",
    "IoOps",
    "Region",
    "make_ops",
    "open_engine",
]
