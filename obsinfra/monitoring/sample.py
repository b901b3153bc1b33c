"""Sample: one value of one catalogued metric, the common currency of samplers, recorder and exporter.

Everything that measures returns these; the exporter and the evaluator read them. Knows only the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from obsinfra.catalog.metrics import Metric


class Sample(NamedTuple):
    """One value, as of now.

    Attributes:
        metric: the catalogue's entry; its name carries the unit.
        labels: label values beyond the run's own, one for each name in `metric.labels`.
        value: in the metric's unit; a counter's running total.
    """

    metric: Metric
    labels: Mapping[str, str]
    value: float
