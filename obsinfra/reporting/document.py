"""What a report is made of, whatever it is written as: tiles, tables, charts, shares. Plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from obsinfra.reporting.gather import Curve

Tone = Literal["", "strong", "quiet", "good", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A text and what it means."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns; a column whose name ends in `#` has numbers, the mark is not shown."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    none: str = ""
    """Said when there are no rows."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart. `style`: `main`, `faint` (the raw values behind a smoothed line), `other` (the run
    compared with), or `second` to `fourth` for further quantities of the same run."""

    label: str
    curve: Curve
    style: Literal["main", "faint", "other", "second", "third", "fourth"] = "main"
    points: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over steps.

    Attributes:
        write: a value as text; `axis` the same for its ticks.
        limit: a threshold to be drawn where it is in reach.
        alerts, checkpoints: steps to be marked.
        floor, ceiling: ends of the axis, where they are given.
        log: whether a logarithmic axis serves better when the values are wide apart.
    """

    title: str
    lines: tuple[Line, ...]
    write: Callable[[float | None], str]
    axis: Callable[[float], str]
    limit: float | None = None
    alerts: tuple[int, ...] = ()
    checkpoints: tuple[int, ...] = ()
    floor: float | None = None
    ceiling: float | None = None
    log: bool = False


@dataclass(frozen=True, slots=True)
class Shares:
    """Parts of a whole: name, share from 0 to 1, the amount as text."""

    caption: str
    parts: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


Block = Table | Chart | Shares | Text


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what is under it; charts are set side by side."""

    title: str
    blocks: tuple[Block, ...]
    open: bool = True
    """Whether it is unfolded at first, where the form can fold."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A key number, what it is, and a note."""

    name: str
    value: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report."""

    title: str
    run: str
    state: str
    facts: tuple[str, ...]
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    made: str
    reason: str = field(default="")
