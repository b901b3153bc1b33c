"""The alert table evaluated in the trainer's own process, with Prometheus's semantics.

The monitor calls it once per housekeeping round. Knows no metrics server, no commands and no sidecar: whoever
hears of a firing alert decides what to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from obsinfra.alerting.judges import LabelKey, create_judge
from obsinfra.alerting.wording import summary_for_people
from obsinfra.catalog.alerts import Alert
from obsinfra.catalog.conditions import metrics_of

Reading = tuple[str, Mapping[str, str], float]
"""Sample name as on the wire (`…_total` for counters), labels, value in the metric's base unit."""


@dataclass(frozen=True, slots=True)
class AlertStatus:
    """One alert that holds now for one series.

    Attributes:
        alert: the row of the table.
        labels: labels of the series, without those of the rule.
        value: the number the condition looks at, in its base unit.
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
    which it does not, or at which the series is absent, resolves it; what fires holds as long as its value is
    beyond the clearing threshold. (An increase stays true for its window,
    also when its series is gone.) Not thread-safe: one owner calls it.

    Args:
        alerts: the table, the user's settings applied. Rows that only Prometheus can judge are left out.
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
        self._alerts = tuple(alert for alert in alerts if alert.in_process)
        self._judges = tuple(create_judge(alert) for alert in self._alerts)
        self._wanted = {
            metric.sample_name for alert in self._alerts for metric in metrics_of(alert.condition)
        }
        self._read = read
        self._clock = clock
        self._on_firing = on_firing
        self._held: dict[tuple[int, LabelKey], AlertStatus] = {}
        self._unannounced: deque[AlertStatus] = deque()

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """The rows judged here."""
        return self._alerts

    def evaluate(self) -> list[AlertStatus]:
        """Read all values, advance every alert, and return those pending or firing, in table order."""
        now = self._clock()
        series: dict[str, list[tuple[LabelKey, Mapping[str, str], float]]] = {}
        for sample_name, labels, reading in self._read():
            if sample_name in self._wanted:
                found = series.setdefault(sample_name, [])
                found.append((tuple(sorted(labels.items())), labels, reading))
        held: dict[tuple[int, LabelKey], AlertStatus] = {}
        for index, (alert, judge) in enumerate(zip(self._alerts, self._judges, strict=True)):
            for labels_key, value, crossed in judge.judge(now, series):
                key = (index, labels_key)
                before = self._held.get(key)
                if crossed or (before is not None and before.fired_at is not None and alert.holds(value)):
                    held[key] = self._advance(key, value, now)
        self._held = held
        while self._unannounced:
            status = self._unannounced.popleft()
            if self._on_firing is not None:
                self._on_firing(status)
        return [held[key] for key in sorted(held)]

    def replace(self, alert: Alert) -> bool:
        """Judge by `alert` from now on instead of by the row of its key, which forgets what it saw so far.

        The other rows are untouched. On any thread.

        Returns:
            False when no such row is judged here.
        """
        for index, row in enumerate(self._alerts):
            if row.key == alert.key:
                before, after = self._alerts[:index], self._alerts[index + 1 :]
                self._alerts = (*before, alert, *after)
                self._judges = (*self._judges[:index], create_judge(alert), *self._judges[index + 1 :])
                self._held = {key: status for key, status in self._held.items() if key[0] != index}
                return True
        return False

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
