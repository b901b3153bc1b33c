"""Conditions judged in the trainer's own process: the same numbers as the PromQL in `promql`.

One judge for each condition keeps the history that it needs of each series. Called by the evaluator, once a
round; knows neither thresholds' waiting time nor who hears of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from obsinfra.catalog.alerts import Alert
from obsinfra.catalog.conditions import (
    AgainstPast,
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
)
from obsinfra.catalog.metrics import Metric

LabelKey = tuple[tuple[str, str], ...]
Series = Mapping[str, Sequence[tuple[LabelKey, Mapping[str, str], float]]]
"""Sample name → what is present of it now: sorted labels, labels, value."""

Judged = tuple[LabelKey, float, bool]
"""Labels of a series, the number looked at, and whether it is beyond the threshold."""

POINTS = 240
"""Points kept of a window that trends are drawn through: enough for a line, and cheap to go through."""


class Judge(Protocol):
    """Judges one alert."""

    def judge(self, now: float, series: Series) -> Iterator[Judged]:
        """Every series of the condition for which there is a number now."""
        ...


def create_judge(alert: Alert) -> Judge:
    """The judge of an alert's condition.

    Raises:
        ValueError: no process can judge it alone (`alert.in_process` is False).
    """
    if not alert.in_process:
        raise ValueError(f"{alert.name} needs Prometheus")
    match alert.condition:
        case Value(metric, where):
            return _ValueJudge(alert, metric, where)
        case Ratio(metric, over, where):
            return _RatioJudge(alert, metric, over, where)
        case Multiple(metric, of, floor, where):
            return _MultipleJudge(alert, metric, of, floor, where)
        case OverTime() as condition:
            return _OverTimeJudge(alert, condition)
        case Increase(metric, window_seconds, where):
            return _IncreaseJudge(alert, metric, window_seconds, where)
        case Rise(metric, window_seconds, where):
            return _TrendJudge(alert, metric, where, window_seconds, 0.0, _rise_above_lowest)
        case Slope(metric, window_seconds, since_seconds, where):
            return _TrendJudge(alert, metric, where, window_seconds, since_seconds, _slope)
        case Forecast(metric, window_seconds, ahead_seconds, where):

            def expected(now: float, points: Points) -> float | None:
                return _forecast(now, points, ahead_seconds)

            return _TrendJudge(alert, metric, where, window_seconds, window_seconds, expected)
        case AgainstPast(metric, recent_seconds, window_seconds, where):
            whole = recent_seconds + window_seconds

            def against_past(now: float, points: Points) -> float | None:
                return _against_past(now, points, recent_seconds)

            return _TrendJudge(alert, metric, where, whole, whole, against_past)
        case RobustZ() as condition:
            return _RobustZJudge(alert, condition)
        case Share() as condition:
            return _ShareJudge(alert, condition)
        case _:
            raise ValueError(f"{alert.name} needs Prometheus")


def _present(
    series: Series, metric: Metric, where: Where
) -> Iterable[tuple[LabelKey, Mapping[str, str], float]]:
    found = series.get(metric.sample_name, ())
    if not where:
        return found
    return [one for one in found if all(one[1].get(name) in values for name, values in where)]


# ---- the present alone -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _ValueJudge:
    alert: Alert
    metric: Metric
    where: Where

    def judge(self, now: float, series: Series) -> Iterator[Judged]:
        for key, _, value in _present(series, self.metric, self.where):
            yield key, value, self.alert.crossed(value)


@dataclass(slots=True)
class _RatioJudge:
    alert: Alert
    metric: Metric
    over: Metric
    where: Where

    def judge(self, now: float, series: Series) -> Iterator[Judged]:
        below = {key: value for key, _, value in _present(series, self.over, ())}
        for key, _, value in _present(series, self.metric, self.where):
            if key in below:
                ratio = _divided(value, below[key])
                yield key, ratio, self.alert.crossed(ratio)


@dataclass(slots=True)
class _MultipleJudge:
    alert: Alert
    metric: Metric
    of: Metric
    floor: float
    where: Where

    def judge(self, now: float, series: Series) -> Iterator[Judged]:
        unit = {key: value for key, _, value in _present(series, self.of, ())}
        for key, _, value in _present(series, self.metric, self.where):
            if key in unit:
                limit = max(self.alert.limit * unit[key], self.floor)
                yield key, value, value > limit if self.alert.comparator == ">" else value < limit


# ---- counters --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _IncreaseJudge:
    alert: Alert
    metric: Metric
    window_seconds: float
    where: Where
    histories: dict[LabelKey, CounterHistory] = field(default_factory=dict)

    def judge(self, now: float, series: Series) -> Iterator[Judged]:
        present = set()
        for key, _, value in _present(series, self.metric, self.where):
            present.add(key)
            history = self.histories.get(key)
            if history is None:
                history = self.histories[key] = CounterHistory(self.window_seconds)
            rise = history.add(now, value)
            old_enough = self.alert.comparator == ">" or history.reaches_back(now)
            yield key, rise, old_enough and self.alert.crossed(rise)
        for key in self.histories.keys() - present:
            gone = self.histories[key].absent(now)
            if gone is None:
                del self.histories[key]
            elif self.alert.comparator == ">":
                yield key, gone, self.alert.crossed(gone)


@dataclass(slots=True)
class CounterHistory:
    """Readings of one counter series, and its increase over the last `seconds`.

    Counters of this package begin at zero with their process, so a series first seen above zero has risen by
    all of its value: what happened before the first reading is not lost. The generated rules say the same.
    """

    seconds: float
    points: deque[tuple[float, float | None]] = field(default_factory=deque)  # None: the series was absent

    def add(self, now: float, value: float) -> float:
        """Take in a reading and return the increase; a fall of the counter is a restart from zero."""
        self._note(now, value)
        start = now - self.seconds
        before = self._forget_before(start)
        window = [point for at, point in self.points if at >= start and point is not None]
        # The readings within the window miss what happened just before the first of them, or during a stall
        # longer than the window: hence also against the value a window ago.
        since_then = value if before is None or value < before else value - before
        return max(_risen(window), since_then)

    def absent(self, now: float) -> float | None:
        """Note that the series is gone; return what it rose within the window, None once nothing is left.

        An event followed by the end of its process has happened all the same, and is held for its window.
        """
        self._note(now, None)
        self._forget_before(now - self.seconds)
        window = [point for at, point in self.points if at >= now - self.seconds and point is not None]
        return _risen(window) if window else None

    def reaches_back(self, now: float) -> bool:
        """Whether the series was there a window ago; after `add`."""
        at, value = self.points[0]
        return at <= now - self.seconds and value is not None

    def _note(self, now: float, value: float | None) -> None:
        # Of equal readings the first and the last say everything, and most counters stand still.
        if len(self.points) > 1 and self.points[-1][1] == value == self.points[-2][1]:
            self.points.pop()
        self.points.append((now, value))

    def _forget_before(self, start: float) -> float | None:
        """Drop all points that end before `start` but the last, and return that one's value."""
        while len(self.points) > 1 and self.points[1][0] <= start:
            self.points.popleft()
        at, value = self.points[0]
        return value if at <= start else None


def _risen(values: Sequence[float]) -> float:
    return float(sum(later - earlier if later >= earlier else later for earlier, later in pairwise(values)))


class _ShareJudge:
    """Sums over the whole and its part, of all series of this process."""

    def __init__(self, alert: Alert, condition: Share) -> None:
        self._alert, self._condition = alert, condition
        self._points: Points = deque()
        self._parts: deque[float] = deque()
        self._rising: dict[tuple[str, LabelKey], tuple[float, float]] = {}  # last value, risen so far

    def judge(self, now: float, series: Series) -> Iterator[Judged]:
        condition = self._condition
        whole = self._total(series, condition.whole, ())
        if whole is None:
            return
        counted = self._total(series, condition.metric, condition.where)
        part = counted or 0.0
        points, parts, window = self._points, self._parts, condition.window_seconds
        if not points or now - points[-1][0] >= window / POINTS:
            points.append((now, whole))
            parts.append(part)
        while len(points) > 1 and points[1][0] <= now - window:
            points.popleft()
            parts.popleft()
        if counted is None or points[0][0] > now - window or whole <= points[0][1]:
            return
        share = (part - parts[0]) / (whole - points[0][1])
        yield (), share, self._alert.crossed(share)

    def _total(self, series: Series, metric: Metric, where: Where) -> float | None:
        """Sum of what all series have risen by since they were first seen; None without any."""
        total, found = 0.0, False
        for key, _, value in _present(series, metric, where):
            last, risen = self._rising.get((metric.name, key), (value, 0.0))
            risen += value - last if value >= last else value
            self._rising[metric.name, key] = value, risen
            total += risen
            found = True
        return total if found else None


# ---- trends ----------------------------------------------------------------------------------------------

Points = deque[tuple[float, float]]
"""When, and what was read."""


class _Windows:
    """The points of each series of a metric over the last `seconds`, and one older where there is one."""

    def __init__(self, metric: Metric, where: Where, seconds: float) -> None:
        self._metric, self._where, self._seconds = metric, where, seconds
        self._points: dict[LabelKey, Points] = {}

    def take(self, now: float, series: Series) -> Iterator[tuple[LabelKey, float, Points]]:
        """Add what is present; of each present series its value now and its points."""
        for key, _, value in _present(series, self._metric, self._where):
            points = self._points.setdefault(key, deque())
            if not points or now - points[-1][0] >= self._seconds / POINTS:
                points.append((now, value))
            while len(points) > 1 and points[1][0] <= now - self._seconds:
                points.popleft()
            yield key, value, points
        for key in [k for k, points in self._points.items() if points[-1][0] <= now - self._seconds]:
            del self._points[key]  # nothing of it is left within the window


class _OverTimeJudge:
    """Average, highest or lowest value within the window, of series that are present."""

    def __init__(self, alert: Alert, condition: OverTime) -> None:
        self._alert, self._condition = alert, condition
        self._windows = _Windows(condition.metric, condition.where, condition.window_seconds)
        self._extremes: dict[LabelKey, Points] = {}

    def judge(self, now: float, series: Series) -> Iterator[Judged]:
        condition = self._condition
        start = now - condition.window_seconds
        if condition.which == "average":
            for key, value, points in self._windows.take(now, series):
                within = [reading for at, reading in points if at > start]
                if points[-1][0] != now:
                    within.append(value)  # the present counts, also where it is not kept
                average = sum(within) / len(within)
                yield key, average, self._alert.crossed(average)
            return
        for key, _, value in _present(series, condition.metric, condition.where):
            extreme = self._extreme(self._extremes.setdefault(key, deque()), now, start, value)
            yield key, extreme, self._alert.crossed(extreme)
        for key in [key for key, points in self._extremes.items() if points[-1][0] <= start]:
            del self._extremes[key]

    def _extreme(self, points: Points, now: float, start: float, value: float) -> float:
        """The highest, or lowest, value after `start`, `value` being that of now.

        `points` holds those that none after them outdoes, the present one last; so no short peak is missed.
        Where they come closer than a window / `POINTS`, a lesser one is remembered no longer than that.
        """
        sign = 1.0 if self._condition.which == "highest" else -1.0
        number = not math.isnan(value)
        if not number:
            value = -sign * math.inf  # as PromQL, which passes over it unless there is nothing else
        while points and sign * points[-1][1] <= sign * value:
            points.pop()
        if len(points) > 1 and now - points[-2][0] < self._condition.window_seconds / POINTS:
            points.pop()
        points.append((now, value))
        while points[0][0] <= start:
            points.popleft()
        return points[0][1] if number or len(points) > 1 else math.nan


class _TrendJudge:
    """A function of the points within the window, for series that are old enough."""

    def __init__(
        self,
        alert: Alert,
        metric: Metric,
        where: Where,
        window_seconds: float,
        since_seconds: float,
        number: Callable[[float, Points], float | None],
    ) -> None:
        self._alert = alert
        self._window, self._since = window_seconds, since_seconds
        self._windows = _Windows(metric, where, max(window_seconds, since_seconds))
        self._number = number

    def judge(self, now: float, series: Series) -> Iterator[Judged]:
        for key, value, points in self._windows.take(now, series):
            if self._since and points[0][0] > now - self._since:
                continue
            within = deque(point for point in points if point[0] > now - self._window)
            if not within or within[-1][0] != now:
                within.append((now, value))  # the present counts, also where it is not kept
            number = self._number(now, within)
            if number is not None:
                yield key, number, self._alert.crossed(number)


def _rise_above_lowest(now: float, points: Points) -> float:
    return points[-1][1] - min(value for _, value in points)


def _line(now: float, points: Points) -> tuple[float, float] | None:
    """Value at `now` and slope per second of the least-squares line; None through fewer than two points."""
    if len(points) < 2:
        return None
    mean_at = sum(at - now for at, _ in points) / len(points)
    mean = sum(value for _, value in points) / len(points)
    spread = sum((at - now - mean_at) ** 2 for at, _ in points)
    if spread == 0.0:
        return None
    slope = sum((at - now - mean_at) * (value - mean) for at, value in points) / spread
    return mean - slope * mean_at, slope


def _slope(now: float, points: Points) -> float | None:
    line = _line(now, points)
    return None if line is None else line[1]


def _forecast(now: float, points: Points, ahead_seconds: float) -> float | None:
    line = _line(now, points)
    return None if line is None else line[0] + line[1] * ahead_seconds


def _against_past(now: float, points: Points, recent_seconds: float) -> float | None:
    recent = [value for at, value in points if at > now - recent_seconds]
    past = [value for at, value in points if at <= now - recent_seconds]
    if not recent or not past:
        return None
    return _divided(sum(recent) / len(recent), sum(past) / len(past))


class _RobustZJudge:
    def __init__(self, alert: Alert, condition: RobustZ) -> None:
        self._alert, self._condition = alert, condition
        self._windows = _Windows(condition.sample, condition.where, condition.window_seconds)

    def judge(self, now: float, series: Series) -> Iterator[Judged]:
        condition = self._condition
        judged = {key: value for key, _, value in _present(series, condition.metric, condition.where)}
        for key, _, points in self._windows.take(now, series):
            if key not in judged or points[0][0] > now - condition.window_seconds:
                continue
            values = sorted(value for at, value in points if at > now - condition.window_seconds)
            if not values:
                continue
            median = _quantile(values, 0.5)
            spread = (_quantile(values, 0.75) - _quantile(values, 0.25)) / 1.349
            z = _divided(judged[key] - median, spread + condition.slack * abs(median))
            yield key, z, self._alert.crossed(z)


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between the nearest ranks, as PromQL's."""
    rank = q * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _divided(above: float, below: float) -> float:
    """A quotient as PromQL has it: by zero it is infinite, or NaN where both are zero."""
    if below != 0.0:
        return above / below
    return math.nan if above == 0.0 or math.isnan(above) else math.copysign(math.inf, above)
