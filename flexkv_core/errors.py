"""The error tree.

FlexKVError
├── ConfigError        (ValueError)    a setting that is wrong or cannot be met; raised before anything is allocated
├── LayoutError        (ValueError)    tensors of the engine that are not laid out as described
├── CapacityError      (MemoryError)   the machine cannot give the memory or disk space that a tier needs
├── StorageError       (RuntimeError)  the catalogue or the files of a tier cannot be read or written
├── TransferError      (RuntimeError)  a copy between a device and a slot, or between tiers, failed
├── PatchError         (RuntimeError)  a patch that cannot be applied to an engine, or taken back
└── ClosedError        (RuntimeError)  the object was shut down before the call

What a user gets wrong raises at start. While serving, every failure is logged once, counted and turned into a miss; programmer
errors are assertions.
"""

from __future__ import annotations


class FlexKVError(Exception):
    """Base of every error that FlexKV raises on purpose."""


class ConfigError(FlexKVError, ValueError):
    """A configuration key, its value, and what is allowed."""


class LayoutError(FlexKVError, ValueError):
    """The engine's KV tensors are not what the layout says; the message prints what was found and what was expected."""


class CapacityError(FlexKVError, MemoryError):
    """A tier asks for more than the machine can give."""


class StorageError(FlexKVError, RuntimeError):
    """A catalogue or data file that cannot be opened, read or written; names the file and the cause."""


class TransferError(FlexKVError, RuntimeError):
    """A transfer failed as a whole; its blocks are misses."""


class PatchError(FlexKVError, RuntimeError):
    """A patch or its target is not what it must be; nothing was changed. Names the file and what to do."""


class ClosedError(FlexKVError, RuntimeError):
    """The manager or engine was shut down."""
