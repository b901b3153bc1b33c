"""The in-process evaluator and Prometheus agree: random series are replayed through both and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from promtool import needs_promtool, promtool

from obsinfra.alerting.evaluator import AlertEvaluator, AlertStatus
from obsinfra.alerting.prometheus_rules import write_rules
from obsinfra.alerting.promql import rule_labels
from obsinfra.catalog.alert_changes import alert_table
from obsinfra.catalog.alerts import BY_NAME, Alert

INTERVAL = 7
"""Seconds between scrapes and between evaluations; divides no window, as Prometheus 2 and 3 differ on whether
a sample at its very edge is in it."""

STEPS = 45

GAUGE = replace(BY_NAME["HighMemory"], for_seconds=20.0)
BELOW = replace(BY_NAME["GradientExplosion"], name="TooSmall", comparator="<", threshold=1.0, for_seconds=7.0)
DAMPED = replace(BY_NAME["HighGPUTemperature"], for_seconds=10.0)
COUNTER = BY_NAME["NonFiniteLoss"]


def changed(key: str, **change: Any) -> Alert:
    """An alert of the table that looks at something else."""
    [alert] = [row for row in alert_table({}, {key: change}) if row.key == key]
    return alert


OVER_TIME = (
    changed("memory", aggregation="average", window_seconds=60, threshold=57, for_seconds=14),
    changed("cpu", aggregation="highest", window_seconds=60, threshold=70, comparator="<", for_seconds=0),
    changed("gpu_memory", aggregation="lowest", window_seconds=60, threshold=70, for_seconds=7),
    changed("gpu_utilization", aggregation="highest", window_seconds=45, threshold=70, for_seconds=0),
)
STANDS_STILL = changed(
    "checkpoint_failures", metric="obsinfra_steps", comparator="<", threshold=1, window_seconds=60
)

Series = tuple[float | None, ...]
"""One value per scrape; None: the target no longer exposes the series."""


def gauges(*values: float) -> st.SearchStrategy[Series]:
    """Values, the last more often, each for a while, so that waits are met, missed by one and broken."""
    span = st.tuples(st.sampled_from([*values, values[-1], None]), st.integers(1, 8))
    return st.lists(span, min_size=6, max_size=14).map(_spread)


def counters() -> st.SearchStrategy[Series]:
    """Counters that rest, rise, restart from zero, vanish and return, sometimes born above zero."""
    span = st.tuples(st.sampled_from(["rest", "rest", "rise", "restart", "gone"]), st.integers(1, 14))
    return st.tuples(st.integers(0, 1), st.lists(span, min_size=4, max_size=12)).map(_count)


def _spread(spans: Sequence[tuple[float | None, int]]) -> Series:
    return tuple(value for value, scrapes in spans for _ in range(scrapes))[:STEPS]


def _count(plan: tuple[int, Sequence[tuple[str, int]]]) -> Series:
    value, spans = plan
    out: list[float | None] = []
    for what, scrapes in spans:
        if what == "rise":
            value += 2
        elif what == "restart":
            value = 0
        out += [None if what == "gone" else float(value)] * scrapes
    return tuple(out[:STEPS])


def replay(alert: Alert, series: Sequence[Series]) -> list[list[AlertStatus]]:
    """What the evaluator says at each scrape."""
    step = 0

    def read() -> list[tuple[str, Mapping[str, str], float]]:
        return [
            (alert.metric.sample_name, {"rank": str(rank)}, value)
            for rank, values in enumerate(series)
            if step < len(values) and (value := values[step]) is not None
        ]

    evaluator = AlertEvaluator([alert], read, clock=lambda: float(step * INTERVAL))
    said = []
    for step in range(STEPS):  # noqa: B007 - read by the closures
        said.append(evaluator.evaluate())
    return said


def as_promtool_test(alert: Alert, series: Sequence[Series]) -> dict[str, Any]:
    """The same series for promtool, expecting of `ALERTS` and its start times what the evaluator said."""
    tests = []
    for step, statuses in enumerate(replay(alert, series)):
        expected: dict[str, list[dict[str, Any]]] = {"ALERTS": [], "ALERTS_FOR_STATE": []}
        for status in statuses:
            labels = {"alertname": alert.name} | dict(status.labels) | rule_labels(alert)
            expected["ALERTS"].append(
                {"labels": "ALERTS" + _selector(labels | {"alertstate": status.state}), "value": 1}
            )
            expected["ALERTS_FOR_STATE"].append(
                {"labels": "ALERTS_FOR_STATE" + _selector(labels), "value": status.since}
            )
        tests += [
            {
                "expr": f'{name}{{alertname="{alert.name}"}}',
                "eval_time": f"{step * INTERVAL}s",
                "exp_samples": samples,
            }
            for name, samples in expected.items()
        ]
    return {
        "interval": f"{INTERVAL}s",
        "input_series": [
            {
                "series": f'{alert.metric.sample_name}{{rank="{rank}"}}',
                "values": " ".join("stale" if value is None else f"{value:g}" for value in values) + " stale",
            }
            for rank, values in enumerate(series)
        ],
        "promql_expr_test": tests,
    }


def _selector(labels: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


@pytest.mark.slow
@needs_promtool
@pytest.mark.timeout(600)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    above=st.lists(gauges(0.5, 0.9), min_size=2, max_size=2),
    below=st.lists(gauges(5.0, 0.5), min_size=2, max_size=2),
    damped=st.lists(gauges(75.0, 80.0, 90.0), min_size=2, max_size=2),
    counted=st.lists(counters(), min_size=3, max_size=3),
)
def test_both_evaluators_say_the_same_at_every_scrape(
    tmp_path: Path,
    above: list[Series],
    below: list[Series],
    damped: list[Series],
    counted: list[Series],
) -> None:
    write_rules(tmp_path / "rules.yml", [GAUGE, BELOW, DAMPED, COUNTER])
    document = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": f"{INTERVAL}s",
        "tests": [
            as_promtool_test(alert, series)
            for alert, series in ((GAUGE, above), (BELOW, below), (DAMPED, damped), (COUNTER, counted))
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(document))
    judged = promtool("test", "rules", tmp_path / "test.yml")
    assert judged.returncode == 0, judged.stdout + judged.stderr


@pytest.mark.slow
@needs_promtool
@pytest.mark.timeout(600)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    over_time=st.lists(
        st.lists(gauges(0.5, 0.9), min_size=2, max_size=2),
        min_size=len(OVER_TIME),
        max_size=len(OVER_TIME),
    ),
    counted=st.lists(counters(), min_size=3, max_size=3),
)
def test_they_do_for_alerts_that_the_user_has_look_at_something_else(
    tmp_path: Path, over_time: list[list[Series]], counted: list[Series]
) -> None:
    played = [*zip(OVER_TIME, over_time, strict=True), (STANDS_STILL, counted)]
    write_rules(tmp_path / "rules.yml", [alert for alert, _ in played])
    document = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": f"{INTERVAL}s",
        "tests": [as_promtool_test(alert, series) for alert, series in played],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(document))
    judged = promtool("test", "rules", tmp_path / "test.yml")
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_the_random_series_reach_every_state() -> None:
    """The comparison above would prove little if its series never fired, waited or resolved."""
    slow: Series = (0.5, 0.9, 0.9, 0.5, 0.9, 0.9, 0.9, 0.9, None, 0.9, 0.9, 0.9, 0.9)
    found = ["".join(status.state[0] for status in said) for said in replay(GAUGE, [slow])]
    assert "".join(state or "-" for state in found[: len(slow)]) == "-pp-pppf-pppf"
