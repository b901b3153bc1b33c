"""The alert table evaluated in the trainer's own process, with Prometheus's semantics.

The monitor calls it once per housekeeping round. Knows no metrics server, no commands and no sidecar: whoever
hears of a firing alert decides what to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from obsinfra.alerting.wording import summary_for_people
from obsinfra.catalog.alerts import Alert

Reading = tuple[str, Mapping[str, str], float]
"""Sample name as on the wire (`…_total` for counters), labels, value in the metric's base unit."""

LabelKey = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class AlertStatus:
    """One alert that holds now for one series.

    Attributes:
        alert: the row of the table.
        labels: labels of the series, without those of the rule.
        value: in the metric's base unit; the increase over the window where the alert looks at one.
        state: `pending` until the condition has held for `alert.for_seconds`, then `firing`.
        since: epoch seconds of the first evaluation at which the condition held.
        fired_at: epoch seconds of the evaluation at which it began to fire; None while pending.
    """

    alert: Alert
    labels: Mapping[str, str]
    value: float
    state: Literal["pending", "firing"]
    since: float
    fired_at: float | None

    @property
    def summary(self) -> str:
        """The alert's summary with threshold and labels filled in."""
        return summary_for_people(self.alert, self.labels)


class AlertEvaluator:
    """Evaluates a table of alerts over the present values of their metrics.

    A condition must hold at every evaluation for `for_seconds` before its alert fires; one evaluation at
    which it does not, or at which the series is absent, resolves it. (An increase stays true for its window,
    also when its series is gone.) Not thread-safe: one owner calls it.

    Args:
        alerts: the table, thresholds applied.
        read: returns every present sample; called once per evaluation.
        clock: epoch seconds.
        on_firing: called once per firing, at the end of the evaluation that began it. If it raises, the
            exception leaves `evaluate` and the firings not yet announced are announced by the next one.
    """

    def __init__(
        self,
        alerts: Sequence[Alert],
        read: Callable[[], Iterable[Reading]],
        *,
        clock: Callable[[], float],
        on_firing: Callable[[AlertStatus], None] | None = None,
    ) -> None:
        self._by_sample: dict[str, list[int]] = {}
        for index, alert in enumerate(alerts):
            self._by_sample.setdefault(alert.metric.sample_name, []).append(index)
        self._alerts = tuple(alerts)
        self._read = read
        self._clock = clock
        self._on_firing = on_firing
        self._held: dict[tuple[int, LabelKey], AlertStatus] = {}
        self._increases: dict[tuple[int, LabelKey], _Increase] = {}
        self._unannounced: deque[AlertStatus] = deque()

    def evaluate(self) -> list[AlertStatus]:
        """Read all values, advance every alert, and return those pending or firing, in table order."""
        now = self._clock()
        held: dict[tuple[int, LabelKey], AlertStatus] = {}
        present: set[tuple[int, LabelKey]] = set()

        def judge(key: tuple[int, LabelKey], value: float) -> None:
            if self._alerts[key[0]].crossed(value):
                held[key] = self._advance(key, value, now)

        for sample_name, labels, reading in self._read():
            for index in self._by_sample.get(sample_name, ()):
                key = (index, tuple(sorted(labels.items())))
                window = self._alerts[index].increase_seconds
                if window:
                    present.add(key)
                    history = self._increases.setdefault(key, _Increase(window))
                    judge(key, history.add(now, reading))
                else:
                    judge(key, reading)
        for key in self._increases.keys() - present:
            increase = self._increases[key].absent(now)
            if increase is None:
                del self._increases[key]
            else:
                judge(key, increase)
        self._held = held
        while self._unannounced:
            status = self._unannounced.popleft()
            if self._on_firing is not None:
                self._on_firing(status)
        return [held[key] for key in sorted(held)]

    def _advance(self, key: tuple[int, LabelKey], value: float, now: float) -> AlertStatus:
        index, labels = key
        alert, before = self._alerts[index], self._held.get(key)
        since = before.since if before else now
        fired_at = before.fired_at if before else None
        begins = fired_at is None and now - since >= alert.for_seconds
        if begins:
            fired_at = now
        status = AlertStatus(
            alert, dict(labels), value, "pending" if fired_at is None else "firing", since, fired_at
        )
        if begins:
            self._unannounced.append(status)
        return status


@dataclass(slots=True)
class _Increase:
    """History of one counter series, and its increase over the last `seconds`.

    Counters of this package begin at zero with their process, so a series first seen above zero has risen by
    all of its value: what happened before the first reading is not lost. The generated rules say the same.
    """

    seconds: float
    _points: deque[tuple[float, float | None]] = field(default_factory=deque)  # None: the series was absent

    def add(self, now: float, value: float) -> float:
        """Take in a reading and return the increase; a fall of the counter is a restart from zero."""
        self._points.append((now, value))
        start = now - self.seconds
        before = self._forget_before(start)
        window = [point for at, point in self._points if at >= start and point is not None]
        # The readings within the window miss what happened just before the first of them, or during a stall
        # longer than the window: hence also against the value a window ago.
        since_then = value if before is None or value < before else value - before
        return max(_rise(window), since_then)

    def absent(self, now: float) -> float | None:
        """Note that the series is gone; return what it rose within the window, None once nothing is left.

        An event followed by the end of its process has happened all the same, and is held for its window.
        """
        self._points.append((now, None))
        self._forget_before(now - self.seconds)
        window = [point for at, point in self._points if at >= now - self.seconds and point is not None]
        return _rise(window) if window else None

    def _forget_before(self, start: float) -> float | None:
        """Drop all points that end before `start` but the last, and return that one's value."""
        while len(self._points) > 1 and self._points[1][0] <= start:
            self._points.popleft()
        at, value = self._points[0]
        return value if at <= start else None


def _rise(values: Sequence[float]) -> float:
    return float(sum(later - earlier if later >= earlier else later for earlier, later in pairwise(values)))
