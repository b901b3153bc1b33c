"""Gauges, counters and histograms of the catalogue for what happens rarely: checkpoints, commands, alerts.

Off the step path, so a lock is fine. The exporter reads them at a scrape.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass, field

from obsinfra.catalog.metrics import Metric
from obsinfra.monitoring.sample import Sample


@dataclass(slots=True)
class HistogramValue:
    """Counts per bucket (the last one is +Inf), not cumulative, and the sum of what was observed."""

    counts: list[int]
    total: float = 0.0
    exemplars: dict[int, tuple[dict[str, str], float, float]] = field(default_factory=dict)


class Instruments:
    """Values of declared metrics by label values; unknown label names are refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, tuple[str, ...]], tuple[Metric, float]] = {}
        self._histograms: dict[tuple[str, tuple[str, ...]], tuple[Metric, HistogramValue]] = {}

    @staticmethod
    def _key(metric: Metric, labels: dict[str, str]) -> tuple[str, tuple[str, ...]]:
        if tuple(labels) != metric.labels and set(labels) != set(metric.labels):
            raise ValueError(f"{metric.name} has labels {metric.labels}, got {tuple(labels)}")
        return metric.name, tuple(str(labels[name]) for name in metric.labels)

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[self._key(metric, labels)] = (metric, float(value))

    def add(self, metric: Metric, amount: float = 1.0, /, **labels: str) -> None:
        """Increase a counter; `amount` 0 makes it exist from the start, so that its first event is seen."""
        key = self._key(metric, labels)
        with self._lock:
            _, value = self._values.get(key, (metric, 0.0))
            self._values[key] = (metric, value + amount)

    def observe(
        self, metric: Metric, value: float, /, *, exemplar: tuple[str, float] | None = None, **labels: str
    ) -> None:
        """Put `value` into a histogram. `exemplar` is (trace id, epoch seconds)."""
        key = self._key(metric, labels)
        index = bisect_left(metric.buckets, value)
        with self._lock:
            _, histogram = self._histograms.setdefault(
                key, (metric, HistogramValue([0] * (len(metric.buckets) + 1)))
            )
            histogram.counts[index] += 1
            histogram.total += value
            if exemplar is not None:
                histogram.exemplars[index] = ({"trace_id": exemplar[0]}, value, exemplar[1])

    def get(self, metric: Metric, /, **labels: str) -> float:
        """Present value of a gauge or counter; 0 when never touched."""
        with self._lock:
            return self._values.get(self._key(metric, labels), (metric, 0.0))[1]

    def samples(self) -> list[Sample]:
        """Every gauge and counter."""
        with self._lock:
            return [
                Sample(metric, dict(zip(metric.labels, labels, strict=True)), value)
                for (_, labels), (metric, value) in self._values.items()
            ]

    def histograms(self) -> list[tuple[Metric, dict[str, str], HistogramValue]]:
        """Every histogram, copied."""
        with self._lock:
            return [
                (
                    metric,
                    dict(zip(metric.labels, labels, strict=True)),
                    HistogramValue(list(value.counts), value.total, dict(value.exemplars)),
                )
                for (_, labels), (metric, value) in self._histograms.items()
            ]
