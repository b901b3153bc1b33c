"""A chart as inline SVG: at most `MAX_POINTS` points a line, however long the run; colours by CSS alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from obsinfra.reporting.document import Chart, Line
from obsinfra.reporting.gather import Curve
from obsinfra.reporting.words import integer

WIDTH, HEIGHT = 480, 190
LEFT, RIGHT, TOP, BOTTOM = 56, 8, 8, 26
MAX_POINTS = 800
READOUTS = 48
"""Places of a chart at which a pointer reads the values."""

WIDE_APART = 200.0
"""Largest ÷ smallest value from which on a logarithmic axis serves better."""


def smoothed(curve: Curve) -> Curve:
    """Bias-corrected exponential mean over about 1/40 of the points; up to 40 points are left as they are."""
    keep = 1 - 1 / max(1.0, len(curve.values) / 40)
    mean = weight = 0.0
    out = []
    for value in curve.values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(mean / weight)
    return Curve(curve.steps, tuple(out))


def thinned(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """At most `most` points that look the same: the lowest and the highest of each stretch, and both ends."""
    count = len(curve.steps)
    if count <= most:
        return curve
    stretches = most // 2 - 1
    kept = {0, count - 1}
    for number in range(stretches):
        indices = range(count * number // stretches, count * (number + 1) // stretches)
        kept.add(min(indices, key=curve.values.__getitem__))
        kept.add(max(indices, key=curve.values.__getitem__))
    chosen = sorted(kept)
    return Curve(tuple(curve.steps[i] for i in chosen), tuple(curve.values[i] for i in chosen))


def svg(chart: Chart, id: str) -> str:
    """The chart as an `<svg>` element.

    Args:
        id: unique within the page; for the clip path.
    """
    lines = [line for line in chart.lines if line.curve.steps]
    if not lines:
        return ""
    plot = _Plot(chart, lines)
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(plot.description())}">',
        f'<clipPath id="{id}"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM + 1}"/></clipPath>',
        *plot.grid(),
        *plot.marks(),
        f'<g clip-path="url(#{id})">',
        *(plot.path(line) for line in lines),
        "</g>",
        *plot.limit(),
        *plot.readouts(lines),
        "</svg>",
    ]
    return "".join(parts)


class _Plot:
    """Where values of one chart lie on the drawing."""

    def __init__(self, chart: Chart, lines: Sequence[Line]) -> None:
        self.chart, self.lines = chart, lines
        values = [value for line in lines for value in line.curve.values]
        low, high = min(values), max(values)
        self.low_value, self.high_value = low, high
        self.log = chart.log and low > 0 and high / low > WIDE_APART
        self.shows_limit = False
        if chart.limit is not None and (high > chart.limit * 0.4 or (self.log and chart.limit / high < 1e3)):
            self.shows_limit = chart.limit > 0 or not self.log
            high = max(high, chart.limit * (1.3 if self.log else 1.05))
        if self.log:
            self.low, self.high = math.log10(low / 1.1), math.log10(high * 1.1)
        else:
            pad = (high - low or abs(high) or 1.0) * 0.08
            self.low = chart.floor if chart.floor is not None and low >= chart.floor else low - pad
            self.high = max(chart.ceiling, high) if chart.ceiling is not None else high + pad
        self.first = min(line.curve.steps[0] for line in lines)
        self.last = max(max(line.curve.steps[-1] for line in lines), self.first + 1)

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def description(self) -> str:
        """The chart in a sentence, for who does not see it."""
        told = [
            f"{line.label}: {self.chart.write(line.curve.values[0])} at step {integer(line.curve.steps[0])}, "
            f"{self.chart.write(line.curve.values[-1])} at step {integer(line.curve.steps[-1])}, lowest "
            f"{self.chart.write(min(line.curve.values))}, highest {self.chart.write(max(line.curve.values))}"
            for line in self.lines
            if line.style != "faint"
        ]
        return f"{self.chart.title} over steps. " + ". ".join(told)

    def grid(self) -> list[str]:
        out = []
        for value in self._ticks():
            y = self.y(value)
            out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            out.append(
                f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">'
                f"{escape(self.chart.axis(value))}</text>"
            )
        ticks = [step for step in nice_ticks(self.first, self.last, 5) if step == int(step)]
        for step in ticks:
            x = self.x(step)
            anchor = "end" if x > WIDTH - RIGHT - 14 else "middle"
            out.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
            out.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 9}" text-anchor="{anchor}">'
                f"{integer(step)}</text>"
            )
        return out

    def _ticks(self) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high, 4)
        powers = range(math.ceil(self.low), math.floor(self.high) + 1)
        every = max(1, math.ceil(len(powers) / 5))
        ticks = [10.0**power for power in powers if power % every == 0]
        return ticks if len(ticks) > 1 else nice_ticks(10**self.low, 10**self.high, 4)

    def marks(self) -> list[str]:
        out = []
        for step in sorted(set(self.chart.alerts)):
            if self.first <= step <= self.last:
                out.append(f'<path class="alert" d="M{self.x(step):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        for step in sorted(set(self.chart.checkpoints)):
            if self.first <= step <= self.last:
                x, y = self.x(step), HEIGHT - BOTTOM
                out.append(f'<path class="saved" d="M{x - 3.5:.1f} {y}h7l-3.5 -6z"/>')
        return out

    def path(self, line: Line) -> str:
        curve = thinned(line.curve)
        places = [
            f"{self.x(step):.1f} {self.y(value):.1f}"
            for step, value in zip(curve.steps, curve.values, strict=True)
        ]
        drawn = f'<path class="line {line.style}" d="M{"L".join(places)}"/>'
        if line.points and len(places) <= 100:
            drawn += "".join(
                f'<circle class="dot {line.style}" cx="{place.split()[0]}" cy="{place.split()[1]}" r="2.4"/>'
                for place in places
            )
        elif len(places) == 1:
            x, y = places[0].split()
            drawn = f'<circle class="dot {line.style}" cx="{x}" cy="{y}" r="3"/>'
        return drawn

    def limit(self) -> list[str]:
        if not self.shows_limit or self.chart.limit is None:
            return []
        y = self.y(self.chart.limit)
        return [
            f'<path class="limit" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>',
            f'<text class="tick bad" x="{WIDTH - RIGHT - 4}" y="{y - 4:.1f}" text-anchor="end">alert above '
            f"{escape(self.chart.axis(self.chart.limit))}</text>",
        ]

    def readouts(self, lines: Sequence[Line]) -> list[str]:
        """Invisible stripes whose tooltip tells the values below the pointer."""
        out = []
        width = (WIDTH - LEFT - RIGHT) / READOUTS
        told = [line for line in lines if line.style != "faint"]
        for number in range(READOUTS):
            middle = self.first + (number + 0.5) / READOUTS * (self.last - self.first)
            texts = []
            for line in told:
                index = _nearest(line.curve.steps, middle)
                step, value = line.curve.steps[index], line.curve.values[index]
                texts.append(f"{line.label} {self.chart.write(value)} at step {integer(step)}")
            out.append(
                f'<rect class="read" x="{LEFT + number * width:.1f}" y="{TOP}" width="{width:.1f}" '
                f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape(chr(10).join(texts))}</title></rect>'
            )
        return out


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round values from `low` to `high`, about so many."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    unit = 10 ** math.floor(math.log10(span / about))
    step = min((unit * factor for factor in (1, 2, 5, 10)), key=lambda size: abs(span / size - about))
    first = math.ceil(low / step)
    return [(first + i) * step for i in range(math.floor(high / step) - first + 1)]


def _nearest(steps: Sequence[int], wanted: float) -> int:
    """Index of the step nearest to `wanted` in a rising sequence."""
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        if steps[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low - 1 if low > 0 and wanted - steps[low - 1] < steps[low] - wanted else low
