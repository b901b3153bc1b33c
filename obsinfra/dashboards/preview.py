"""A board drawn without Grafana: each panel's real answers, in its place, as one PNG.

Called by `obsinfra dashboards preview`. It reads the JSON that Grafana loads, and draws a likeness of
Grafana's panels that shows whether queries, units, thresholds and marks make sense; not what Grafana draws.
"""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from obsinfra.dashboards.asking import (
    Asked,
    Document,
    Prometheus,
    Range,
    Series,
    choose,
    filled,
    panels_of,
    put_questions,
)
from obsinfra.dashboards.reading import colour_of, legend_of, meaning, scale_of, table_of, worded

WIDTH_INCHES, GRID_HEIGHT_INCHES, DPI = 16.0, 0.33, 90
BACKGROUND, SURFACE, INK, FAINT, RULE = "#111217", "#181b1f", "#d8d9da", "#8e9196", "#2c3038"
COLOURS = {
    "green": "#73bf69", "yellow": "#fade2a", "orange": "#ff9830", "red": "#f2495c", "blue": "#5794f2",
    "purple": "#b877d9",
}  # fmt: skip
PALETTE = (
    "#73bf69", "#fade2a", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#37872d", "#8ab8ff", "#c0d8ff",
    "#ffa6b0", "#96d98d", "#e0b400",
)  # fmt: skip
"""Grafana's classic palette, by place."""

MAX_LEGEND = 9
TICKS = (5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
"""Seconds that time axes may have between two ticks."""

Mark = tuple[float, str]
"""Epoch seconds and colour."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """What a kind of panel needs to draw itself into `axes`."""

    axes: Axes
    panel: Document
    asked: Sequence[Asked]
    marks: Sequence[Mark]
    over: Range

    @property
    def field(self) -> Document:
        """What holds for all of its values: unit, thresholds, what to say without any."""
        defaults: Document = self.panel["fieldConfig"]["defaults"]
        return defaults

    @property
    def unit(self) -> str:
        """Grafana's name of its unit."""
        return str(self.field.get("unit", "short"))

    def named(self) -> list[tuple[str, Series]]:
        """Every series and its name."""
        return [(legend_of(one.target, series), series) for one in self.asked for series in one.answer.series]


def draw_board(
    board: Document, prometheus: Prometheus, over: Range, wanted: Mapping[str, str], target: Path
) -> None:
    """Ask all queries of a board and draw the answers.

    Args:
        board: its JSON.
        wanted: variable → value, where it shall not be the one that Grafana begins with.
        target: the PNG, written with a palette so that it stays small.

    Raises:
        UserError: no Prometheus answers, or it refuses a query.
    """
    chosen = choose(board, prometheus, over, wanted)
    by_panel: dict[int, list[Asked]] = defaultdict(list)
    for one in put_questions(board, prometheus, over, chosen):
        by_panel[one.panel["id"]].append(one)
    marks = _marks(board, prometheus, over, chosen)
    matplotlib.rcParams["font.family"] = ["DejaVu Sans"]
    rows = 2 + max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = Figure(figsize=(WIDTH_INCHES, rows * GRID_HEIGHT_INCHES), dpi=DPI, facecolor=BACKGROUND)
    said = "   ".join(
        f"{name}: {'All' if value == '.*' else value}"
        for name, value in chosen.items()
        if name != "datasource"
    )
    top = 1 - 1 / rows
    figure.text(0.008, top, board["title"], color=INK, size=15, weight="bold", va="center")
    figure.text(0.992, top, said, color=FAINT, size=9, va="center", ha="right")
    for number, mark in enumerate(board["annotations"]["list"]):
        x, colour = 0.24 + 0.075 * number, COLOURS[mark["iconColor"]]
        figure.text(x, top, f"┊ {mark['name']}", color=colour, size=9, va="center")
    for panel in board["panels"]:
        if panel["type"] == "row":
            place = panel["gridPos"]
            y = 1 - (place["y"] + 2 + 0.55) / rows
            figure.text(0.008, y, panel["title"], color=INK, size=11, weight="bold", va="center")
    for panel in panels_of(board):
        _draw_panel(figure, rows, panel, by_panel[panel["id"]], marks, over)
    _save(figure, target)


def _marks(board: Document, prometheus: Prometheus, over: Range, chosen: Mapping[str, str]) -> list[Mark]:
    """The beginnings of what the board's annotations tell."""
    found: list[Mark] = []
    for mark in board["annotations"]["list"]:
        answer = prometheus.range(filled(mark["expr"], {**chosen, **over.macros()}), over)
        for series in answer.series:
            before = -math.inf
            for at, _ in series.points:
                if at - before > 1.5 * over.step:
                    found.append((at, COLOURS[mark["iconColor"]]))
                before = at
    return found


def _draw_panel(
    figure: Figure,
    rows: int,
    panel: Document,
    asked: Sequence[Asked],
    marks: Sequence[Mark],
    over: Range,
) -> None:
    place = panel["gridPos"]
    gap = 0.003
    left, width = place["x"] / 24 + gap, place["w"] / 24 - 2 * gap
    unit = 1 / rows
    bottom, height = 1 - (place["y"] + 2 + place["h"]) * unit + 0.1 * unit, (place["h"] - 0.2) * unit
    frame = figure.add_axes((left, bottom, width, height), facecolor=SURFACE)
    frame.set(xticks=[], yticks=[])
    for spine in frame.spines.values():
        spine.set_color(RULE)
    title = textwrap.shorten(panel["title"], int(place["w"] * 9), placeholder="…")
    title_y = bottom + height - 0.55 * unit
    figure.text(left + 0.006, title_y, title, color=INK, size=9, va="center", weight="normal")
    inner = (left + 0.006, bottom + 0.25 * unit, width - 0.012, height - 1.35 * unit)
    if panel["type"] in ("timeseries", "heatmap", "state-timeline", "xychart"):
        legend = 0.0 if panel["type"] == "heatmap" else 0.9 * unit
        inner = (
            left + 0.042,
            bottom + 0.85 * unit + legend,
            width
            - (0.075 if panel["type"] == "heatmap" else 0.05),  # room for what is beside the scale of colours
            height - 2.05 * unit - legend,
        )
    axes = figure.add_axes(inner, facecolor=SURFACE)
    drawing = Drawing(axes, panel, asked, marks, over)
    if not any(one.answer.series for one in asked):
        axes.set_axis_off()
        nothing = panel["fieldConfig"]["defaults"].get("noValue", "No data")
        axes.text(0.5, 0.5, nothing, color=FAINT, size=11, ha="center", va="center", transform=axes.transAxes)
        return
    KINDS[panel["type"]](drawing)


def _timeseries(drawing: Drawing) -> None:
    axes, custom = drawing.axes, drawing.field.get("custom", {})
    series = drawing.named()
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    _style(axes)
    _time_axis(drawing)
    if stacked:
        moments = drawing.over.moments()
        layers = [_on_grid(one, moments, 0.0) for _, one in series]
        axes.stackplot(
            list(moments),
            layers,
            colors=[_nth(n) for n in range(len(series))],
            alpha=0.75,
            lw=0,
        )
    else:
        for number, (_, one) in enumerate(series):
            xs, ys = _with_gaps(one, drawing.over)
            axes.plot(xs, ys, color=_nth(number), lw=1.2)
            if lone := _lone_points(one, drawing.over):
                axes.plot([at for at, _ in lone], [value for _, value in lone], ".", color=_nth(number))
    if custom.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.yaxis.set_major_locator(_RoundTicks(drawing.unit))
        floor, ceiling = drawing.field.get("min"), drawing.field.get("max")
        if floor is not None or ceiling is not None:
            axes.set_ylim(bottom=floor, top=None if ceiling is None else 1.02 * ceiling)
    _thresholds(drawing)
    axes.yaxis.set_major_formatter(lambda value, _: worded(value, drawing.unit))
    _legend(axes, [(name, _nth(number)) for number, (name, _) in enumerate(series)])


class _RoundTicks(ticker.MaxNLocator):
    """A few ticks at round numbers of the unit they are written in: 10 GiB rather than 7.45."""

    def __init__(self, unit: str) -> None:
        super().__init__(4, steps=[1, 2.5, 5, 10])  # a quarter of an hour is round, a tenth is not
        self._unit = unit

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        scale = scale_of(max(abs(vmin), abs(vmax)), self._unit)
        return [scale * tick for tick in super().tick_values(vmin / scale, vmax / scale)]


def _thresholds(drawing: Drawing) -> None:
    if drawing.field.get("custom", {}).get("thresholdsStyle", {}).get("mode") != "dashed":
        return
    low, high = drawing.axes.get_ylim()
    for step in drawing.field["thresholds"]["steps"]:
        if step["value"] is None:
            continue
        drawing.axes.axhline(step["value"], color=COLOURS[step["color"]], lw=0.9, ls=(0, (5, 3)))
    drawing.axes.set_ylim(low, high)  # a far threshold must not flatten the curve


def _stat(drawing: Drawing) -> None:
    axes = drawing.axes
    axes.set_axis_off()
    [(name, series), *_] = drawing.named()
    value = series.last
    shown, colour = worded(value, drawing.unit), COLOURS[colour_of(drawing.field, value)]
    if (mapped := meaning(drawing.field, value)) is not None:
        shown, colour = mapped[0], COLOURS[mapped[1]]
    if drawing.panel["options"].get("textMode") == "name":
        shown = name
        for override in drawing.panel["fieldConfig"]["overrides"]:
            if override["matcher"]["options"] == name:
                colour = COLOURS[override["properties"][0]["value"]["fixedColor"]]
    if drawing.panel["options"].get("graphMode") == "area" and len(series.points) > 2:
        ys = [value for _, value in series.points]
        low, high = min(ys), max(ys)
        span = (high - low) or 1.0
        heights = [0.05 + 0.3 * (value - low) / span for value in ys]
        xs = [index / (len(ys) - 1) for index in range(len(ys))]
        axes.fill_between(xs, heights, color=colour, alpha=0.22, lw=0)
        axes.plot(xs, heights, color=colour, lw=0.8)
        axes.set(xlim=(0, 1), ylim=(0, 1))
    size = 19 if len(shown) < 9 else 14
    axes.text(0.5, 0.62, shown, color=colour, size=size, ha="center", va="center", transform=axes.transAxes)


def _bars(drawing: Drawing) -> None:
    axes = drawing.axes
    axes.set_axis_off()
    found = [(name, series.last) for name, series in drawing.named()][:6]
    high = drawing.field.get("max") or max((value for _, value in found), default=1.0) or 1.0
    axes.set(xlim=(0, 1), ylim=(-len(found) + 0.4, 0.6))
    for row, (name, value) in enumerate(found):
        colour = COLOURS[colour_of(drawing.field, value)]
        axes.text(0, -row + 0.12, textwrap.shorten(name, 34, placeholder="…"), color=INK, size=8, va="bottom")
        axes.barh(-row - 0.1, 0.78, height=0.3, color=RULE)
        axes.barh(-row - 0.1, 0.78 * min(1.0, max(0.0, value / high)), height=0.3, color=colour)
        shown = worded(value, drawing.unit)
        axes.text(0.99, -row - 0.1, shown, color=colour, size=9, ha="right", va="center")
    if len(found) < 4:
        axes.set_ylim(-3.6, 0.6)


def _table(drawing: Drawing) -> None:
    axes = drawing.axes
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    headings, rows = table_of(drawing.panel, drawing.asked)
    widths = [max(len(heading), *(len(row[n]) for row in rows), 4) for n, heading in enumerate(headings)]
    total = sum(widths) + 2 * len(widths)
    lefts = [(sum(widths[:n]) + 2 * n) / total for n in range(len(widths))]
    lines = drawing.panel["gridPos"]["h"] - 1.4
    height = 1 / lines
    for left, heading in zip(lefts, headings, strict=True):
        axes.text(left, 1 - height / 2, heading, color="#6e9fff", size=9, va="center", weight="normal")
    for number, row in enumerate(rows[: int(lines) - 1]):
        y = 1 - (number + 1.5) * height
        axes.axhline(y + height / 2, color=RULE, lw=0.7)
        for left, cell in zip(lefts, row, strict=True):
            axes.text(left, y, cell, color=INK, size=9, va="center")


def _heatmap(drawing: Drawing) -> None:
    axes = drawing.axes
    series = [(name, one) for name, one in drawing.named()]
    bucketed = drawing.asked[0].target["format"] == "heatmap"
    if bucketed:
        series = sorted(series, key=lambda pair: float(pair[0].replace("+Inf", "inf")))
    moments = drawing.over.moments()
    table = [_on_grid(one, moments, math.nan) for _, one in series]
    if bucketed:  # from "up to here" to "in here"
        table = [
            [max(0.0, now - before) for now, before in zip(row, table[n - 1], strict=True)] if n else row
            for n, row in enumerate(table)
        ]
        used = [n for n, row in enumerate(table) if any(value > 0 for value in row)]
        keep = range(max(0, min(used) - 1), min(len(table), max(used) + 2)) if used else range(len(table))
        table, series = [table[n] for n in keep], [series[n] for n in keep]
        table = [[value or math.nan for value in row] for row in table]
    edges = [at - drawing.over.step for at in moments[:1]] + list(moments)
    mesh = axes.pcolormesh(
        edges,
        range(len(series) + 1),
        table,
        cmap="turbo" if bucketed else "RdYlGn_r",
        norm="log" if bucketed else None,
    )
    _style(axes, grid=False)
    _time_axis(drawing)
    ticks = range(len(series)) if len(series) <= 12 else range(0, len(series), len(series) // 8)
    axes.set_yticks(
        [n + (1.0 if bucketed else 0.5) for n in ticks],
        [worded(float(series[n][0]), drawing.unit) if bucketed else series[n][0] for n in ticks],
    )
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.03)
    unit = drawing.panel["options"]["cellValues"].get("unit", "short")
    bar.ax.yaxis.set_major_formatter(lambda value, _: worded(value, unit))
    bar.ax.yaxis.set_minor_locator(ticker.NullLocator())
    bar.ax.tick_params(colors=FAINT, labelsize=7)
    bar.outline.set_edgecolor(RULE)


def _states(drawing: Drawing) -> None:
    axes = drawing.axes
    series = drawing.named()[:12]
    _style(axes, grid=False)
    used: dict[str, str] = {}
    for row, (_, one) in enumerate(series):
        for at, value in one.points:
            text, colour = meaning(drawing.field, value) or (f"{value:g}", "blue")
            used[text] = COLOURS[colour]
            axes.broken_barh(
                [(at, 1.02 * drawing.over.step)], (row + 0.12, 0.76), color=COLOURS[colour], lw=0
            )
    axes.set_yticks([row + 0.5 for row in range(len(series))], [name[:34] for name, _ in series])
    axes.set_ylim(max(1, len(series)), 0)
    box = axes.get_position()
    longest = max(len(name[:34]) for name, _ in series)
    shift = min(0.16, 0.0042 * longest) - 0.03
    if shift > 0:
        axes.set_position((box.x0 + shift, box.y0, box.width - shift, box.height))
    _time_axis(drawing, marks=False)
    _legend(axes, list(used.items()))


def _overlay(drawing: Drawing) -> None:
    axes = drawing.axes
    x, y = drawing.asked
    along = {series.labels["run"]: dict(series.points) for series in x.answer.series}
    _style(axes)
    legend = []
    for number, series in enumerate(y.answer.series):
        run = series.labels["run"]
        points = [(along[run][at], value) for at, value in series.points if at in along.get(run, {})]
        axes.plot([a for a, _ in points], [b for _, b in points], color=_nth(number), lw=1.3)
        legend.append((run, _nth(number)))
    if drawing.field.get("custom", {}).get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: worded(value, "short"))
    axes.yaxis.set_major_formatter(lambda value, _: worded(value, drawing.unit))
    _legend(axes, legend)


KINDS: dict[str, Callable[[Drawing], None]] = {
    "timeseries": _timeseries,
    "stat": _stat,
    "bargauge": _bars,
    "table": _table,
    "heatmap": _heatmap,
    "state-timeline": _states,
    "xychart": _overlay,
}


def _style(axes: Axes, *, grid: bool = True) -> None:
    axes.tick_params(colors=FAINT, labelsize=7, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if grid:
        axes.grid(color=RULE, lw=0.6)
        axes.set_axisbelow(True)


def _time_axis(drawing: Drawing, *, marks: bool = True) -> None:
    axes, over = drawing.axes, drawing.over
    axes.set_xlim(over.start, over.end)
    most = max(2, drawing.panel["gridPos"]["w"] // 2)  # labels side by side
    apart = next(one for one in TICKS if over.seconds / one <= min(6, most) or one == TICKS[-1])
    axes.xaxis.set_major_locator(ticker.MultipleLocator(apart))
    pattern = "%H:%M" if apart >= 60 else "%H:%M:%S"
    axes.xaxis.set_major_formatter(lambda at, _: datetime.fromtimestamp(at).strftime(pattern))
    if marks:
        for at, colour in drawing.marks:
            axes.axvline(at, color=colour, lw=0.9, ls=":")


def _legend(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """Names below the plot, as many as fit."""
    x = 0.0
    figure = axes.get_figure()
    assert figure is not None
    box = axes.get_position()
    per_character = 0.0039 / box.width
    for number, (name, colour) in enumerate(entries):
        short = textwrap.shorten(name, 30, placeholder="…") or "value"
        needed = (len(short) + 4) * per_character
        if x + needed > 1.02 or number >= MAX_LEGEND:
            left = f"+ {len(entries) - number}"
            axes.annotate(left, (x, 0), (0, -24), color=FAINT, size=7.5, **_below())
            break
        axes.annotate("━", (x, 0), (0, -24), color=colour, size=8, **_below())
        axes.annotate(short, (x, 0), (11, -24), color=INK, size=7.5, **_below())
        x += needed


def _below() -> dict[str, Any]:
    return {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "va": "center",
        "annotation_clip": False,
    }


def _on_grid(series: Series, moments: Sequence[float], absent: float) -> list[float]:
    points = {round(at): value for at, value in series.points}
    return [points.get(round(at), absent) for at in moments]


def _with_gaps(series: Series, over: Range) -> tuple[list[float], list[float]]:
    """A curve that is broken where there are no points."""
    xs: list[float] = []
    ys: list[float] = []
    before = None
    for at, value in series.points:
        if before is not None and at - before > 1.5 * over.step:
            xs.append(before + over.step / 2)
            ys.append(math.nan)
        xs.append(at)
        ys.append(value)
        before = at
    return xs, ys


def _lone_points(series: Series, over: Range) -> list[tuple[float, float]]:
    """Points with a gap on both sides, through which no line goes."""
    near, points = 1.5 * over.step, series.points
    return [
        point
        for n, point in enumerate(points)
        if (n == 0 or point[0] - points[n - 1][0] > near)
        and (n == len(points) - 1 or points[n + 1][0] - point[0] > near)
    ]


def _nth(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def _save(figure: Figure, target: Path) -> None:
    raw = BytesIO()
    figure.savefig(raw, format="png", facecolor=figure.get_facecolor())
    raw.seek(0)
    with Image.open(raw) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        small.save(target, format="PNG", optimize=True)
