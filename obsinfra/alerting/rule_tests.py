"""Unit tests for the generated rules, as promtool's own test files.

Each alert's series are played to the rules and its state is asked for at the instants that matter. Derived
from the table's meaning alone, not from the in-process evaluator, so that each can be held against the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, groupby, islice
from pathlib import Path
from typing import Any, Literal

import yaml

from obsinfra.alerting.prometheus_rules import firing_labels, write_rules
from obsinfra.alerting.wording import plain_number
from obsinfra.catalog.alerts import ALERTS, Alert
from obsinfra.catalog.conditions import (
    AgainstPast,
    AgainstPeers,
    Always,
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
    label_names,
    metric_of,
    where_of,
    window_of,
)
from obsinfra.catalog.metrics import Metric

Pace = Literal[1, 10]
"""Seconds between samples and between evaluations. Alerts that look at minutes are played at 10."""

QUIET = 10
HELD_ON = 20
MARGIN = 3
"""Samples; MARGIN is what a window's edge may cost, where Prometheus 2 and 3 differ on the sample at it."""

Values = list[float | None]
"""One value per sample; None: no such series then."""


@dataclass(slots=True)
class Scene:
    """Series played, and what is expected of one alert.

    Attributes:
        what: what the scene shows.
        series: selector → values.
        states: sample → `pending`, `firing`, None for neither, or `quiet` for not firing.
    """

    what: str
    series: dict[str, Values]
    states: dict[int, str | None] = field(default_factory=dict)


def pace_of(alert: Alert) -> Pace:
    """The pace an alert is tested at."""
    return 10 if max(window_of(alert.condition), alert.for_seconds) >= 300 else 1


def render_rule_tests(rules_file: str, alert: Alert) -> str:
    """A promtool test file for one alert.

    It fires beyond its threshold, not at it, not before `for` is over, not after a shorter crossing, and
    resolves.

    Args:
        rules_file: path of the rules, as promtool shall open it (relative to the test file).
        alert: a row of the table the rules were made from.
    """
    pace = pace_of(alert)
    tests = [_as_promtool_test(alert, scene, pace) for scene in scenes_of(alert)]
    document = {"rule_files": [rules_file], "evaluation_interval": f"{pace}s", "tests": tests}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)


def write_rule_tests(folder: Path, alerts: Sequence[Alert] = ALERTS) -> list[Path]:
    """For every alert a test file, and beside it the rules of this alert alone, so that promtool is quick.

    Args:
        folder: an existing folder.
        alerts: the table.

    Returns:
        The test files, in table order.
    """
    tests = []
    for alert in alerts:
        rules, test = folder / f"{alert.name}.rules.yml", folder / f"{alert.name}.test.yml"
        write_rules(rules, [alert])
        test.write_text(render_rule_tests(rules.name, alert))
        tests.append(test)
    return tests


def series_labels(alert: Alert) -> dict[str, str]:
    """Example labels of one firing, those of the rule apart."""
    where = dict(where_of(alert.condition))
    return {
        name: where[name][0] if name in where else f"some-{name}" for name in label_names(alert.condition)
    }


def scenes_of(alert: Alert) -> list[Scene]:
    """What is played to an alert, at its pace."""
    per = pace_of(alert)
    hold, window = math.ceil(alert.for_seconds / per), math.ceil(window_of(alert.condition) / per)
    match alert.condition:
        case Value(metric):
            return [_crossing(alert, _series(alert, metric), hold)]
        case Ratio(metric, over):
            # A power of two, so that the quotient is the limit and no neighbour of it.
            scene = _crossing(alert, _series(alert, metric), hold, 1024.0)
            return [_beside(scene, {_series(alert, over): [1024.0]})]
        case Multiple(metric, of, floor):
            series = _series(alert, metric)
            unit = 2 * floor / alert.limit or 1.0
            multiple = _crossing(alert, series, hold, unit, "against the multiple")
            scenes = [_beside(multiple, {_series(alert, of): [unit]})]
            if floor:
                least = _crossing(alert, series, hold, what="against the floor", limit=floor)
                scenes.append(_beside(least, {_series(alert, of): [floor / alert.limit / 8]}))
            return scenes
        case OverTime(metric):
            return [_over_time_scene(alert, _series(alert, metric), hold, window)]
        case AgainstPeers(metric):
            mine = _crossing(alert, _series(alert, metric), hold)
            labels = series_labels(alert)
            peers: dict[str, Values] = {
                _selected(metric, labels | {"rank": f"peer-{n}"}): [1.0] for n in range(3)
            }
            return [_beside(mine, peers)]
        case Increase(metric):
            if alert.comparator == "<":
                return _increase_below_scenes(alert, _series(alert, metric), hold, window)
            return _increase_scenes(alert, _series(alert, metric), hold, window)
        case Rise(metric):
            return _rise_scenes(alert, _series(alert, metric), hold, window)
        case Slope(metric, _, since_seconds):
            return _slope_scenes(
                alert, _series(alert, metric), hold, window, math.ceil(since_seconds / per), per
            )
        case Forecast(metric, _, ahead_seconds):
            return _forecast_scenes(alert, _series(alert, metric), hold, window, ahead_seconds / per)
        case Share(metric, whole):
            return _share_scenes(alert, metric, whole, hold, window)
        case RobustZ(metric, sample, _, _, slack):
            return _robust_scenes(alert, _series(alert, metric), _series(alert, sample), hold, window, slack)
        case AgainstPast(metric, recent_seconds):
            return _past_scenes(alert, _series(alert, metric), hold, window, math.ceil(recent_seconds / per))
        case Always():
            return [Scene("always", {}, {0: "firing", HELD_ON: "firing"})]


# ---- scenes ----------------------------------------------------------------------------------------------


def _crossing(
    alert: Alert,
    series: str,
    hold: int,
    unit: float = 1.0,
    what: str = "its value",
    limit: float | None = None,
) -> Scene:
    """At the limit, beyond it until after it fires, at it, beyond it for one evaluation too few, at it.

    Where the alert clears elsewhere: before the second crossing it goes on between the two, ends where it
    clears, and does not begin again between them.

    Args:
        unit: the value of the series at which the condition's number is 1.
        limit: the value of the series at which it crosses, where that is not the alert's limit.
    """
    clear = alert.clear_limit * unit if limit is None else limit
    limit = alert.limit * unit if limit is None else limit
    beyond = limit + _beyond(alert) * max(1.0, abs(limit)) * 0.05
    over = QUIET + hold + HELD_ON
    spans: list[tuple[float | None, int]] = [(limit, QUIET), (beyond, over - QUIET)]
    states: dict[int, str | None] = {QUIET - 1: None, QUIET + hold: "firing", over - 1: "firing"}
    if clear != limit:
        between = (limit + clear) / 2
        spans += [(limit, QUIET), (between, QUIET), (clear, QUIET), (between, QUIET)]
        states |= {over: "firing", over + 2 * QUIET - 1: "firing"}
        over += 2 * QUIET
        states |= {over + QUIET: None, over + 2 * QUIET - 1: None}
    again = over + (QUIET if clear == limit else 2 * QUIET)
    spans += [(limit, QUIET)] if clear == limit else []
    spans += [(beyond, hold), (limit, QUIET)]
    states[over] = None
    if hold:
        states |= {QUIET: "pending", QUIET + hold - 1: "pending"}
        states |= {again: "pending", again + hold - 1: "pending", again + hold: None}
    return Scene(what, {series: _spans(*spans)}, states)


def _beyond(alert: Alert) -> float:
    """The sign of the side on which the alert fires."""
    return 1.0 if alert.comparator == ">" else -1.0


def _over_time_scene(alert: Alert, series: str, hold: int, window: int) -> Scene:
    """Off the limit, beyond it for more than the window, off it again.

    What the first value beyond decides fires at once and lasts a window; what the first value off it decides
    is the other way round; an average is in between.
    """
    limit, step = alert.limit, _beyond(alert) * max(1.0, abs(alert.limit)) * 0.05
    begin = window + QUIET
    end = begin + window + hold + 2 * MARGIN
    values = _spans((limit - step, begin), (limit + step, end - begin), (limit - step, window + QUIET))
    states: dict[int, str | None] = {begin - 1: None, end - 1: "firing", end + window + MARGIN: None}
    which = alert.condition.which if isinstance(alert.condition, OverTime) else ""
    if which == ("highest" if alert.comparator == ">" else "lowest"):
        states |= {begin: "pending", begin + hold - 1: "pending"} if hold else {}
        states |= {begin + hold: "firing", end + max(0, window - MARGIN): "firing"}
    elif which != "average":
        states |= {end: None}
        states |= {begin + window - MARGIN: None} if window > MARGIN else {}
    elif window > 4 * MARGIN:
        states |= {begin + MARGIN: None, end + MARGIN: "firing"}
    return Scene("beyond the limit for more than the window", {series: values}, states)


def _increase_below_scenes(alert: Alert, series: str, hold: int, window: int) -> list[Scene]:
    """A counter that stands still, rises and stands still again; one that rises on and on; one restarted."""
    many = 2.0 * math.ceil(alert.limit) + 1
    rise = window + hold + QUIET
    still = _spans((0.0, rise), (many, 2 * window + hold))
    states: dict[int, str | None] = {
        window - 1: None,
        window + hold: "firing",
        rise - 1: "firing",
        rise: None,
    }
    if hold:
        states[window] = "pending"
    if window > MARGIN:
        states[rise + window - MARGIN] = None
    if window > MARGIN:
        states[rise + window + hold + MARGIN] = "firing"
    busy = _ramp(0.0, many, 2 * window + hold)
    restarted = _spans((many, window + QUIET), (0.0, window), (many, window))
    return [
        Scene("it stands still", {series: still}, states),
        Scene("it rises on and on", {series: busy}, {window: None, len(busy) - 1: None}),
        Scene("a rise after a restart", {series: restarted}, {2 * window + QUIET: None}),
    ]


def _increase_scenes(alert: Alert, series: str, hold: int, window: int) -> list[Scene]:
    """A rise from zero, a series born above zero, and a rise after a restart of the counter."""
    many, quiet = float(math.floor(alert.limit) + 1), QUIET
    rise = _spans((many, 2 * window))
    states = _from_when_to_when(quiet, quiet + window, hold)
    restart = 2 * window
    return [
        Scene("a rise from zero", {series: _spans((0.0, quiet)) + rise}, states),
        Scene("a series born above zero", {series: _spans((None, quiet)) + rise}, states),
        Scene(
            "a rise after a restart of the counter",
            {series: _spans((many + 2, restart), (0.0, quiet), (many, window))},
            {restart - 1: None, restart: None, restart + quiet - 1: None}
            | ({restart + quiet + hold: "firing"} if hold < window else {}),
        ),
    ]


def _rise_scenes(alert: Alert, series: str, hold: int, window: int) -> list[Scene]:
    before = 7.0  # what happened before anybody looked is nobody's news
    if alert.comparator == "<":
        values = _spans((before, hold + QUIET), (before + 1.1 * alert.limit, 2 * window + hold))
        risen = hold + QUIET
        below: dict[int, str | None] = {hold: "firing", risen - 1: "firing", risen: None}
        below |= {0: "pending"} if hold else {}
        below |= {risen + window - MARGIN: None} if window > MARGIN else {}
        below |= {risen + window + hold + MARGIN: "firing"} if window > MARGIN else {}
        return [Scene("a rise", {series: values}, below)]
    at = before + 0.9 * alert.limit
    over = before + 1.1 * alert.limit if alert.limit else before + 1
    values = _spans((before, QUIET), (at, QUIET), (over, 2 * window))
    begin = 2 * QUIET
    lowest_leaves = window + (QUIET if alert.limit > 0 else begin)
    return [Scene("a rise", {series: values}, _from_when_to_when(begin, lowest_leaves, hold, MARGIN))]


def _slope_scenes(alert: Alert, series: str, hold: int, window: int, since: int, per: float) -> list[Scene]:
    off = 0.1 * abs(alert.limit) or 0.1
    steep = (alert.limit + 3 * _beyond(alert) * off) * per
    flat = (alert.limit - _beyond(alert) * off) * per
    long = since + window + hold + MARGIN
    growing = _ramp(0.0, flat, since) + _ramp(flat * since, steep, window + hold + MARGIN)
    rest = _ramp(flat * since + steep * (window + hold + MARGIN), flat, window + MARGIN)
    return [
        Scene("growth off the limit", {series: _ramp(0.0, flat, long)}, {since: None, long - 1: None}),
        Scene(
            "growth beyond the limit",
            {series: growing + rest},
            {since + hold - 1: "quiet", len(growing) - 1: "firing", len(growing) + window + MARGIN - 1: None},
        ),
        Scene(
            "growth beyond the limit from birth",
            {series: _ramp(0.0, steep, since + hold + 2 * MARGIN)},
            {since - 1: None, since + hold - 1: "quiet", since + hold + MARGIN: "firing"},
        ),
    ]


def _forecast_scenes(alert: Alert, series: str, hold: int, window: int, ahead: float) -> list[Scene]:
    """A straight line whose forecast passes the limit at a known sample."""
    crossing = window + QUIET
    step = _beyond(alert) * max(1e6, abs(alert.limit) * 1e-3)
    start = alert.limit - step * (ahead + crossing)
    line = _ramp(start, step, crossing + hold + HELD_ON)
    states: dict[int, str | None] = {crossing - 1: None, crossing + hold + MARGIN: "firing"}
    if hold:
        states |= {crossing + hold - 1: "quiet"}
        states |= {crossing + MARGIN: "pending"} if hold > MARGIN else {}
    if ahead > len(line) - crossing:  # else it stands beyond the limit in the end
        states[len(line) + window + MARGIN] = None
    rest = _spans((line[-1], window + 2 * MARGIN))
    young = _ramp(alert.limit, step, window + MARGIN)
    return [
        Scene("a line", {series: line + rest}, states),
        Scene("a line too short to judge", {series: young}, {window - 1: None}),
    ]


def _share_scenes(alert: Alert, metric: Metric, whole: Metric, hold: int, window: int) -> list[Scene]:
    labels = series_labels(alert)
    where = dict(where_of(alert.condition))
    own = {name: where[name][0] if name in where else f"some-{name}" for name in metric.labels}
    part = _selected(metric, labels | own)
    rest = _selected(whole, labels | {name: f"other-{name}" for name in whole.labels})
    limit, of_itself = alert.limit, metric is whole
    less = 0.9 * limit
    more = limit + 0.2 * min(limit, 1 - limit) if 0 < limit < 1 else 1.2 * limit + 0.1 * (limit == 0)
    off, beyond = (
        (less, more) if alert.comparator == ">" else (1.0 if limit == 1 and of_itself else more, less)
    )
    long = window + MARGIN
    shares = [off] * long + [beyond] * (window + hold + MARGIN) + [off] * long
    counted: Values = []
    others: Values = []
    counter = other = 0.0
    for share in shares:
        counted.append(round(counter, 9))
        others.append(round(other, 9))
        counter += share
        other += (
            1.0 - share if of_itself else 1.0
        )  # the whole is the sum of its parts, where they are its parts
    begin, end = long, long + window + hold + MARGIN
    young = _ramp(0.0, beyond, window)
    young_others = _ramp(0.0, 1.0 - beyond if of_itself else 1.0, window)
    return [
        Scene(
            "its share",
            {part: counted, rest: others},
            {begin: None, begin + hold: "quiet", end - 1: "firing", end + window + MARGIN - 1: None},
        ),
        Scene("too young to judge", {part: young, rest: young_others}, {window - 1: None}),
    ]


def _robust_scenes(
    alert: Alert, series: str, sample: str, hold: int, window: int, slack: float
) -> list[Scene]:
    if series == sample:
        return _robust_of_itself_scenes(alert, series, hold, window, slack)
    noise = (1.8, 2.0, 2.2, 2.1, 1.9)  # quartiles 1.9 and 2.1 around 2.0
    sigma = 0.2 / 1.349 + slack * 2.0
    off = max(0.2 * abs(alert.limit), 0.2) * _beyond(alert)
    calm, spike = 2.0 + (alert.limit - off) * sigma, 2.0 + (alert.limit + off) * sigma
    young = window - 1
    begin = window + QUIET
    end = begin + hold + HELD_ON
    values = _spans((spike, young), (calm, begin - young), (spike, end - begin), (calm, QUIET))
    noisy: Values = list(islice(cycle(noise), len(values)))
    return [
        Scene(
            "a spike",
            {series: values, sample: noisy},
            {young - 1: None, begin - 1: None, begin + hold: "firing", end - 1: "firing", end: None},
        )
    ]


def _robust_of_itself_scenes(alert: Alert, series: str, hold: int, window: int, slack: float) -> list[Scene]:
    """A spike in its own window: too short to move median and quartiles, or it is not told apart."""
    spike = 2.0 + (alert.limit + _beyond(alert)) * 2.0 * slack
    begin, long = window + QUIET, hold + MARGIN
    states: dict[int, str | None] = {window - 2: None, begin - 1: None}
    if 8 * long < window:
        states |= {begin + hold: "firing", begin + long - 1: "firing", begin + long: None}
    return [Scene("a spike", {series: _spans((2.0, begin), (spike, long), (2.0, QUIET))}, states)]


def _past_scenes(alert: Alert, series: str, hold: int, window: int, recent: int) -> list[Scene]:
    old = recent + window + MARGIN
    jump = recent + hold + MARGIN
    above = alert.comparator == ">"
    other = 3.0 * alert.limit if above else alert.limit / 3.0
    bearable_one = max(0.9 * alert.limit, 1.0) if above else min(1.1 * alert.limit, 1.0)
    changed = _spans((1.0, old), (other, jump), (1.0, recent + MARGIN))
    bearable = _spans((1.0, old), (bearable_one, jump))
    young = _spans((1.0, recent), (other, window - MARGIN))
    states: dict[int, str | None] = {old - 1: None, old + hold - 1: "quiet"}
    past = 1.0 + (other - 1.0) * (hold + MARGIN + 1) / window  # of which the jump itself becomes a part
    if hold + MARGIN < window and alert.crossed(other / past * (0.9 if above else 1.1)):
        states |= {old + jump - 1: "firing", old + jump + recent + MARGIN - 1: None}
    return [
        Scene("a jump", {series: changed}, states),
        Scene("a bearable change", {series: bearable}, {old + jump - 1: None}),
        Scene("too young to judge", {series: young}, {len(young) - 1: None}),
    ]


# ---- values ----------------------------------------------------------------------------------------------


def _from_when_to_when(begin: int, end: int, hold: int, margin: int = 1) -> dict[int, str | None]:
    """Holds from `begin` until before `end`: which states show it."""
    states: dict[int, str | None] = {begin - 1: None, end: None}
    if hold:
        states[begin] = "pending"
    if begin + hold < end - margin:
        states |= {begin + hold: "firing", end - margin: "firing"}
    return states


def _ramp(start: float, step: float, samples: int) -> Values:
    return [start + step * n for n in range(samples)]


def _spans(*spans: tuple[float | None, int]) -> Values:
    """Values, each for so many samples."""
    return [value for value, samples in spans for _ in range(samples)]


def _beside(scene: Scene, constants: Mapping[str, Values]) -> Scene:
    """The scene with series that stay what they are all along."""
    longest = max(map(len, scene.series.values()))
    more = {series: values * longest for series, values in constants.items()}
    return Scene(scene.what, scene.series | more, scene.states)


def _series(alert: Alert, metric: Metric) -> str:
    return _selected(metric, series_labels(alert))


def _selected(metric: Metric, labels: Mapping[str, str]) -> str:
    return metric.sample_name + _selector({name: labels[name] for name in metric.label_names})


# ---- promtool's notation ---------------------------------------------------------------------------------


def _as_promtool_test(alert: Alert, scene: Scene, pace: Pace) -> dict[str, Any]:
    found = metric_of(alert.condition)
    labels = series_labels(alert)
    return {
        "name": f"{alert.name}: {scene.what}",
        "interval": f"{pace}s",
        "input_series": [
            {"series": series, "values": _values(values)} for series, values in scene.series.items()
        ]
        if found
        else [],
        "promql_expr_test": [
            {
                "expr": f'ALERTS{{alertname="{alert.name}"'
                + (', alertstate="firing"}' if state == "quiet" else "}"),
                "eval_time": f"{at * pace}s",
                "exp_samples": []
                if state in (None, "quiet")
                else [
                    {
                        "labels": "ALERTS"
                        + _selector(
                            {"alertname": alert.name, "alertstate": str(state)} | firing_labels(alert, labels)
                        ),
                        "value": 1,
                    }
                ],
            }
            for at, state in sorted(scene.states.items())
        ],
    }


def _values(values: Iterable[float | None]) -> str:
    """`v+0xN` is N + 1 samples of v, `_xN` is N missing ones."""
    out = []
    for value, same in groupby(values):
        samples = len(list(same))
        out.append(f"_x{samples}" if value is None else f"{plain_number(value)}+0x{samples - 1}")
    return " ".join(out)


def _selector(labels: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
