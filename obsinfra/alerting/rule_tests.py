"""Unit tests for the generated rules, as promtool's own test files.

Each alert's series are played to the rules and its state is asked for at the instants that matter. Derived
from the table's meaning alone, not from the in-process evaluator, so that each can be held against the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml

from obsinfra.alerting.prometheus_rules import rule_labels
from obsinfra.alerting.wording import plain_number
from obsinfra.catalog.alerts import ALERTS, Alert
from obsinfra.catalog.metrics import RUN_LABELS

QUIET_SECONDS = 10
HELD_ON_SECONDS = 20

Span = tuple[float | None, int]
"""A value (None: no such series) and how many seconds it lasts, at one sample a second."""


def render_rule_tests(rules_file: str, alerts: Sequence[Alert] = ALERTS) -> str:
    """A promtool test file for all alerts.

    Each fires beyond its threshold, not at it, not before `for` is over, not after a shorter crossing, and
    resolves.

    Args:
        rules_file: path of the rules, as promtool shall open it (relative to the test file).
        alerts: the table the rules were made from.
    """
    tests = [test for alert in alerts for test in _tests_of(alert)]
    document = {"rule_files": [rules_file], "evaluation_interval": "1s", "tests": tests}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)


def series_labels(alert: Alert) -> dict[str, str]:
    """Example labels of the series an alert looks at."""
    return {name: f"some-{name}" for name in (*RUN_LABELS, *alert.metric.labels)}


def _tests_of(alert: Alert) -> list[dict[str, Any]]:
    return _increase_tests(alert) if alert.increase_seconds else [_value_test(alert)]


def _value_test(alert: Alert) -> dict[str, Any]:
    hold = math.ceil(alert.for_seconds)
    step = max(1.0, abs(alert.limit)) * 0.05
    beyond = alert.limit + (step if alert.comparator == ">" else -step)
    crossed, over = QUIET_SECONDS, QUIET_SECONDS + hold + HELD_ON_SECONDS
    spans: list[Span] = [
        (alert.limit, QUIET_SECONDS),
        (beyond, over - crossed),
        (alert.limit, QUIET_SECONDS),
        (beyond, hold),  # one evaluation short of firing
        (alert.limit, QUIET_SECONDS),
    ]
    states: dict[int, str | None] = {
        crossed - 1: None,
        crossed + hold: "firing",
        over - 1: "firing",
        over: None,
    }
    if hold:
        again = over + QUIET_SECONDS
        states |= {crossed: "pending", crossed + hold - 1: "pending"}
        states |= {again: "pending", again + hold - 1: "pending", again + hold: None}
    return _test(alert, "its value", spans, states)


def _increase_tests(alert: Alert) -> list[dict[str, Any]]:
    """A rise from zero, a series born above zero, and a rise after a restart of the counter."""
    window, many = math.ceil(alert.increase_seconds), math.floor(alert.limit) + 1
    quiet = QUIET_SECONDS
    rise: list[Span] = [(0, quiet), (many, 2 * window)]
    states: dict[int, str | None] = {
        quiet - 1: None,
        quiet: "firing",
        quiet + window - 1: "firing",
        quiet + window: None,
    }
    restart = 2 * window
    return [
        _test(alert, "a rise from zero", rise, states),
        _test(alert, "a series born above zero", [(None, quiet), *rise[1:]], states),
        _test(
            alert,
            "a rise after a restart of the counter",
            [(many + 2, restart), (0, quiet), (many, window)],
            {restart - 1: None, restart: None, restart + quiet - 1: None, restart + quiet: "firing"},
        ),
    ]


def _test(alert: Alert, what: str, spans: Sequence[Span], states: dict[int, str | None]) -> dict[str, Any]:
    labels = series_labels(alert)
    return {
        "name": f"{alert.name}: {what}",
        "interval": "1s",
        "input_series": [{"series": alert.metric.sample_name + _selector(labels), "values": _values(spans)}],
        "promql_expr_test": [
            {
                "expr": f'ALERTS{{alertname="{alert.name}"}}',
                "eval_time": f"{at}s",
                "exp_samples": []
                if state is None
                else [
                    {
                        "labels": "ALERTS"
                        + _selector(
                            {"alertname": alert.name, "alertstate": state} | labels | rule_labels(alert)
                        ),
                        "value": 1,
                    }
                ],
            }
            for at, state in sorted(states.items())
        ],
    }


def _values(spans: Sequence[Span]) -> str:
    """Promtool's notation: `v+0xN` is N + 1 samples of v, `_xN` is N missing ones."""
    return " ".join(
        f"_x{seconds}" if value is None else f"{plain_number(value)}+0x{seconds - 1}"
        for value, seconds in spans
        if seconds
    )


def _selector(labels: dict[str, str]) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
