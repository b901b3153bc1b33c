"""PromQL of the panels, written in metrics of the catalogue so that a renamed one is noticed at once.

Called by the boards. `$run`, `$rank` and the like are variables that Grafana fills in (`variables.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from obsinfra.catalog.metrics import Metric

RUN = 'run="$run"'
RANKS = 'run="$run", rank=~"$rank"'
RUNS = 'model=~"$model", run=~"$run"'
HOSTS = 'run=~"$run", host=~"$host"'
DEVICES = 'run=~"$run", host=~"$host", device=~"$device"'

Shape = Literal["series", "table", "buckets"]


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel.

    Attributes:
        expression: PromQL with Grafana's variables.
        legend: name of each series, with `{{label}}`; empty lets Grafana name them.
        instant: only the present, for tables.
        shape: what Grafana makes of the answer: lines, rows, or the buckets of a heat map.
        exemplars: also ask for the traces that hang on the histogram's buckets.
        name: name of the value's column where the answers of several queries become one table.
    """

    expression: str
    legend: str = ""
    instant: bool = False
    shape: Shape = "series"
    exemplars: bool = False
    name: str = ""


def of(metric: Metric, where: str = "", suffix: str = "") -> str:
    """The series of a metric: `name{where}`. `suffix` is `_bucket`, `_sum` or `_count` of a histogram."""
    return f"{metric.sample_name}{suffix}{{{where}}}" if where else f"{metric.sample_name}{suffix}"


def latest(series: str) -> str:
    """The last value within the time range shown, so that a run that has ended still has one."""
    return f"last_over_time({series}[$__range])"


def risen(series: str) -> str:
    """How far counters rose within the time range shown.

    `increase` misses what a counter is born with, and many of ours are born by their first event; so a series
    that was not there at the range's beginning counts in full. One that restarted counts from its restart.
    """
    now = latest(series)
    return f"(({now} - {series} offset $__range >= 0) or {now})"


def quantile(q: float, histogram: Metric, where: str, by: str = "") -> str:
    """A quantile of a histogram over the last few scrapes."""
    return _quantile(q, f"rate({of(histogram, where, '_bucket')}[$__rate_interval])", by)


def quantile_so_far(q: float, histogram: Metric, where: str, by: str = "") -> str:
    """A quantile of all that a histogram counted since its process began; for what happens rarely."""
    return _quantile(q, of(histogram, where, "_bucket"), by)


def _quantile(q: float, buckets: str, by: str) -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) ({buckets}))"
