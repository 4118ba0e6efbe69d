"""Alarm: a moment at which a file descriptor becomes readable, so that a thread that waits for others anyway needs no waking to be told of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time

_libc = ctypes.CDLL(None, use_errno=True)  # timerfd, which Python has from 3.13 on; see timerfd_create(2)
_ABSOLUTE = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


_libc.timerfd_settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Setting), ctypes.c_void_p)


class Alarm:
    """See the module's text. Not set at first."""

    def __init__(self) -> None:
        self._fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC | os.O_NONBLOCK)
        _check(self._fd)

    def fileno(self) -> int:
        """Readable when the moment has come."""
        return self._fd

    def set(self, at: float) -> None:
        """Ring at that ``time.monotonic()``, at once if it has passed, instead of when it was to ring until now."""
        nanoseconds = max(1, int(at * 1e9))  # 0 means never
        value = _Timespec(*divmod(nanoseconds, 1_000_000_000))
        _check(_libc.timerfd_settime(self._fd, _ABSOLUTE, _Setting(_Timespec(0, 0), value), None))

    def silence(self) -> None:
        """It has been heard."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)

    def close(self) -> None:
        """Free it."""
        os.close(self._fd)


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
