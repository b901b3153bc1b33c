"""Conditions as PromQL: the expression of an alert, and the recording rules it and the dashboards share.

Called by the generator of the rules. Knows nothing of files or of what an alert is for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from obsinfra.alerting.wording import plain_number
from obsinfra.catalog.alerts import Alert
from obsinfra.catalog.conditions import (
    AgainstPast,
    AgainstPeers,
    Always,
    Condition,
    Forecast,
    Increase,
    Multiple,
    OverTime,
    Ratio,
    Rise,
    RobustZ,
    Share,
    Slope,
    Value,
    Where,
    label_names,
)
from obsinfra.catalog.metrics import RUN_LABELS, Metric

BY_RANK = f"({', '.join((*RUN_LABELS, 'host'))})"
"""What makes a rank, and the host that `/sd` says it is on: HostDown holds back alerts by that label."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording rule: the series `name` holds the value of `expression`."""

    name: str
    expression: str


def duration(seconds: float) -> str:
    """Seconds as a Prometheus duration, to the millisecond: `60s`, `1500ms`."""
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


def selector(metric: Metric, where: Where = ()) -> str:
    """The series meant, as `name{label=~"a|b"}`. Values hold nothing that a string of PromQL escapes."""
    if not where:
        return metric.sample_name
    matchers = (
        f'{name}="{values[0]}"' if len(values) == 1 else f'{name}=~"{"|".join(map(_literal, values))}"'
        for name, values in where
    )
    return f"{metric.sample_name}{{{', '.join(matchers)}}}"


def _literal(value: str) -> str:
    """A regular expression that matches this value alone."""
    return re.sub(r"[.+*?()|\[\]{}^$]", r"[\g<0>]", value)


def recordings(condition: Condition) -> tuple[Recording, ...]:
    """What is recorded before the condition is judged."""
    match condition:
        case Share(metric, whole, window_seconds, record, where):
            window = duration(window_seconds)
            part = f"sum by {BY_RANK} (increase({selector(metric, where)}[{window}]))"
            return (
                Recording(record, f"{part}\n/ sum by {BY_RANK} (increase({whole.sample_name}[{window}]))"),
            )
        case RobustZ(_, sample, window_seconds, record, _, where):
            series = f"{selector(sample, where)}[{duration(window_seconds)}]"
            return (
                Recording(f"{record}:median", f"quantile_over_time(0.5, {series})"),
                Recording(
                    f"{record}:spread",
                    f"(quantile_over_time(0.75, {series}) - quantile_over_time(0.25, {series})) / 1.349",
                ),
            )
        case AgainstPeers(metric, record, where):
            series = selector(metric, where)
            return (
                Recording(
                    record,
                    f"{series}\n/ on (run, model) group_left quantile by (run, model) (0.5, {series})",
                ),
            )
        case _:
            return ()


def expression(alert: Alert) -> str:
    """The whole condition, threshold included.

    Where the alert clears at another threshold, what fires already goes on while it is beyond that one:
    `ALERTS` holds what fired at the evaluation before. A Prometheus that was away for less than five minutes
    still finds it.
    """
    condition = _condition(alert, alert.limit)
    if alert.clears_at is None:
        return condition
    added = ", ".join(("alertname", "alertstate", *rule_labels(alert)))
    fires = f'ALERTS{{alertname="{alert.name}", alertstate="firing"}}'
    return f"{condition}\nor {_condition(alert, alert.clear_limit)}\nand ignoring ({added}) {fires}"


def rule_labels(alert: Alert) -> dict[str, str]:
    """The labels of the rule: they go on top of its series' own; an empty one takes that away.

    The label `action` asks for an action, of the sidecar and in what people read. A series that has one of
    its own, because it counts commands, asks for none: its label is called `command` in the alert.
    """
    labels: dict[str, str] = {"severity": alert.severity, "scope": alert.scope}
    if "action" in label_names(alert.condition):
        labels |= {"command": "{{ $labels.action }}", "action": ""}
    if alert.action is not None:
        labels["action"] = alert.action.name
    return labels


def _condition(alert: Alert, limit: float) -> str:
    beyond = f"{alert.comparator} {plain_number(limit)}"
    match alert.condition:
        case Value(metric, where):
            return f"{selector(metric, where)} {beyond}"
        case OverTime(metric, which, window_seconds, where):
            series = selector(metric, where)
            return f"{_OVER_TIME[which]}({series}[{duration(window_seconds)}]) {beyond}\nand {series}"
        case Increase(metric, window_seconds, where):
            series, window = selector(metric, where), duration(window_seconds)
            if alert.comparator == ">":
                return _increase(series, window, beyond)
            return _increase_below(series, window, plain_number(limit))
        case Rise(metric, window_seconds, where):
            series = selector(metric, where)
            return f"{series} - min_over_time({series}[{duration(window_seconds)}]) {beyond}"
        case Slope(metric, window_seconds, since_seconds, where):
            series = selector(metric, where)
            return f"deriv({series}[{duration(window_seconds)}]) {beyond}\n" + _since(series, since_seconds)
        case Forecast(metric, window_seconds, ahead_seconds, where):
            series = selector(metric, where)
            line = f"predict_linear({series}[{duration(window_seconds)}], {plain_number(ahead_seconds)})"
            return f"{line} {beyond}\n" + _since(series, window_seconds)
        case Share(_, whole, window_seconds, record, _):
            return f"{record} {beyond}\n" + _since(whole.sample_name, window_seconds, f"sum by {BY_RANK} ")
        case Ratio(metric, over, where):
            return f"{selector(metric, where)} / {over.sample_name} {beyond}"
        case Multiple(metric, of, floor, where):
            least = f"clamp_min({plain_number(limit)} * {of.sample_name}, {plain_number(floor)})"
            return f"{selector(metric, where)} {alert.comparator} {least}"
        case RobustZ(metric, sample, window_seconds, record, slack, where):
            series, allowed = selector(metric, where), plain_number(slack)
            return (
                f"({series} - {record}:median)\n"
                f"/ ({record}:spread + {allowed} * abs({record}:median)) {beyond}\n"
                + _since(sample.sample_name, window_seconds)
            )
        case AgainstPast(metric, recent_seconds, window_seconds, where):
            series, recent = selector(metric, where), duration(recent_seconds)
            return (
                f"avg_over_time({series}[{recent}])\n"
                f"/ avg_over_time({series}[{duration(window_seconds)}] offset {recent}) {beyond}\n"
                + _since(series, recent_seconds + window_seconds)
            )
        case AgainstPeers(_, record, _):
            return f"{record} {beyond}"
        case Always():
            return "vector(1)"


_OVER_TIME = {"average": "avg_over_time", "highest": "max_over_time", "lowest": "min_over_time"}


def _since(series: str, seconds: float, aggregated: str = "") -> str:
    """The guard that the series is as old as what is said of it, so that a start is no trend."""
    return (
        f"and {aggregated}({series} offset {duration(seconds)})"
        if aggregated
        else (f"and {series} offset {duration(seconds)}")
    )


def _increase(series: str, window: str, beyond: str) -> str:
    """An increase has three ways to be seen.

    `increase` needs two samples in its window and is blind to what came before the first; so the value is
    also compared with the one a window ago, and a series that did not exist then, or restarted since, counts
    in full, because every counter begins at zero with its process. Thus an event is seen at the first
    evaluation after the scrape that carries it, even when that scrape is the very first. `increase`
    extrapolates to the window's edges: exact for a limit of 0, a few percent high for others.
    """
    ways = (
        f"increase({series}[{window}])",
        f"({series} - {series} offset {window})",
        f"({series} unless {series} >= {series} offset {window})",
    )
    return "\nor ".join(f"{way} {beyond}" for way in ways)


def _increase_below(series: str, window: str, limit: str) -> str:
    """None of the three ways is as much as the limit, and the series is there now and was a window ago.

    Younger counters have had no time to rise; one that is gone is missed by other alerts.
    """
    return (
        f"({series} - {series} offset {window}) < {limit}\n"
        f"unless increase({series}[{window}]) >= {limit}\n"
        f"unless ({series} unless {series} >= {series} offset {window}) >= {limit}"
    )
