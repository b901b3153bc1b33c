"""What a scrape reads: byte for byte what prometheus-client would write, in every format one can ask for."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from obsinfra.catalog import metrics as catalog
from obsinfra.catalog.metrics import Metric
from obsinfra.monitoring.exposition import HistogramSample, SampleCollector
from obsinfra.monitoring.instruments import HistogramValue
from obsinfra.monitoring.sample import Sample

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
ACCEPTED = (
    "",
    "*/*",
    "text/plain; version=0.0.4",
    "text/plain; version=1.0.0; escaping=allow-utf-8",
    "text/plain; version=1.0.0; escaping=values",
    OPENMETRICS,
    "application/openmetrics-text",
    f"{OPENMETRICS}; escaping=allow-utf-8",
    f"{OPENMETRICS}; escaping=underscores",
    f"{OPENMETRICS}; escaping=dots",
    "application/openmetrics-text; version=2.0.0; escaping=allow-utf-8",
    "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3",
)

METRICS = [
    metric for metric in vars(catalog).values() if isinstance(metric, Metric) and metric.source != "stack"
]
PLAIN = [metric for metric in METRICS if metric.kind != "histogram"]
HISTOGRAMS = [metric for metric in METRICS if metric.kind == "histogram"]
texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\\\n"{},= #'), max_size=12)
numbers = (
    st.floats() | st.integers(-(2**60), 2**60).map(float) | st.sampled_from([0.0, -0.0, 1e6, 1e7, 1e15, 1e16])
)


def labels_of(metric: Metric) -> st.SearchStrategy[dict[str, str]]:
    return st.fixed_dictionaries(dict.fromkeys(metric.labels, texts))


@st.composite
def plain_samples(draw: st.DrawFn) -> Sample:
    metric = draw(st.sampled_from(PLAIN))
    return Sample(metric, draw(labels_of(metric)), draw(numbers))


@st.composite
def histogram_samples(draw: st.DrawFn) -> HistogramSample:
    metric = draw(st.sampled_from(HISTOGRAMS))
    size = len(metric.buckets) + 1
    counts = draw(st.lists(st.integers(0, 10**12), min_size=size, max_size=size))
    exemplars: dict[int, tuple[dict[str, str], float, float]] = draw(
        st.dictionaries(
            st.integers(0, size - 1),
            st.tuples(st.fixed_dictionaries({"trace_id": texts}), numbers, st.floats(0, 2e9)),
            max_size=3,
        )
    )
    return metric, draw(labels_of(metric)), HistogramValue(counts, draw(numbers), exemplars)


def collector_of(
    samples: list[Sample], histograms: list[HistogramSample] | None = None, **labels: str
) -> tuple[SampleCollector, CollectorRegistry]:
    collector = SampleCollector(labels, lambda: samples, lambda: histograms or [])
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return collector, registry


def assert_same(collector: SampleCollector, registry: CollectorRegistry) -> None:
    for accept in ACCEPTED:
        encode, content_type = choose_encoder(accept)
        assert collector.exposition(accept) == (encode(registry), content_type), accept


@settings(max_examples=60)
@given(
    st.lists(plain_samples(), max_size=8),
    st.lists(histogram_samples(), max_size=3),
    st.dictionaries(st.sampled_from(["run", "model", "rank", "zone"]), texts),
)
def test_it_is_what_prometheus_client_writes(
    samples: list[Sample], histograms: list[HistogramSample], labels: dict[str, str]
) -> None:
    assert_same(*collector_of(samples, histograms, **labels))


def test_every_metric_of_the_catalogue_is_written_as_prometheus_client_does() -> None:
    def values(metric: Metric) -> dict[str, str]:
        return {name: f'{name} of "{metric.name}"\\\n' for name in metric.labels}

    collector, registry = collector_of(
        [Sample(metric, values(metric), 1.5) for metric in PLAIN],
        [
            (metric, values(metric), HistogramValue([1] * (len(metric.buckets) + 1), 2.5))
            for metric in HISTOGRAMS
        ],
        run="r",
    )
    assert_same(collector, registry)


def test_series_come_and_go_and_values_change_between_scrapes() -> None:
    samples: list[Sample] = []
    histogram = HistogramValue([0] * (len(catalog.SNAPSHOT_SECONDS.buckets) + 1))
    collector, registry = collector_of(samples, [(catalog.SNAPSHOT_SECONDS, {}, histogram)], run="r")
    for turn in range(50):
        samples[:] = [
            Sample(catalog.STEPS, {}, float(turn)),
            Sample(catalog.VALIDATION_METRIC, {"metric": f"metric {turn // 2}"}, math.nan),
        ]
        histogram.counts[turn % len(histogram.counts)] += 1
        histogram.exemplars = {turn % 3: ({"trace_id": f"{turn:032x}"}, 0.1, 1e9 + turn)}
        assert_same(collector, registry)
    assert len(collector._known) == 3, "what a series is called is kept no longer than the series"


@settings(max_examples=40)
@given(texts)
def test_any_label_value_survives_both_formats(value: str) -> None:
    """Quotes, backslashes and line ends are escaped; nothing a user types breaks a scrape."""
    collector, _ = collector_of(
        [Sample(catalog.VALIDATION_METRIC, {"metric": value}, 1.0), Sample(catalog.STEPS, {}, 2.0)],
        [(catalog.SNAPSHOT_SECONDS, {}, HistogramValue([1] * 15, 3.0))],
        run=value,
        model="m",
    )
    parsers: list[tuple[str, Any]] = [("", parse_text), (OPENMETRICS, parse_openmetrics)]
    for accept, parse in parsers:
        text = collector.exposition(accept)[0].decode()
        samples = [sample for family in parse(text) for sample in family.samples]
        assert {sample.labels["run"] for sample in samples} == {value}
        assert {sample.labels["metric"] for sample in samples if "metric" in sample.labels} == {value}
        buckets = [sample.value for sample in samples if sample.name.endswith("_bucket")]
        assert buckets == list(range(1, 16))


def test_a_histogram_with_too_few_counts_is_refused() -> None:
    collector, _ = collector_of([], [(catalog.SNAPSHOT_SECONDS, {}, HistogramValue([1], 1.0))])
    with pytest.raises(ValueError, match="shorter"):
        collector.exposition("")
