"""A report as one HTML file: styles and drawings inside, no script, nothing asked of any other place."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from itertools import count

from obsinfra.reporting.charts import svg
from obsinfra.reporting.document import Block, Cell, Chart, Document, Section, Shares, Table, Text, Tile

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""What a browser holds the file to, whatever names a run may have."""


def to_html(document: Document) -> str:
    """The whole file. Every text of the run goes through `escape`."""
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    ids = count(1)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><meta name="generator" content="obsinfra report">',
        f"<title>{escape(document.run)} · {escape(document.title)}</title>",
        f"<style>{style}</style></head><body>",
        '<a class="skip" href="#main">Skip to the report</a>',
        _header(document),
        '<main id="main" tabindex="-1">',
        '<section aria-label="Key numbers"><dl class="tiles">',
        *(_tile(tile) for tile in document.tiles),
        "</dl></section>",
        *(_section(section, ids) for section in document.sections),
        f"</main><footer><p>Made {escape(document.made)} by <code>obsinfra report</code>; times are UTC.</p>"
        "</footer></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _header(document: Document) -> str:
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in document.facts)
    reason = f'<p class="reason">{escape(document.reason)}</p>' if document.reason else ""
    sections = "".join(
        f'<li><a href="#{_anchor(section)}">{escape(section.title)}</a></li>' for section in document.sections
    )
    return (
        '<header><div class="ident">'
        f'<span class="badge" data-state="{escape(document.state)}">{escape(document.state)}</span>'
        f"<h1>{escape(document.title)}</h1><code>{escape(document.run)}</code>"
        f'<ul class="facts" aria-label="Where it ran">{facts}</ul></div>{reason}'
        f'<nav aria-label="Sections"><ul class="jump">{sections}</ul></nav></header>'
    )


def _tile(tile: Tile) -> str:
    return (
        f'<div><dt>{escape(tile.name)}</dt><dd class="value {tile.tone}">{escape(tile.value)}</dd>'
        f'<dd class="note">{escape(tile.note)}</dd></div>'
    )


def _section(section: Section, ids: count[int]) -> str:
    anchor = _anchor(section)
    charts = [block for block in section.blocks if isinstance(block, Chart)]
    inner = "".join(_block(block) for block in section.blocks if not isinstance(block, Chart))
    if charts:
        drawn = "".join(_chart(chart, f"clip{next(ids)}") for chart in charts)
        return (
            f'<section id="{anchor}" aria-labelledby="{anchor}-title"><h2 id="{anchor}-title">'
            f'{escape(section.title)}</h2><div class="charts">{drawn}</div>{inner}</section>'
        )
    head = f'<h2 id="{anchor}-title">{escape(section.title)}</h2>'
    if not section.open:
        return (
            f'<section id="{anchor}" class="panel" aria-labelledby="{anchor}-title"><details>'
            f"<summary>{head}</summary>{inner}</details></section>"
        )
    wide = " pair" if len(section.blocks) == 2 else ""
    return (
        f'<section id="{anchor}" class="panel" aria-labelledby="{anchor}-title">{head}'
        f'<div class="blocks{wide}">{inner}</div></section>'
    )


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _block(block: Block) -> str:
    match block:
        case Table():
            return _table(block)
        case Shares():
            return _shares(block)
        case Text():
            return f'<p class="quiet">{escape(block.text)}</p>'
        case Chart():
            raise TypeError("charts are drawn by their section")


def _table(table: Table) -> str:
    if not table.rows:
        return f'<p class="quiet">{escape(table.none)}</p>'
    numeric = [column.endswith("#") for column in table.columns]
    names = [column.removesuffix("#") for column in table.columns]
    cards = len(names) > 2  # on a phone a row is a card then, and each cell says by itself what it is
    kind = ' class="cards"' if cards else ""
    labels = [f' data-label="{escape(name)}"' if cards else "" for name in names]

    def classes(number: bool, tone: str = "") -> str:
        given = " ".join(name for name in ("num" if number else "", tone) if name)
        return f' class="{given}"' if given else ""

    heads = "".join(
        f'<th scope="col"{classes(number)}>{escape(name)}</th>'
        for name, number in zip(names, numeric, strict=True)
    )

    def row(cells: tuple[Cell, ...]) -> str:
        return "".join(
            f"<td{classes(number, cell.tone)}{label}>{escape(cell.text)}</td>"
            for cell, number, label in zip(cells, numeric, labels, strict=True)
        )

    rows = "".join(f"<tr>{row(cells)}</tr>" for cells in table.rows)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(table.caption)}" tabindex="0">'
        f"<table{kind}><caption>{escape(table.caption)}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _shares(shares: Shares) -> str:
    """A bar for each part; drawn as SVG, since the policy lets no element carry a style of its own."""
    rows = "".join(
        f'<li><span class="name">{escape(name)}</span>'
        f'<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="6" rx="1"/>'
        f'<rect class="part" width="{max(0.0, min(1.0, share)) * 100:.2f}" height="6" rx="1"/></svg>'
        f'<span class="num">{escape(text)}</span><span class="num quiet">{share * 100:.1f} %</span></li>'
        for name, share, text in shares.parts
    )
    return f'<div><h3>{escape(shares.caption)}</h3><ul class="bars">{rows}</ul></div>'


def _chart(chart: Chart, id: str) -> str:
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 14 4" aria-hidden="true">'
        f'<path class="line {line.style}" d="M0 2H14"/>'
        f'</svg><span class="name">{escape(line.label)}</span>'
        + (f"<b>{escape(chart.write(line.curve.last))}</b>" if line.style != "faint" else "")
        + "</li>"
        for line in chart.lines
    )
    return (
        f'<figure class="chart"><figcaption><h3>{escape(chart.title)}</h3></figcaption>'
        f'<ul class="legend">{legend}</ul>{svg(chart, id)}</figure>'
    )
