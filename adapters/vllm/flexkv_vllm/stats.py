"""FlexKV's counters on vLLM's own ``/metrics`` and in its log line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexkv_core.metrics import COUNTER_WORDS, GAUGE_WORDS, Counters
from flexkv_vllm.compat.worker_stats import KVConnectorPromMetrics, KVConnectorStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class FlexKVStats(KVConnectorStats):
    """Counts of an interval; gauges as they stood at its end. ``data`` maps the names above to numbers."""

    @classmethod
    def between(cls, before: Counters, after: Counters, used: int, capacity: int) -> FlexKVStats:
        """What was counted from ``before`` to ``after``, and the host tier's slots."""
        old = before.as_dict()
        data: dict[str, int | float] = {name: value - old[name] for name, value in after.as_dict().items()}
        return cls(data={**data, "host_blocks_used": used, "host_blocks": capacity})

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, int | float] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add ``other``, the later interval, to this one."""
        for name, value in other.data.items():
            self.data[name] = value if name in GAUGE_WORDS else self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """The numbers for a log line, without those that are zero."""
        return {name: round(value, 4) for name, value in self.data.items() if value}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(value for name, value in self.data.items() if name not in GAUGE_WORDS)


class FlexKVPromMetrics(KVConnectorPromMetrics):
    """``vllm:flexkv_<name>`` for each counter and gauge, with vLLM's labels."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[tuple[int, str], Any] = {}
        for kind, descriptions in ((self._counter_cls, COUNTER_WORDS), (self._gauge_cls, GAUGE_WORDS)):
            for name, description in descriptions.items():
                metric = kind(name=f"vllm:flexkv_{name}", documentation=description, labelnames=labelnames)
                for engine, labels in per_engine_labelvalues.items():
                    self._metrics[engine, name] = metric.labels(*labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take in an interval's numbers."""
        for name, value in transfer_stats_data.items():
            metric = self._metrics.get((engine_idx, name))
            if metric is None:
                continue
            if name in GAUGE_WORDS:
                metric.set(value)
            elif value > 0:
                metric.inc(value)
