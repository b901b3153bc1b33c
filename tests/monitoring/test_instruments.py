"""Gauges, counters and histograms of the catalogue keep what they are told, from any number of threads."""

from __future__ import annotations

import threading

import pytest

from obsinfra.catalog import metrics as catalog
from obsinfra.monitoring.instruments import Instruments


def test_a_gauge_keeps_the_last_value_by_label() -> None:
    instruments = Instruments()
    instruments.set(catalog.VALIDATION_METRIC, 0.5, metric="loss")
    instruments.set(catalog.VALIDATION_METRIC, 0.9, metric="accuracy")
    instruments.set(catalog.VALIDATION_METRIC, 0.4, metric="loss")
    assert {sample.labels["metric"]: sample.value for sample in instruments.samples()} == {
        "loss": 0.4,
        "accuracy": 0.9,
    }
    assert instruments.get(catalog.VALIDATION_METRIC, metric="loss") == 0.4


def test_a_counter_adds_up_and_exists_once_zero_was_added() -> None:
    instruments = Instruments()
    assert instruments.get(catalog.CHECKPOINTS, kind="best") == 0
    assert instruments.samples() == []
    instruments.add(catalog.CHECKPOINTS, 0, kind="best")
    assert [(sample.labels, sample.value) for sample in instruments.samples()] == [({"kind": "best"}, 0)]
    instruments.add(catalog.CHECKPOINTS, kind="best")
    instruments.add(catalog.CHECKPOINTS, 2.5, kind="best")
    assert instruments.get(catalog.CHECKPOINTS, kind="best") == 3.5


def test_labels_may_come_in_any_order_but_must_be_the_metrics_own() -> None:
    instruments = Instruments()
    instruments.add(catalog.CONTROL_COMMANDS, outcome="done", action="stop")
    instruments.add(catalog.CONTROL_COMMANDS, action="stop", outcome="done")
    assert instruments.get(catalog.CONTROL_COMMANDS, action="stop", outcome="done") == 2
    for wrong in ({}, {"action": "stop"}, {"action": "stop", "outcome": "done", "host": "h"}):
        with pytest.raises(ValueError, match="has labels"):
            instruments.add(catalog.CONTROL_COMMANDS, **wrong)


def test_a_histogram_puts_values_on_a_bound_below_it_and_the_rest_into_infinity() -> None:
    instruments = Instruments()
    low, high = catalog.LATENCY_BUCKETS[0], catalog.LATENCY_BUCKETS[-1]
    for value in (low, low * 1.01, high, high + 1):
        instruments.observe(catalog.SNAPSHOT_SECONDS, value)
    ((metric, labels, histogram),) = instruments.histograms()
    assert (metric, labels) == (catalog.SNAPSHOT_SECONDS, {})
    assert histogram.counts == [1, 1, *[0] * (len(catalog.LATENCY_BUCKETS) - 3), 1, 1]
    assert histogram.total == pytest.approx(low * 2.01 + high * 2 + 1)


def test_the_latest_exemplar_of_a_bucket_is_kept() -> None:
    instruments = Instruments()
    instruments.observe(catalog.SNAPSHOT_SECONDS, 0.2, exemplar=("a" * 32, 1.0))
    instruments.observe(catalog.SNAPSHOT_SECONDS, 0.21, exemplar=("b" * 32, 2.0))
    instruments.observe(catalog.SNAPSHOT_SECONDS, 0.22)
    ((_, _, histogram),) = instruments.histograms()
    assert list(histogram.exemplars.values()) == [({"trace_id": "b" * 32}, 0.21, 2.0)]


def test_a_histogram_that_was_read_does_not_change_afterwards() -> None:
    instruments = Instruments()
    instruments.observe(catalog.SNAPSHOT_SECONDS, 0.2)
    ((_, _, before),) = instruments.histograms()
    instruments.observe(catalog.SNAPSHOT_SECONDS, 0.2, exemplar=("a" * 32, 1.0))
    assert (sum(before.counts), before.total, before.exemplars) == (1, 0.2, {})


def test_threads_that_add_at_once_lose_nothing() -> None:
    instruments = Instruments()

    def work() -> None:
        for _ in range(2_000):
            instruments.add(catalog.SPANS)
            instruments.observe(catalog.SNAPSHOT_SECONDS, 0.5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((_, _, histogram),) = instruments.histograms()
    assert (instruments.get(catalog.SPANS), sum(histogram.counts), histogram.total) == (8000, 8000, 4000)
