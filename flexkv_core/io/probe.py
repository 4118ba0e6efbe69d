"""Which I/O engine this host can run."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence

from flexkv_core.errors import ConfigError
from flexkv_core.io.base import IoEngine, Region
from flexkv_core.io.threads import ThreadEngine
from flexkv_core.io.uring import UringEngine

logger = logging.getLogger(__name__)

ENGINES = ("auto", "uring", "threads")
DEPTH_MAX = 4096

_REASONS = {
    errno.EPERM: "io_uring is blocked here (a container's seccomp profile, or kernel.io_uring_disabled)",
    errno.EACCES: "io_uring is blocked here (a security module)",
    errno.ENOSYS: "this kernel or this build of FlexKV has no io_uring",
    errno.EOPNOTSUPP: "this kernel's io_uring is older than Linux 5.11",
    errno.ENOMEM: "io_uring may not lock the memory of its rings (raise RLIMIT_MEMLOCK)",
}


def open_engine(name: str, files: Sequence[int], depth: int = 64, regions: Sequence[Region] = ()) -> IoEngine:
    """An engine over open descriptors, which the caller keeps open until it has closed the engine.

    The choice is logged, with the reason where it is not the first.

    Args:
        name: one of :data:`ENGINES`; "auto" takes io_uring where this host runs it.
        files: indexed by ``file`` of the operations.
        depth: operations under way at most, 1 .. :data:`DEPTH_MAX`.
        regions: where the operations' memory lies, page-aligned.

    Raises:
        ConfigError: the name or depth is not allowed, or "uring" was asked for and this host refuses it; says why.
    """
    if name not in ENGINES:
        raise ConfigError(f"io_engine: {name!r} is unknown; allowed: {', '.join(ENGINES)}")
    if not 1 <= depth <= DEPTH_MAX:
        raise ConfigError(f"io_queue_depth: {depth} is out of range; allowed: 1 .. {DEPTH_MAX}")
    reason = "as configured"
    if name != "threads":
        try:
            engine = UringEngine(files, depth, regions)
        except OSError as error:
            reason = _REASONS.get(error.errno or 0, f"io_uring: {error.strerror}")
            if name == "uring":
                raise ConfigError(f"io_engine: uring cannot be had: {reason}; use threads or auto") from error
        else:
            registered = "registered" if engine.is_registered else "unregistered"
            logger.info("I/O engine: io_uring, depth %d, %s buffers", depth, registered)
            return engine
    logger.info("I/O engine: threads; %s", reason)
    return ThreadEngine(files, depth)
