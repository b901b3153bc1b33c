"""Numbers as Grafana writes them, and answers as the rows of a table: what a panel shows of what it is told.

Called by the preview. Knows the boards' JSON, and neither matplotlib nor Prometheus.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from obsinfra.dashboards.asking import Asked, Document, Series

_LEGEND = re.compile(r"\{\{(\w+)\}\}")
_SI = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K"))
_BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_TIME = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))

ROUNDED_UP = 0.9995
"""What is written with three digits is that of the next unit from here on: 999.6 µs are 1 ms."""


def worded(value: float, unit: str) -> str:
    """A value in its unit. An unknown unit is written behind the number."""
    if not math.isfinite(value):
        return "–"
    match unit:
        case "percentunit":
            return f"{_short(100 * value)}%"
        case "s":
            return _scaled(value, _TIME, "s") if value else "0 s"
        case "bytes" | "Bps":
            return _scaled(value, _BINARY, "B") + ("/s" if unit == "Bps" else "")
        case "celsius":
            return f"{_short(value)} °C"
        case "watt":
            return f"{_short(value)} W"
        case "hertz":
            return _scaled(value, ((1e9, "GHz"), (1e6, "MHz"), (1e3, "kHz")), "Hz")
        case "locale":
            return f"{value:,.0f}"
        case "sci":
            return f"{value:.3g}"
        case "none":
            return _short(value)
        case "ops":
            return f"{_short(value)} /s"
        case _ if unit.startswith("suffix:"):
            return f"{_short(value)}{unit.removeprefix('suffix:')}"
        case _:
            for size, name in _SI:
                if abs(value) >= size:
                    return f"{_short(value / size)}{name}"
            return _short(value)


def scale_of(value: float, unit: str) -> float:
    """The size of the unit in which a value is written: 60 for a time of some minutes."""
    sizes = {"s": _TIME, "bytes": _BINARY, "Bps": _BINARY}.get(unit, ())
    return next((size for size, _ in sizes if abs(value) >= size), 1.0)


def legend_of(target: Document, series: Series) -> str:
    """The name of a series."""
    template = target.get("legendFormat", "")
    if not template:
        return ", ".join(f"{name}={value}" for name, value in series.labels.items() if name != "__name__")
    return _LEGEND.sub(lambda match: series.labels.get(match[1], ""), template)


def meaning(field: Document, value: float) -> tuple[str, str] | None:
    """Text and colour of a mapped value; None where it is not mapped."""
    for mapping in field.get("mappings", ()):
        found = mapping.get("options", {}).get(f"{value:g}")
        if found:
            return found["text"], found["color"]
    return None


def colour_of(field: Document, value: float) -> str:
    """The colour that the thresholds give a value."""
    colour = "green"
    for step in field.get("thresholds", {}).get("steps", ()):
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    return colour


def table_of(panel: Document, asked: Sequence[Asked]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of a table panel, its transformations applied.

    Answers of several queries are joined where their labels agree.
    """
    rows: list[dict[str, Any]] = []
    for one in asked:
        value = f"Value #{one.target['refId']}" if len(asked) > 1 else "Value"
        for series in one.answer.series:
            labels = {name: text for name, text in series.labels.items() if name != "__name__"}
            fitting = [
                row for row in rows if all(row.get(name, text) == text for name, text in labels.items())
            ]
            if one is asked[0] or not fitting:
                fitting = [dict(labels)]
                rows += fitting
            for row in fitting:
                row |= labels | {value: series.last}
    organize = panel["transformations"][-1]["options"]
    places, headings = organize["indexByName"], organize["renameByName"]
    columns: dict[str, str] = {name: headings[name] for name in sorted(places, key=places.__getitem__)}
    fields = {one["matcher"]["options"]: one["properties"] for one in panel["fieldConfig"]["overrides"]}
    for name, descending in _sorting(panel, columns):
        rows = [rows[place] for place in _order([row.get(name) for row in rows], descending)]
    cells = [
        [_cell(row.get(name), fields.get(heading, [])) for name, heading in columns.items()] for row in rows
    ]
    return list(columns.values()), cells


def _order(values: Sequence[Any], descending: bool) -> list[int]:
    return sorted(range(len(values)), key=lambda place: _key(values[place]), reverse=descending)


def _sorting(panel: Document, columns: Mapping[str, str]) -> list[tuple[str, bool]]:
    by_heading = {heading: name for name, heading in columns.items()}
    return [
        (by_heading[one["displayName"]], bool(one["desc"])) for one in panel["options"].get("sortBy") or ()
    ]


def _key(value: Any) -> tuple[int, float, str]:
    if isinstance(value, float):
        return 1, value, ""
    return 0, 0.0, str(value or "")


def _cell(value: Any, properties: Sequence[Document]) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    units = [one["value"] for one in properties if one["id"] == "unit"]
    return worded(value, units[0] if units else "short")


def _short(value: float) -> str:
    """At most four digits that count."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    text = f"{value:.3g}"
    return f"{value:.2e}" if abs(value) < 1e-3 else text


def _scaled(value: float, sizes: Sequence[tuple[float, str]], smallest: str) -> str:
    for size, name in sizes:
        if abs(value) >= ROUNDED_UP * size:
            return f"{_short(value / size)} {name}"
    return f"{_short(value)} {smallest}"
