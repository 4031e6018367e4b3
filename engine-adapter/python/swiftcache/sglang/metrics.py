"""Counters and gauges in SGLang's /metrics: those of every engine, and a few of this one's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from swiftcache.engine.metrics import COUNTERS, GAUGES, Meter, Tally

SGLANG_COUNTERS = {
    "layer_wise_loads": "Loads that ran while the layers before were computed.",
    "waited_loads": "Loads that were waited for before their batch started.",
    "aborted_loads": "Loads that failed after SGLang had counted on them: their requests ended with 503.",
    "unwaited_batches": "Batches that did not wait for the layers of their loads.",
    "dropped_pages": "Pages that were not stored because too many were on their way already.",
}
SHOW_SECONDS = 1.0
"""How often the counters are read."""


class Shown:
    """What one rank has counted, and the way of it to /metrics."""

    def __init__(
        self, labels: Mapping[str, str], *, enabled: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.counts = dict.fromkeys((*COUNTERS, *SGLANG_COUNTERS), 0.0)
        """Since the start; what the native module counts is added when it is read."""
        self._enabled, self._clock, self._labels = enabled, clock, dict(labels)
        self._meter = Meter("this")
        self._next = 0.0
        self._counters: dict[str, Any] = {}
        self._gauges: dict[str, Any] = {}

    def count(self, name: str, value: float = 1) -> None:
        self.counts[name] += value

    def set_total(self, name: str, total: float) -> None:
        self.counts[name] = total

    def show(self, totals: Callable[[], Mapping[str, float]], *, now: bool = False) -> None:
        """Reads the native module's counters and publishes all, unless that was done a moment ago."""
        if not now and self._clock() < self._next:
            return
        self._next = self._clock() + SHOW_SECONDS
        tally = Tally()
        self._meter.read(totals(), tally)
        for name, value in tally.data["counters"].items():
            # Lookups are counted as SGLang sees them.
            if name != "lookups":
                self.counts[name] += value
        if self._enabled:
            self._publish(tally.gauges())

    def _publish(self, gauges: Mapping[str, float]) -> None:
        if not self._counters:
            self._make()
        for name, shown in self._counters.items():
            shown.publish(self.counts[name])
        for name, gauge in self._gauges.items():
            gauge.set(gauges[name])

    def _make(self) -> None:
        # SGLang sets PROMETHEUS_MULTIPROC_DIR first; the library looks for it when it is imported.
        from prometheus_client import Counter, Gauge

        names = list(self._labels)
        for name, text in (COUNTERS | SGLANG_COUNTERS).items():
            made = Counter(f"sglang:swiftcache_{name}", text, names).labels(**self._labels)
            self._counters[name] = _Counter(made)
        for name, text in GAUGES.items():
            made = Gauge(f"sglang:swiftcache_{name}", text, names, multiprocess_mode="mostrecent")
            self._gauges[name] = made.labels(**self._labels)


class _Counter:
    """A counter that is told totals."""

    def __init__(self, made: Any) -> None:
        self._made, self._before = made, 0.0

    def publish(self, total: float) -> None:
        self._made.inc(max(0.0, total - self._before))
        self._before = max(self._before, total)
