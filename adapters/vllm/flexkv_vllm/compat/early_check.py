"""A patch of vLLM: bad FlexKV settings end the start when vLLM's configuration is complete, not after the weights are loaded.

Why: vLLM makes its connectors when the KV cache is allocated, so a misspelt key was refused about 40 s into the start, on every worker
at once. The hooks that it calls earlier see no settings (``supports_hma``) or are called for CUDA graphs only
(``requires_piecewise_for_cudagraph``); ``get_required_kvcache_layout`` comes after the weights. There is no upstream issue that we know of.
When it can go: as soon as a version calls the connector's class with the settings while ``VllmConfig`` is made.
Without it (plugins off, or a version where it does not fit) everything is refused as before, later.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from typing import Any


def install(prepare: Callable[[dict[str, Any]], None], check: Callable[[Any, bool], None]) -> None:
    """Have ``check(vllm_config, memory)`` called on each ``VllmConfig`` that this process makes; its errors pass through.

    ``prepare(fields)`` comes before, with the fields that the configuration is made of, and may change those that nobody has set.
    ``memory`` is true for the first one of the process that starts the engine: later ones, and those of its children, may stand
    beside a host tier that is taken already. A second call does nothing.
    """
    from vllm.config import VllmConfig

    original = VllmConfig.__init__
    if hasattr(original, "flexkv_check"):
        return
    is_first = multiprocessing.parent_process() is None

    @functools.wraps(original)
    def checked(self: Any, *arguments: Any, **fields: Any) -> None:
        nonlocal is_first
        if fields.get("kv_transfer_config") is not None:
            prepare(fields)
        original(self, *arguments, **fields)
        if getattr(self, "kv_transfer_config", None) is not None:
            memory, is_first = is_first, False
            check(self, memory)

    checked.flexkv_check = True  # type: ignore[attr-defined]
    VllmConfig.__init__ = checked
