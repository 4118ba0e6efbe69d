"""The way from the workers to the scheduler, ``build_connector_worker_meta``: vLLM has it since 0.18, older versions by our patch."""

from __future__ import annotations

from flexkv_core.errors import ConfigError

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
except ImportError:
    import vllm

    raise ConfigError(
        f"FlexKV: vLLM {vllm.__version__} has no way for its workers to report what was stored, so that nothing could be found again;"
        " run `flexkv patch apply --engine vllm`, or use 0.18 or newer"
    ) from None

__all__ = ["KVConnectorWorkerMetadata"]
