"""The common currency of values between samplers, monitor, exporter and evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from obsinfra.catalog.metrics import Metric


class Sample(NamedTuple):
    """One value of a metric; `labels` has the metric's own label names, without the run's."""

    metric: Metric
    labels: Mapping[str, str]
    value: float
