"""The server that the demo asks, for each engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

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


@dataclass(frozen=True)
class EngineChoice:
    """What is served, and with what. ``more`` goes onto the engine's command line; ``kv_space_gib`` is vLLM's own cache on a CPU; ``gpu``:
    with vLLM's CUDA build."""

    engine: Engine
    model: str
    more: Sequence[str]
    kv_space_gib: int
    gpu: bool

    def server(self, settings: Mapping[str, object], log: Path) -> vllm.EngineServer:
        """The engine with FlexKV and these settings of it; it prints into ``log``."""
        return (self._sglang if self.engine is Engine.SGLANG else self._vllm)(settings, log)

    def _vllm(self, settings: Mapping[str, object], log: Path) -> vllm.EngineServer:
        on_cpu = {**vllm.CPU_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(self.kv_space_gib)}
        arguments = [
            *(_GPU_ARGUMENTS if self.gpu else vllm.CPU_ARGUMENTS),
            *("--kv-transfer-config", vllm.transfer_config(settings)),
            *self.more,
        ]
        environment = _online(self.model, _GPU_ENVIRONMENT if self.gpu else on_cpu)
        return vllm.VllmServer(self.model, arguments, environment, log)

    def _sglang(self, settings: Mapping[str, object], log: Path) -> vllm.EngineServer:
        arguments = [*sglang.CPU_ARGUMENTS, *sglang.BACKEND_ARGUMENTS, *_SGLANG_POOL, *self.more]
        environment = _online(self.model, {**sglang.CPU_ENVIRONMENT, **as_environment(settings)})
        return sglang.SglangServer(self.model, arguments, environment, log)


def _online(model: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Without what keeps a model that has to be fetched from being fetched."""
    if Path(model).is_dir():
        return dict(environment)
    return {name: value for name, value in environment.items() if not name.endswith("_OFFLINE")}
