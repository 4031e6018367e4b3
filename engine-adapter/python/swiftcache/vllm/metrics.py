"""Counters and gauges through vLLM's own hooks: its log line, and /metrics."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from swiftcache.engine.metrics import COUNTERS, GAUGES, Tally


class SwiftCacheStats(Tally, KVConnectorStats):
    """A tally that vLLM passes from its workers and its scheduler to its log and metrics."""


class SwiftCachePromMetrics(KVConnectorPromMetrics):
    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {name: self._make(self._counter_cls, name, text) for name, text in COUNTERS.items()}
        self._gauges = {
            name: self._make(self._gauge_cls, name, text, multiprocess_mode="mostrecent")
            for name, text in GAUGES.items()
        }
        self._last: dict[int, dict[str, dict[str, float]]] = {}

    def _make(self, kind: Any, name: str, text: str, **more: Any) -> Any:
        metric = kind(name=f"vllm:swiftcache_{name}", documentation=text, labelnames=self._labelnames, **more)
        return create_metric_per_engine(metric, self.per_engine_labelvalues)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data["counters"].items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(value)
        if not transfer_stats_data["gauges"]:
            return
        workers = self._last.setdefault(engine_idx, {})
        workers.update(transfer_stats_data["gauges"])
        for name in GAUGES:
            self._gauges[name][engine_idx].set(sum(of.get(name, 0) for of in workers.values()))
