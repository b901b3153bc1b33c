"""A report as Markdown: the same tables; a chart becomes a row of blocks with its ends and extremes."""

from __future__ import annotations

import math

from obsinfra.reporting.document import Block, Chart, Document, Section, Shares, Table, Text
from obsinfra.reporting.gather import Curve
from obsinfra.reporting.words import integer

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKS = 32


def to_markdown(document: Document) -> str:
    """The whole text. Names and reasons of a run are escaped: none becomes markup."""
    lines = [
        f"# {_plain(document.title)} · {_plain(document.run)}",
        "",
        f"**{_plain(document.state)}**" + (f": {_plain(document.reason)}" if document.reason else ""),
        "",
        " · ".join(_plain(fact) for fact in document.facts),
        "",
        "| | | |",
        "|---|---:|---|",
        *(
            f"| {_plain(tile.name)} | **{_plain(tile.value)}** | {_plain(tile.note)} |"
            for tile in document.tiles
        ),
        "",
    ]
    for section in document.sections:
        lines += _section(section)
    return "\n".join([*lines, f"Made {_plain(document.made)} by `obsinfra report`; times are UTC.", ""])


def _section(section: Section) -> list[str]:
    lines = [f"## {_plain(section.title)}", ""]
    charts = [block for block in section.blocks if isinstance(block, Chart)]
    if charts:
        lines += [
            "| curve | run | first | lowest | highest | last | over steps | |",
            "|---|---|--:|--:|--:|--:|---|---|",
        ]
        for chart in charts:
            for line in chart.lines:
                if line.style == "faint" or not line.curve.steps:
                    continue
                values = line.curve.values
                numbers = " | ".join(
                    _plain(chart.write(value)) for value in (values[0], min(values), max(values), values[-1])
                )
                steps = f"{integer(line.curve.steps[0])} – {integer(line.curve.steps[-1])}"
                lines.append(
                    f"| {_plain(chart.title)} | {_plain(line.label)} | {numbers} | {steps} "
                    f"| {sparks(line.curve)} |"
                )
        lines.append("")
    for block in section.blocks:
        lines += _block(block, alone=len(section.blocks) == 1)
    return lines


def _block(block: Block, *, alone: bool) -> list[str]:
    match block:
        case Table():
            title = [] if alone else [f"### {_plain(block.caption)}", ""]
            if not block.rows:
                return [*title, _plain(block.none), ""]
            numeric = [column.endswith("#") for column in block.columns]
            return [
                *title,
                "| " + " | ".join(_plain(column.removesuffix("#")) for column in block.columns) + " |",
                "|" + "|".join("--:" if number else "---" for number in numeric) + "|",
                *("| " + " | ".join(_plain(cell.text) for cell in row) + " |" for row in block.rows),
                "",
            ]
        case Shares():
            return [
                f"### {_plain(block.caption)}",
                "",
                "| | | |",
                "|---|--:|--:|",
                *(
                    f"| {_plain(name)} | {_plain(text)} | {share * 100:.1f} % |"
                    for name, share, text in block.parts
                ),
                "",
            ]
        case Text():
            return [_plain(block.text), ""]
        case Chart():
            return []


def sparks(curve: Curve) -> str:
    """The curve in blocks: the mean of each stretch between the lowest and the highest mean."""
    count = min(SPARKS, len(curve.values))
    means = []
    for number in range(count):
        part = curve.values[len(curve.values) * number // count : len(curve.values) * (number + 1) // count]
        means.append(math.fsum(part) / len(part))
    low, high = min(means), max(means)
    if not high > low:
        return BLOCKS[0] * count
    return "".join(BLOCKS[round((mean - low) / (high - low) * (len(BLOCKS) - 1))] for mean in means)


_MARKUP = {ord(mark): f"\\{mark}" for mark in "\\`*_{}[]<>#|~&!"} | {ord("\n"): " ", ord("\r"): " "}


def _plain(text: str) -> str:
    """`text` with everything that Markdown or HTML would read as markup escaped."""
    return text.translate(_MARKUP)
