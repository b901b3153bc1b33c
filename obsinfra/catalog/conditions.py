"""The kinds of condition an alert can have, as data.

The alert table is written in them; `alerting.promql` turns them into PromQL, `alerting.judges` evaluates
them in-process and `alerting.rule_tests` plays series to them. Knows metrics, and nothing of thresholds: a
condition says which number is looked at, the alert what it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from obsinfra.catalog.metrics import RUN_LABELS, Metric

Where = tuple[tuple[str, tuple[str, ...]], ...]
"""Label name → values that are meant, all others left out; empty means every series."""


@dataclass(frozen=True, slots=True)
class Value:
    """The metric's value."""

    metric: Metric
    where: Where = ()


@dataclass(frozen=True, slots=True)
class OverTime:
    """Average, highest or lowest of the metric's values within the window, as long as it has one now."""

    metric: Metric
    which: Literal["average", "highest", "lowest"]
    window_seconds: float
    where: Where = ()


@dataclass(frozen=True, slots=True)
class Increase:
    """How far a counter rose within the window; a restart counts from zero, a first sight counts in full.

    Held against a lower bound, it is judged once the counter is as old as the window.
    """

    metric: Metric
    window_seconds: float
    where: Where = ()


@dataclass(frozen=True, slots=True)
class Rise:
    """How far a gauge stands above its lowest value within the window: a count that others keep for us."""

    metric: Metric
    window_seconds: float
    where: Where = ()


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth per second: the least-squares slope over the window.

    Attributes:
        since_seconds: how long the series must have existed, so that a start is no trend.
    """

    metric: Metric
    window_seconds: float
    since_seconds: float
    where: Where = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """The value expected `ahead_seconds` from now, on the least-squares line through the window."""

    metric: Metric
    window_seconds: float
    ahead_seconds: float
    where: Where = ()


@dataclass(frozen=True, slots=True)
class Share:
    """Increase of the counted part ÷ increase of the whole within the window, summed over further labels.

    Attributes:
        metric: counter of the part, restricted by `where`.
        whole: counter of the whole, all of its series.
        record: name of the recording rule that holds the share.
    """

    metric: Metric
    whole: Metric
    window_seconds: float
    record: str
    where: Where = ()


@dataclass(frozen=True, slots=True)
class Ratio:
    """One metric's value ÷ another's with the same labels."""

    metric: Metric
    over: Metric
    where: Where = ()


@dataclass(frozen=True, slots=True)
class Multiple:
    """The metric's value, held against a multiple of another's, but against `floor` at least.

    The threshold is the factor: the alert holds while `metric > max(threshold × of, floor)`.
    """

    metric: Metric
    of: Metric
    floor: float
    where: Where = ()


@dataclass(frozen=True, slots=True)
class RobustZ:
    """How many robust standard deviations the metric lies above the median of the window.

    `(metric − median) ÷ (spread + slack × |median|)`, where spread is the interquartile range ÷ 1.349, which
    is the standard deviation of normal noise and blind to a few outliers; the slack keeps a loss that hardly
    moves at all from raising an alarm over nothing.

    Attributes:
        metric: what is judged.
        sample: the metric whose window gives median and quartiles.
        record: prefix of the recording rules `<record>:median` and `<record>:spread`.
    """

    metric: Metric
    sample: Metric
    window_seconds: float
    record: str
    slack: float = 0.02
    where: Where = ()


@dataclass(frozen=True, slots=True)
class AgainstPast:
    """Average over the last `recent_seconds` ÷ average over the window before them."""

    metric: Metric
    recent_seconds: float
    window_seconds: float
    where: Where = ()


@dataclass(frozen=True, slots=True)
class AgainstPeers:
    """A rank's value ÷ the median over the ranks of its run. No process sees its peers: Prometheus only."""

    metric: Metric
    record: str
    where: Where = ()


@dataclass(frozen=True, slots=True)
class Always:
    """Holds always: its silence says that the way from Prometheus to people is broken. Prometheus only."""


Condition = (
    Value
    | OverTime
    | Increase
    | Rise
    | Slope
    | Forecast
    | Share
    | Ratio
    | Multiple
    | RobustZ
    | AgainstPast
    | AgainstPeers
    | Always
)


def window_of(condition: Condition) -> float:
    """Seconds the condition looks back; 0 when it looks at the present alone."""
    return getattr(condition, "window_seconds", 0.0)


def with_window(condition: Condition, seconds: float) -> Condition:
    """The same condition over another window; the age it asks of a series grows or shrinks with it.

    Raises:
        ValueError: it has no window, or `seconds` is not positive.
    """
    before = window_of(condition)
    if not before:
        raise ValueError("a condition without a window")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"a window of {seconds} s")
    if isinstance(condition, Slope):
        since = condition.since_seconds * seconds / before
        return replace(condition, window_seconds=seconds, since_seconds=since)
    assert not isinstance(condition, (Value, Ratio, Multiple, AgainstPeers, Always))
    return replace(condition, window_seconds=seconds)


def clears_apart(condition: Condition) -> bool:
    """Whether an alert on it may have a clearing threshold of its own: what looks at the present alone, held
    against one number. A window damps by itself; a `Multiple` is held against a number that moves."""
    return isinstance(condition, (Value, Ratio, AgainstPeers))


def metric_of(condition: Condition) -> Metric | None:
    """The metric judged; None for `Always`."""
    return None if isinstance(condition, Always) else condition.metric


def metrics_of(condition: Condition) -> tuple[Metric, ...]:
    """Every metric the condition reads."""
    found = (getattr(condition, name, None) for name in ("metric", "whole", "over", "of", "sample"))
    return tuple(metric for metric in found if metric is not None)


def where_of(condition: Condition) -> Where:
    """The label values that are meant."""
    return () if isinstance(condition, Always) else condition.where


def label_names(condition: Condition) -> tuple[str, ...]:
    """Labels one firing carries, those of the rule apart."""
    metric = metric_of(condition)
    if metric is None:
        return ()
    return RUN_LABELS if isinstance(condition, Share) else metric.label_names


def in_process(condition: Condition) -> bool:
    """Whether a trainer can judge it by what it exports itself."""
    metric = metric_of(condition)
    return metric is not None and metric.source == "trainer" and not isinstance(condition, AgainstPeers)
