"""`/metrics` as text: samples in Prometheus's text format and in OpenMetrics, at little cost to the loop.

What prometheus-client writes, byte for byte, but names and labels of a series are written out once and kept:
a scrape formats values alone. Both servers, the trainer's and the sidecar's, answer with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from obsinfra.catalog.metrics import Metric
from obsinfra.monitoring.instruments import HistogramValue
from obsinfra.monitoring.sample import Sample

HistogramSample = tuple[Metric, Mapping[str, str], HistogramValue]

_Series = tuple[str, ...]
"""Name of a metric, then the values of its labels."""


class SampleCollector(Collector):
    """Samples as a scraper reads them, with the run's own labels on each.

    Args:
        labels: on every sample, e.g. run, model, rank.
        samples: called at each scrape.
        histograms: called at each scrape.
    """

    def __init__(
        self,
        labels: Mapping[str, str],
        samples: Callable[[], Iterable[Sample]],
        histograms: Callable[[], Iterable[HistogramSample]],
    ) -> None:
        self._labels = dict(labels)
        self._samples = samples
        self._histograms = histograms
        self._known: dict[_Series, tuple[str, ...]] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """What a scraper that sent this `Accept` gets, and its content type."""
        encode, content_type = choose_encoder(accept)
        if "escaping=dots" in content_type or "escaping=values" in content_type:
            return encode(self._registry), content_type  # renames every metric; nobody asks for that
        return self._written(content_type.startswith("application/openmetrics-text")), content_type

    def _written(self, openmetrics: bool) -> bytes:
        # Only series of this scrape are kept, so that those that went do not add up.
        used: dict[_Series, tuple[str, ...]] = {}
        known = self._known

        def starts(metric: Metric, labels: Mapping[str, str]) -> tuple[str, ...]:
            series = (metric.name, *[str(labels[name]) for name in metric.labels])
            found = used[series] = known.get(series) or self._starts_of_lines(metric, series[1:])
            return found

        families: dict[str, list[str]] = {}
        for metric, labels, value in self._samples():
            lines = families.get(metric.name)
            if lines is None:
                lines = families[metric.name] = [_head(metric, openmetrics)]
            lines.append(f"{starts(metric, labels)[0]}{_number(value)}\n")
        for metric, labels, histogram in self._histograms():
            lines = families.get(metric.name)
            if lines is None:
                lines = families[metric.name] = [_head(metric, openmetrics)]
            *buckets, count, total = starts(metric, labels)
            cumulative = 0
            for index, (start, added) in enumerate(zip(buckets, histogram.counts, strict=True)):
                cumulative += added
                exemplar = _exemplar(histogram, index) if openmetrics else ""
                lines.append(f"{start}{_number(cumulative)}{exemplar}\n")
            lines.append(f"{count}{_number(cumulative)}\n{total}{_number(histogram.total)}\n")
        self._known = used
        text = "".join(["".join(lines) for lines in families.values()])
        return (text + "# EOF\n" if openmetrics else text).encode()

    def _starts_of_lines(self, metric: Metric, values: tuple[str, ...]) -> tuple[str, ...]:
        """Each line of a series up to its number: of a histogram the buckets, then the count and the sum."""
        labels = self._labels | dict(zip(metric.labels, values, strict=True))
        if metric.kind != "histogram":
            return (_start(metric.sample_name, labels),)
        bounds = [*map(_number, metric.buckets), "+Inf"]
        return (
            *[_start(f"{metric.name}_bucket", labels | {"le": bound}) for bound in bounds],
            _start(f"{metric.name}_count", labels),
            _start(f"{metric.name}_sum", labels),
        )

    def describe(self) -> Iterable[Family]:
        return []

    def collect(self) -> Iterator[Family]:
        """The same as prometheus-client's families."""
        names = tuple(self._labels)
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for metric, labels, value in self._samples():
            family = families.get(metric.name)
            if family is None:
                make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                family = families[metric.name] = make(
                    metric.name, metric.help, labels=[*names, *metric.labels]
                )
            family.add_metric(self._label_values(metric, labels), value)
        yield from families.values()
        histograms: dict[str, HistogramMetricFamily] = {}
        for metric, labels, histogram in self._histograms():
            found = histograms.get(metric.name)
            if found is None:
                found = histograms[metric.name] = HistogramMetricFamily(
                    metric.name, metric.help, labels=[*names, *metric.labels]
                )
            cumulative = 0
            buckets: list[Any] = []
            for index, count in enumerate(histogram.counts):
                cumulative += count
                bound = _number(metric.buckets[index]) if index < len(metric.buckets) else "+Inf"
                exemplar = histogram.exemplars.get(index)
                buckets.append((bound, cumulative, Exemplar(*exemplar) if exemplar else None))
            found.add_metric(self._label_values(metric, labels), buckets, histogram.total)
        yield from histograms.values()

    def _label_values(self, metric: Metric, labels: Mapping[str, str]) -> list[str]:
        return [*self._labels.values(), *(str(labels[name]) for name in metric.labels)]


def _head(metric: Metric, openmetrics: bool) -> str:
    help = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    name = metric.sample_name
    if openmetrics:
        help, name = help.replace('"', r"\""), metric.name
    return f"# HELP {name} {help}\n# TYPE {name} {metric.kind}\n"


def _start(name: str, labels: Mapping[str, str]) -> str:
    return f"{name}{_braced(labels)} " if labels else f"{name} "


def _braced(labels: Mapping[str, str]) -> str:
    pairs = [f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items())]
    return "{" + ",".join(pairs) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _exemplar(histogram: HistogramValue, index: int) -> str:
    found = histogram.exemplars.get(index)
    if found is None:
        return ""
    labels, value, at = found
    return f" # {_braced(labels)} {_number(value)} {at}"


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]
