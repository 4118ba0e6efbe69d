"""Where a server listens, and who may talk to whom: processes of one user, or root's, on one machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import struct
from pathlib import Path

from flexkv_core.errors import ConfigError

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_PATH_BYTES_MAX = 107  # sun_path, without the final zero


def peer_uid(connected: socket.socket) -> int:
    """The user of the process at the other end when it connected, or listened, as the kernel knows it."""
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


def is_trusted(uid: int) -> bool:
    """Whether a process of this user may send what ends in the cache, or see it."""
    return uid in (0, os.geteuid())


class Address:
    """A unix socket at ``path``, mode 0600; its folder is made with mode 0700 where it is missing.

    A lock file beside it, held while the server lives, keeps two servers apart and tells a socket that was left behind from one in use.

    Raises:
        ConfigError: the path cannot be used, or a server listens there already.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._check()
        self._lock_fd = self._lock()
        try:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()  # left behind by a server that was killed
            self.listener = self._listen()
        except BaseException:
            os.close(self._lock_fd)
            raise

    def stop_listening(self) -> None:
        """Remove the socket; no other server may begin here yet. A second call does nothing."""
        if self.listener.fileno() >= 0:
            self.listener.close()
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()

    def close(self) -> None:
        """Leave the place to another server."""
        self.stop_listening()
        os.close(self._lock_fd)

    def _check(self) -> None:
        if not self.path.is_absolute():
            raise ConfigError(f"socket {self.path}: the path must be absolute")
        if len(os.fsencode(self.path)) > _PATH_BYTES_MAX:
            raise ConfigError(
                f"socket {self.path}: the path has {len(os.fsencode(self.path))} bytes; the system allows {_PATH_BYTES_MAX}"
            )
        try:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            folder = self.path.parent.stat()
        except OSError as error:
            raise ConfigError(f"socket {self.path}: its folder cannot be used: {error.strerror}") from error
        others_write = folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not folder.st_mode & stat.S_ISVTX
        if not is_trusted(folder.st_uid) or others_write:
            raise ConfigError(
                f"socket {self.path}: its folder belongs to user {folder.st_uid} with mode {stat.S_IMODE(folder.st_mode):o}; others could"
                " put a socket of their own in its place. Use a folder of your own with mode 700"
            )
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise ConfigError(f"socket {self.path}: there is something else with this name")

    def _lock(self) -> int:
        name = self.path.with_name(self.path.name + ".lock")
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"socket {self.path}: {name} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ConfigError(f"socket {self.path}: a server listens there already") from None
        return fd

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(self.path))
        except OSError as error:
            listener.close()
            raise ConfigError(f"socket {self.path}: {error.strerror}") from error
        finally:
            os.umask(before)
        listener.listen(64)
        listener.setblocking(False)
        return listener


def connect(path: Path, timeout_s: float) -> socket.socket:
    """A connection to the server at ``path``; its calls raise OSError after ``timeout_s``.

    Raises:
        OSError: nobody listens there.
        PermissionError: whoever does is neither of this user nor root.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(timeout_s)
        connected.connect(os.fspath(path))
        if not is_trusted(peer_uid(connected)):
            raise PermissionError(f"the process at {path} belongs to user {peer_uid(connected)}")
    except BaseException:
        connected.close()
        raise
    return connected
