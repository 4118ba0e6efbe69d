"""FlexKV's linker in SGLang's scheduler process, as a test sees and disturbs it: a folder carries orders in and digests of KV bytes out.

The server is given this class by the flags for linkers of one's own. ``mode`` in the folder says what happens to loads from now on: nothing,
``zeros`` (the last page that arrives is zeros), ``fail`` (the copy raises), ``corrupt`` (a byte in host memory is flipped before it is
read). Each store and each load appends a line to ``log``: the request, and a digest of the KV of each of its pages.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from flexkv_core.errors import TransferError
from flexkv_core.transfer.plan import TransferOp
from flexkv_kernels.copier import CpuCopier
from flexkv_sglang.linker import FlexKVLinker

FOLDER_KEY = "test_folder"


def instrumented(folder: Path, **settings: object) -> list[str]:
    """SGLang's arguments for this linker with ``folder``; ``settings`` are FlexKV's."""
    linker = {
        "linker": "InstrumentedLinker",
        "linker_module_path": __name__,
        "linker_extra_config": {**settings, FOLDER_KEY: str(folder)},
    }
    return [
        *("--enable-unified-cache-external-linker", "--unified-cache-external-linker-backend", "dynamic"),
        *("--unified-cache-external-linker-config", json.dumps(linker)),
    ]


class InstrumentedLinker(FlexKVLinker):
    """Takes the folder from its configuration; the rest is FlexKV's."""

    def __init__(self, *arguments: Any, extra_config: dict[str, Any], **options: Any) -> None:
        self._folder = Path(extra_config.pop(FOLDER_KEY))
        super().__init__(*arguments, extra_config=extra_config, **options)

    def attach(self, wrapper: Any) -> Any:
        _disturb_loads(self._folder / "mode")
        side = super().attach(wrapper)
        load, store = side.load, side.store

        def logged_load(request_id: str, slots: np.ndarray) -> bool:
            loaded = load(request_id, slots)
            self._log("load", request_id, slots, loaded)
            return loaded

        def logged_store(request: Any, tokens: int, prompt_tokens: int, hold: Any) -> None:
            def logged_hold() -> Any:
                held = hold()
                self._log("store", request.request_id, held.slots, True)
                return held

            store(request, tokens, prompt_tokens, logged_hold)

        side.load, side.store = logged_load, logged_store
        return side

    def _log(self, kind: str, request_id: str, slots: np.ndarray, ok: bool) -> None:
        page = self._engine.page_size
        pool = self._engine.pool
        tensors = getattr(pool, "kv_buffer", None) or [*pool.k_buffer, *pool.v_buffer]
        digests = [
            hashlib.sha256(b"".join(t[slots[i : i + page]].numpy().tobytes() for t in tensors)).hexdigest()[
                :16
            ]
            for i in range(0, len(slots), page)
        ]
        line = {"kind": kind, "rid": request_id, "ok": ok, "pages": digests}
        with (self._folder / "log").open("a") as log:
            log.write(json.dumps(line) + "\n")


def _disturb_loads(mode_file: Path) -> None:
    original = CpuCopier.scatter

    def scatter(copier: CpuCopier, op: TransferOp, after: object, verify: bool) -> Any:
        mode = mode_file.read_text() if mode_file.exists() else ""
        if mode == "fail":
            raise TransferError("injected: the device refuses the copy")
        if mode == "corrupt":
            layout = copier._host.layout
            ctypes.memset(copier._host.address + int(op.slots[-1]) * layout.slot_bytes + 5, 0xA5, 3)
        ok = original(copier, op, after, verify)
        if mode == "zeros":
            segments = copier.segments
            for base, stride in zip(segments.addresses, segments.strides, strict=True):
                ctypes.memset(int(base) + int(op.blocks[-1]) * int(stride), 0, segments.piece_bytes)
        return ok

    CpuCopier.scatter = scatter  # type: ignore[method-assign]
