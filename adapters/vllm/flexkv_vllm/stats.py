"""FlexKV's counters on vLLM's own ``/metrics`` and in its log line."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from flexkv_core.metrics import Counters

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_GAUGES = {
    "host_blocks_used": "Blocks in the host tier.",
    "host_blocks": "Blocks that the host tier holds at most.",
}
_COUNTERS = {
    "lookups": "Loads that were planned.",
    "lookup_tokens": "Tokens that loads were planned for.",
    "hit_tokens": "Tokens that were found in a tier and loaded.",
    "loaded_blocks": "Blocks copied to the device.",
    "loaded_bytes": "Bytes copied to the device.",
    "load_seconds": "Time spent in copies to the device.",
    "stored_blocks": "Blocks copied to the host tier.",
    "stored_bytes": "Bytes copied to the host tier.",
    "store_seconds": "Time spent in copies to the host tier.",
    "evicted_blocks": "Blocks that left the host tier to make room.",
    "corrupt_blocks": "Blocks whose checksum did not match; each was recomputed.",
    "failed_loads": "Loads that failed and were recomputed.",
    "failed_stores": "Stores that failed or were refused.",
    "ssd_read_blocks": "Blocks read from the SSD.",
    "ssd_written_blocks": "Blocks written to the SSD.",
    "ssd_corrupt_blocks": "Blocks on the SSD whose checksum did not match; each is quarantined.",
    "ssd_evicted_blocks": "Blocks that left the SSD to make room.",
    "ssd_restarts": "Times that the storage process was started again.",
    "remote_lookups": "Prompts that the remote store was asked for.",
    "remote_late_lookups": "Answers of the remote store for which no request waited any more.",
    "remote_read_blocks": "Blocks read from the remote store.",
    "remote_late_reads": "Requests that stopped waiting for the remote store before all had come.",
    "remote_written_blocks": "Blocks written to the remote store, or found there.",
    "remote_dropped_blocks": "Blocks that waited to be written to the remote store and were pushed out by newer ones.",
    "remote_corrupt_blocks": "Values of the remote store that were not what their name says; each was removed.",
    "remote_failures": "Calls of the remote store that failed.",
    "remote_breaker_openings": "Times that the remote store was left alone because it failed.",
    "remote_restarts": "Times that the remote process was started again.",
    "dropped_blocks": "Blocks that found no room.",
    "prefetched_blocks": "Blocks read from a lower tier before a load asked for them.",
    "verify_checked": "Blocks of sampled hits that were compared with what the engine computed anew.",
    "verify_mismatches": "Blocks that were stored and are not what the engine computes; any is an alarm.",
    "verify_skipped": "Blocks of sampled hits that could not be compared.",
}
assert _COUNTERS.keys() == {field.name for field in fields(Counters)}


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
            self.data[name] = value if name in _GAUGES else self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """The numbers for a log line, without those that are zero."""
        return {name: round(value, 4) for name, value in self.data.items() if value}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(value for name, value in self.data.items() if name not in _GAUGES)


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
        for kind, descriptions in ((self._counter_cls, _COUNTERS), (self._gauge_cls, _GAUGES)):
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
            if name in _GAUGES:
                metric.set(value)
            elif value > 0:
                metric.inc(value)
