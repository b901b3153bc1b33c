"""The user's changes of what an alert looks at: metric, aggregation, comparator, window and the like.

`alert_changes` applies them before the values that are held against the result. What neither PromQL nor the
in-process evaluator could say, or what no series could ever show, is refused here. Knows the table, no files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from obsinfra.catalog import metrics
from obsinfra.catalog import stack_metrics as stack
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
    metric_of,
    where_of,
    window_of,
    with_window,
)
from obsinfra.catalog.metrics import RUN_LABELS, Metric
from obsinfra.catalog.setting_values import LONGEST_SECONDS, number, one_of, seconds
from obsinfra.catalog.units import UNITS, quantity_of
from obsinfra.errors import ConfigError

SHORTEST_TREND_SECONDS = 10.0
"""Of a window that a line or a quantile is drawn from: Prometheus reads a series each few seconds."""

MAX_VALUES = 20
_LABEL_VALUE = re.compile(r"[\w.:/+ -]{1,100}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Aggregation:
    """One way to make the number that a threshold is held against.

    Attributes:
        meaning: for people.
        kind: of metric that it can be made of: `gauge`, `counter`, or `any`.
        needs: fields that say how, besides the metric; those with a default in `optional`.
        optional: fields that may say more.
        least: `>` makes sense for thresholds from here on, `<` for those beyond it; None: for any.
    """

    meaning: str
    kind: str
    needs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    least: float | None = None


WINDOW = ("window_seconds",)
AGGREGATIONS: dict[str, Aggregation] = {
    "value": Aggregation("its value", "any"),
    "average": Aggregation("the average of its values within the window", "gauge", WINDOW),
    "highest": Aggregation("the highest of its values within the window", "gauge", WINDOW),
    "lowest": Aggregation("the lowest of its values within the window", "gauge", WINDOW),
    "increase": Aggregation("how far it rose within the window", "counter", WINDOW, least=0.0),
    "rise": Aggregation(
        "how far it stands above its lowest value within the window", "gauge", WINDOW, least=0.0
    ),
    "slope": Aggregation("its growth per second, on a line through the window", "gauge", WINDOW),
    "forecast": Aggregation(
        "its value in `ahead_seconds`, on a line through the window", "gauge", (*WINDOW, "ahead_seconds")
    ),
    "share": Aggregation(
        "a rank's increase of it within the window ÷ that of the counter `over`", "counter",
        (*WINDOW, "over"), least=0.0,
    ),
    "ratio": Aggregation("its value ÷ that of `over`", "any", ("over",)),
    "multiple": Aggregation(
        "its value, held against threshold × the value of `of`, or against `floor` if that is more", "any",
        ("of",), ("floor",), least=0.0,
    ),
    "robust_z": Aggregation(
        "robust standard deviations above the median of `sample` (default: of itself) within the window",
        "gauge", WINDOW, ("sample",), least=0.0,
    ),
    "against_past": Aggregation(
        "its average over the last `recent_seconds` ÷ that over the window before them", "gauge",
        (*WINDOW, "recent_seconds"), least=1.0,
    ),
    "against_peers": Aggregation("a rank's value ÷ the median over the ranks of its run", "gauge", least=1.0),
}  # fmt: skip
"""Name in `[alerts.<key>] aggregation` → what it is."""

_NAMES: dict[type, str] = {
    Value: "value", Increase: "increase", Rise: "rise", Slope: "slope", Forecast: "forecast", Share: "share",
    Ratio: "ratio", Multiple: "multiple", RobustZ: "robust_z", AgainstPast: "against_past",
    AgainstPeers: "against_peers",
}  # fmt: skip

_OF_VALUES = ("value", "average", "highest", "lowest")
_QUOTIENTS = ("ratio", "multiple", "against_past", "against_peers")

CONDITION_FIELDS = (
    "metric", "aggregation", "comparator", "where", "window_seconds", "ahead_seconds", "recent_seconds",
    "over", "of", "floor", "sample", "threshold_unit",
)  # fmt: skip
"""Fields of `[alerts.<key>]` that say what is looked at."""

_KNOWN: dict[str, Metric] = {
    **{metric.name: metric for metric in metrics.METRICS if metric.kind != "histogram"},
    **{
        metric.name: metric
        for metric in vars(stack).values()
        if isinstance(metric, Metric) and metric.name != "up"
    },
}
_UP = {"trainers": stack.TRAINER_UP, "hosts": stack.HOST_UP}
_JOBS = ("trainers", "hosts", "sidecar", "prometheus", "alertmanager")


def aggregation_of(condition: Condition) -> str:
    """The name of its way to make a number; `always` for the alert that always fires."""
    if isinstance(condition, OverTime):
        return condition.which
    return _NAMES.get(type(condition), "always")


def with_condition(alert: Alert, fields: Mapping[str, Any]) -> Alert:
    """The alert with another condition, and what people read of it and the threshold's unit to match.

    A clearing threshold of the table belongs to the table's condition and goes with it.

    Args:
        fields: those of `CONDITION_FIELDS` that the user set.

    Raises:
        ConfigError: a value that does not fit, alone or with the others; names it, and what would.
    """
    if not fields:
        return alert
    change = _Change(alert, fields)
    if isinstance(alert.condition, Always):
        field = next(iter(fields))
        no = "no window" if field == "window_seconds" else "no condition"
        raise change.wrong(field, f"{no} to change here: this alert always fires")
    comparator = change.read("comparator", alert.comparator, lambda value: one_of(value, (">", "<")))
    condition = change.condition()
    assert not isinstance(condition, Always)
    changed = replace(alert, condition=condition, comparator=comparator)
    if (condition, comparator) != (alert.condition, alert.comparator):
        changed = replace(changed, clear_threshold=None)
    changed = change.in_unit(changed)
    if not _means_the_same(changed, alert):
        description = f"{condition.metric.help} As set under [alerts.{alert.key}] in the settings."
        return replace(changed, summary=_summary(changed), description=description)
    if changed.threshold_unit != alert.threshold_unit:
        said, says = (f"{{threshold}} {one.threshold_unit}" for one in (alert, changed))
        summary = alert.summary.replace(said, says) if said in alert.summary else _summary(changed)
        return replace(changed, summary=summary)
    return changed


def check_threshold(alert: Alert, field: str) -> None:
    """See that the threshold is one that its number can be on both sides of.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(alert.condition, Always):
        return
    name = aggregation_of(alert.condition)
    least, above, limit = AGGREGATIONS[name].least, alert.comparator == ">", alert.limit
    if least is None:
        return
    fits = limit >= least if above else limit > least
    expected = f"a number of {least:g} or more" if above else f"a number above {least:g}"
    if name == "multiple":
        fits, expected = limit > 0, "a factor above 0"
    elif name == "robust_z" and not above:
        fits, expected = limit <= 0, "a number of 0 or less"
    elif name in ("against_past", "against_peers") and not above:
        fits, expected = 0 < limit <= 1, "a number above 0, at most 1"
    elif name == "share" and above and alert.condition.metric is alert.condition.whole:  # type: ignore[union-attr]
        fits, expected = 0 <= limit < 1, f"a number from 0 to less than {1 / alert.scale:g}"
    if not fits:
        raise ConfigError(
            f"{field} = {alert.threshold:g} with aggregation {name} and comparator {alert.comparator}",
            expected,
            f"correct it, or set another aggregation or comparator under [alerts.{alert.key}]",
        )


def find_metric(name: Any, where: Where = ()) -> Metric:
    """The metric of that name, with or without the `_total` that counters have on the wire.

    Args:
        where: tells which `up` is meant.

    Raises:
        ValueError: none such; says what would do.
    """
    found = str(name).removesuffix("_total") if isinstance(name, str) else ""
    if found == "up":
        jobs = dict(where).get("job", ())
        if len(jobs) != 1 or jobs[0] not in _JOBS:
            raise ValueError(f"where = {{ job = … }} beside it, one of {', '.join(_JOBS)}")
        return _UP.get(jobs[0], stack.SERVICE_UP)
    if found in metrics.BY_NAME and found not in _KNOWN:
        raise ValueError("a gauge or a counter; this one is a histogram, which has no one value")
    if found not in _KNOWN:
        near = _near(found)
        more = f" (perhaps {near})" if near else ""
        raise ValueError(f"a gauge or counter of docs/metrics.md{more}, or another that alerts look at")
    return _KNOWN[found]


def _near(name: str) -> str:
    """Names that somebody may have meant."""
    from difflib import get_close_matches

    known = [*_KNOWN, "up"]
    return ", ".join(
        get_close_matches(name, known, 3, 0.6) or get_close_matches(f"obsinfra_{name}", known, 3)
    )


class _Change:
    """What one table of settings makes of one alert's condition."""

    def __init__(self, alert: Alert, fields: Mapping[str, Any]) -> None:
        self._alert, self._fields = alert, fields
        self._before = alert.condition
        self._used: set[str] = {"metric", "aggregation", "comparator", "where", "threshold_unit"}

    def wrong(self, field: str, expected: str) -> ConfigError:
        key = self._alert.key
        shown = f" = {self._fields[field]}" if field in self._fields else ""
        return ConfigError(f"alert {key}.{field}{shown}", expected, f"correct it under [alerts.{key}]")

    def read(self, field: str, default: Any, check: Callable[[Any], Any]) -> Any:
        """The user's value, checked; else the default."""
        self._used.add(field)
        if field not in self._fields:
            return default
        try:
            return check(self._fields[field])
        except ValueError as error:
            raise self.wrong(field, str(error)) from None

    def condition(self) -> Condition:
        """The condition as changed."""
        before = self._before
        same = aggregation_of(before)
        name = self.read("aggregation", same, lambda value: one_of(value, tuple(AGGREGATIONS)))
        was = metric_of(before)
        assert was is not None
        where = self.read("where", None, _where)
        meant = where if where is not None else where_of(before)
        metric: Metric = self.read("metric", was, lambda value: find_metric(value, meant))
        if metric.name == "up":
            metric = self._up(meant)
        if where is None and metric is not was:
            meant = meant if metric.name == "up" else ()  # the table's labels are those of its metric
        self._check_where(metric, meant)
        row = AGGREGATIONS[name]
        if row.kind not in ("any", metric.kind):
            fitting = ", ".join(
                other for other, row in AGGREGATIONS.items() if row.kind in ("any", metric.kind)
            )
            field = "aggregation" if "aggregation" in self._fields else "metric"
            raise self.wrong(
                field, f"with the {metric.kind} {metric.sample_name}, an aggregation of {fitting}"
            )
        condition = self._made(name, metric, meant, name == same)
        for field in self._fields:
            if field not in self._used:
                having = [
                    other for other, row in AGGREGATIONS.items() if field in (*row.needs, *row.optional)
                ]
                missing = "window" if field == "window_seconds" else field
                present = ": this alert looks at the present" if field == "window_seconds" else ""
                raise self.wrong(
                    field, f"no {missing} here{present}; with one: aggregation {', '.join(having)}"
                )
        return condition

    def _up(self, where: Where) -> Metric:
        try:
            return find_metric("up", where)
        except ValueError as error:
            raise self.wrong("where", str(error)) from None

    def _made(self, name: str, metric: Metric, where: Where, same: bool) -> Condition:
        before, record = self._before, f"obsinfra:alert_{self._alert.key}"
        if name in ("value", "against_peers"):
            if name == "value":
                return Value(metric, where)
            if not set(RUN_LABELS) <= set(metric.label_names):
                raise self._not_of_ranks(metric, name)
            return self._recorded(AgainstPeers(metric, f"{record}:ratio_to_peers", where))
        if name == "ratio":
            return Ratio(metric, self._beside("over", metric, getattr(before, "over", None)), where)
        if name == "multiple":
            of = self._beside("of", metric, getattr(before, "of", None))
            floor = self.read("floor", before.floor if isinstance(before, Multiple) else 0.0, _not_negative)
            return Multiple(metric, of, floor, where)
        window = self._window(name)
        if name in _OF_VALUES:
            return OverTime(metric, name, window, where)  # type: ignore[arg-type]
        if name == "increase":
            return Increase(metric, window, where)
        if name == "rise":
            return Rise(metric, window, where)
        if name == "slope":
            age = before.since_seconds / before.window_seconds if isinstance(before, Slope) else 4 / 3
            return Slope(metric, window, window * age, where)
        if name == "forecast":
            ahead = self._seconds(
                "ahead_seconds", before.ahead_seconds if isinstance(before, Forecast) else None
            )
            return Forecast(metric, window, ahead, where)
        if name == "against_past":
            recent = self._seconds(
                "recent_seconds", before.recent_seconds if isinstance(before, AgainstPast) else None
            )
            if recent >= window:
                raise self.wrong("recent_seconds", f"less than the window of {window:g} s")
            return AgainstPast(metric, recent, window, where)
        if name == "robust_z":
            sample = before.sample if same and metric is before.metric else metric  # type: ignore[union-attr]
            sample = self._beside("sample", metric, sample)
            return self._recorded(RobustZ(metric, sample, window, record, where=where))
        whole = self._beside("over", metric, getattr(before, "whole", None), same_labels=False)
        if metric.source != "trainer":
            raise self._not_of_ranks(metric, name)
        if whole.kind != "counter" or whole.source != "trainer":
            raise self.wrong("over", "a counter of trainers")
        if whole is metric and not where:
            raise self.wrong("where", f"labels of the part, where the whole is {metric.sample_name} too")
        return self._recorded(Share(metric, whole, window, f"{record}:share", where))

    def _not_of_ranks(self, metric: Metric, name: str) -> ConfigError:
        field = "metric" if "metric" in self._fields else "aggregation"
        return self.wrong(
            field, f"with aggregation {name}, a metric of trainers: {metric.sample_name} has no rank"
        )

    def _recorded(self, condition: AgainstPeers | RobustZ | Share) -> Condition:
        """The condition with the name under which it is recorded: the table's, which dashboards ask for, as
        long as the same is recorded."""
        before = self._before
        if isinstance(before, (AgainstPeers, RobustZ, Share)):
            named = replace(condition, record=before.record)
            if _but_for_window(named, before) == before:
                return named
        return condition

    def _window(self, name: str) -> float:
        trend = name in ("slope", "forecast", "share", "robust_z", "against_past")
        shortest = SHORTEST_TREND_SECONDS if trend else 1.0
        return self._seconds("window_seconds", window_of(self._before) or None, shortest)

    def _seconds(self, field: str, default: float | None, shortest: float = 1.0) -> float:
        found = self.read(field, default, lambda value: seconds(value, shortest))
        if found is None:
            raise self.wrong(field, f"a number from {shortest:g} to {LONGEST_SECONDS:g} for this aggregation")
        return float(found)

    def _beside(
        self, field: str, metric: Metric, default: Metric | None, *, same_labels: bool = True
    ) -> Metric:
        """Another metric that is held against this one, series by series."""
        found: Metric | None = self.read(field, default, find_metric)
        if found is None:
            raise self.wrong(field, "the name of a metric for this aggregation")
        if same_labels and (
            set(found.label_names) != set(metric.label_names) or found.source != metric.source
        ):
            labels = ", ".join(metric.label_names) or "none"
            raise self.wrong(field, f"a metric with the labels of {metric.sample_name}: {labels}")
        if field == "sample" and found.kind != "gauge":
            raise self.wrong(field, "a gauge")
        if same_labels and field != "sample" and found is metric:
            raise self.wrong(field, f"another metric than {metric.sample_name} itself")
        return found

    def _check_where(self, metric: Metric, where: Where) -> None:
        own = tuple(
            name for name in metric.label_names if name not in RUN_LABELS or metric.source != "trainer"
        )
        for name, _ in where:
            if name not in own:
                expected = f"labels of {metric.sample_name}: {', '.join(own)}" if own else "none"
                more = "; an alert is for every run and rank" if name in RUN_LABELS else ""
                raise self.wrong("where", f"{expected}{more}")

    def in_unit(self, changed: Alert) -> Alert:
        """The alert with the threshold in a unit of what is looked at now."""
        before, now = quantity_of(self._before), quantity_of(changed.condition)
        units = UNITS[now]
        base = (
            "×" if now == "ratio" and aggregation_of(changed.condition) in _QUOTIENTS else next(iter(units))
        )
        unit = changed.threshold_unit
        if before != now or (unit not in units and changed.condition != self._before):
            changed = replace(changed, threshold_unit=base, scale=1.0)
        if "threshold_unit" in self._fields:
            unit = self.read("threshold_unit", base, lambda value: one_of(value, tuple(units)))
            changed = replace(changed, threshold_unit=unit, scale=units[unit])
        return changed


def needs_threshold(before: Alert, changed: Alert) -> bool:
    """Whether the number looked at is another one, of which the table's threshold says nothing."""

    def kind(alert: Alert) -> tuple[Any, ...]:
        name = aggregation_of(alert.condition)
        return alert.scale, quantity_of(alert.condition), "value" if name in _OF_VALUES else name

    return kind(before) != kind(changed)


def _but_for_window(condition: Any, like: Condition) -> Condition:
    """The condition over the window of another one."""
    window = window_of(like)
    return with_window(condition, window) if window and window_of(condition) else condition


def _means_the_same(one: Alert, other: Alert) -> bool:
    """Whether what people read about one is true of the other: all but the window is the same."""
    same = _but_for_window(one.condition, other.condition)
    return (same, one.comparator) == (other.condition, other.comparator)


def _where(value: Any) -> Where:
    expected = "a table of label = value, or label = [values]"
    if not isinstance(value, Mapping):
        raise ValueError(expected)
    found = []
    for name, given in value.items():
        values = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        if not 1 <= len(values) <= MAX_VALUES or not all(
            isinstance(one, str) and _LABEL_VALUE.fullmatch(one) for one in values
        ):
            raise ValueError(f"{expected}; values of letters, digits, space and .:/+_-, at most {MAX_VALUES}")
        found.append((str(name), values))
    return tuple(found)


def _not_negative(value: Any) -> float:
    found = number(value)
    if found < 0:
        raise ValueError("a number of 0 or more")
    return found


def _summary(alert: Alert) -> str:
    """One line about what is looked at, for an alert of which the table's line is no longer true."""
    condition = alert.condition
    assert not isinstance(condition, Always)
    labels = ", ".join(f"{name} {' or '.join(values)}" for name, values in condition.where)
    looked_at = condition.metric.sample_name + (f" ({labels})" if labels else "")
    if "device" in condition.metric.label_names:
        looked_at += " of {{ $labels.device }}"
    name, window = aggregation_of(condition), window_of(condition)
    if name != "value":
        looked_at += f", {name.replace('_', ' ')}" + (f" over {window:g} s" if window else "")
    limit = f"{{threshold}} {alert.threshold_unit}".rstrip()
    if isinstance(condition, Multiple):
        limit = f"{{threshold}} × {condition.of.sample_name}"
    return f"{looked_at}: {'above' if alert.comparator == '>' else 'below'} {limit}"
