"""FlexKV's counters on SGLang's own ``/metrics``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from flexkv_core.manager import Blocks
from flexkv_core.metrics import COUNTER_WORDS, GAUGE_WORDS

INTERVAL_S = 1.0
"""Between two updates: scrapers ask every few seconds, the scheduler's loop comes by thousands of times."""


class PromMetrics:
    """``sglang:flexkv_<name>`` for each counter and gauge; SGLang's server collects what its processes count.

    ``labels``: name to value, the same for all of this process. Made after SGLang has prepared its metrics.
    """

    def __init__(self, manager: Blocks, labels: Mapping[str, str]) -> None:
        # SGLang names the folder that the processes share before this; prometheus_client looks for it when it is imported.
        from prometheus_client import Counter, Gauge

        self._manager = manager
        self._next_s = 0.0
        self._seen = dict.fromkeys(COUNTER_WORDS, 0.0)
        names = list(labels)
        self._counters: dict[str, Any] = {
            name: Counter(f"sglang:flexkv_{name}", words, names).labels(*labels.values())
            for name, words in COUNTER_WORDS.items()
        }
        self._gauges: dict[str, Any] = {
            name: Gauge(f"sglang:flexkv_{name}", words, names, multiprocess_mode="mostrecent").labels(
                *labels.values()
            )
            for name, words in GAUGE_WORDS.items()
        }

    def update(self) -> None:
        """Carry over what was counted; does nothing within a second of the last time."""
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + INTERVAL_S
        for name, value in self._manager.counters().as_dict().items():
            if value > self._seen[name]:
                self._counters[name].inc(value - self._seen[name])
                self._seen[name] = value
        for gauge, value in zip(GAUGE_WORDS, self._manager.usage(), strict=True):
            self._gauges[gauge].set(value)
