"""What numbers are measured in, and the units that people may write a threshold in.

The alert table and the user's changes of it read it. Knows metrics and conditions, and no alert.
"""

from __future__ import annotations

from typing import Literal

from obsinfra.catalog.conditions import (
    AgainstPast,
    AgainstPeers,
    Always,
    Condition,
    Multiple,
    Ratio,
    RobustZ,
    Share,
    Slope,
)
from obsinfra.catalog.metrics import Metric

Quantity = Literal[
    "number", "ratio", "deviations", "seconds", "bytes", "celsius", "watts", "hertz", "bytes a second",
    "change a second",
]  # fmt: skip

UNITS: dict[Quantity, dict[str, float]] = {
    "number": {"": 1.0},
    "ratio": {"": 1.0, "%": 0.01, "×": 1.0},
    "deviations": {"σ": 1.0},
    "seconds": {"s": 1.0, "ms": 1e-3, "min": 60.0, "h": 3600.0},
    "bytes": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12},
    "celsius": {"°C": 1.0},
    "watts": {"W": 1.0, "kW": 1e3},
    "hertz": {"Hz": 1.0, "MHz": 1e6, "GHz": 1e9},
    "bytes a second": {"B/s": 1.0, "MB/s": 1e6, "MB/h": 1e6 / 3600.0, "GB/h": 1e9 / 3600.0},
    "change a second": {"/s": 1.0, "/min": 1 / 60.0, "/h": 1 / 3600.0},
}
"""Quantity → unit that a threshold may be written in → factor to the base unit, which comes first."""


def quantity_of_metric(metric: Metric) -> Quantity:
    """What a metric's samples measure, which its name says."""
    words = metric.name.split("_")
    return next((quantity for quantity in _NAMED if quantity in words), "number")


_NAMED: tuple[Quantity, ...] = ("ratio", "seconds", "bytes", "celsius", "watts", "hertz")


def quantity_of(condition: Condition) -> Quantity:
    """What the number measures that a condition's threshold is held against."""
    match condition:
        case Always():
            return "number"
        case Share() | Ratio() | Multiple() | AgainstPast() | AgainstPeers():
            return "ratio"
        case RobustZ():
            return "deviations"
        case Slope(metric):
            return "bytes a second" if quantity_of_metric(metric) == "bytes" else "change a second"
        case _:
            return quantity_of_metric(condition.metric)
