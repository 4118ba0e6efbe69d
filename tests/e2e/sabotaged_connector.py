"""A connector whose loads bring zeros, for servers under ``pytest --sabotage``: named by ``kv_connector_module_path``."""

from __future__ import annotations

from flexkv_kernels.copier import CpuCopier
from flexkv_vllm.connector import FlexKVConnector
from tests.e2e.checks import load_zeros_last, load_zeros_layerwise

CpuCopier.scatter = load_zeros_last(CpuCopier.scatter)  # type: ignore[method-assign, assignment]

CpuCopier.scatter_layers = load_zeros_layerwise  # type: ignore[method-assign]


class SabotagedConnector(FlexKVConnector):
    """As its base class, in a process whose copies are sabotaged."""
