"""The server that the demo asks, for each engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path

from flexkv_core.cli.demo.acts import ssd_settings, with_ssd_tier
from flexkv_core.cli.harness import server as vllm
from flexkv_core.cli.harness import sglang
from flexkv_core.config import as_environment

_GPU_ARGUMENTS = ("--dtype", "float32", "--enable-prompt-tokens-details")
_GPU_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
_SGLANG_POOL = ("--page-size", "16", "--max-total-tokens", "16384")


class Engine(str, Enum):
    """Engines that the demo can serve with."""

    VLLM = "vllm"
    SGLANG = "sglang"


def make_server(
    engine: Engine, model: str, folder: Path, more: Sequence[str], kv_space_gib: int, gpu: bool
) -> vllm.EngineServer:
    """The engine with FlexKV and an SSD tier, its files and its log in ``folder``; ``more`` goes onto its command line."""
    make = _sglang if engine is Engine.SGLANG else _vllm
    return make(model, folder, more, kv_space_gib, gpu)


def _vllm(model: str, folder: Path, more: Sequence[str], kv_space_gib: int, gpu: bool) -> vllm.EngineServer:
    on_cpu = {**vllm.CPU_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(kv_space_gib)}
    transfer = with_ssd_tier(vllm.KV_TRANSFER_CONFIG, folder / "ssd")
    arguments = [*(_GPU_ARGUMENTS if gpu else vllm.CPU_ARGUMENTS), "--kv-transfer-config", transfer, *more]
    environment = _online(model, _GPU_ENVIRONMENT if gpu else on_cpu)
    return vllm.VllmServer(model, arguments, environment, folder / "server.log")


def _sglang(model: str, folder: Path, more: Sequence[str], kv_space_gib: int, gpu: bool) -> vllm.EngineServer:
    arguments = [*sglang.CPU_ARGUMENTS, *sglang.BACKEND_ARGUMENTS, *_SGLANG_POOL, *more]
    environment = _online(model, {**sglang.CPU_ENVIRONMENT, **as_environment(ssd_settings(folder / "ssd"))})
    return sglang.SglangServer(model, arguments, environment, folder / "server.log")


def _online(model: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Without what keeps a model that has to be fetched from being fetched."""
    if Path(model).is_dir():
        return dict(environment)
    return {name: value for name, value in environment.items() if not name.endswith("_OFFLINE")}
