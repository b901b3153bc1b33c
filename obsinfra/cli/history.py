"""`obsinfra history`: what happened to a run, who asked for it, and what came of it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from obsinfra.cli.options import duration_seconds
from obsinfra.cli.runs import OutputDir, RunName, find
from obsinfra.cli.tables import print_table
from obsinfra.control.history import EVENT_KINDS, Event, as_document, events_of
from obsinfra.control.journal import Journal
from obsinfra.errors import ConfigError

console = Console()

COLOURS = {"problem": "red", "alert": "yellow", "checkpoint": "green", "command": "cyan"}
BAD_OUTCOMES = ("failed", "rejected", "expired", "undelivered", "unacknowledged")


def register(app: typer.Typer) -> None:
    """Add this command to the app."""
    app.command(rich_help_panel="Look")(history)


def history(
    run: RunName = "latest",
    output_dir: OutputDir = Path("runs"),
    since: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Option(help="Only the last 30s, 15m, 6h or 2d."),
    ] = None,
    kind: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help=f"Only these; may be given several times: {', '.join(EVENT_KINDS)}."),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last.")] = 100,
    state_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The sidecar's state folder; default: <output-dir>/.stack/sidecar."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document a line.")] = False,
) -> None:
    """What happened to a run, oldest first: starts, checkpoints, alerts, commands, and how each ended."""
    if unknown := sorted(set(kind or ()) - set(EVENT_KINDS)):
        raise ConfigError(f"kind {unknown[0]!r}", f"one of {', '.join(EVENT_KINDS)}", "correct --kind")
    folder = find(output_dir, run)
    begin = 0.0 if since is None else time.time() - duration_seconds(since, "--since")
    with sidecar_journal(state_dir or output_dir / ".stack" / "sidecar") as journal:
        events = [
            event for event in events_of(folder, journal, since=begin) if not kind or event.kind in kind
        ][-lines:]
    if as_json:
        for event in events:
            print(json.dumps(as_document(event)))
        return
    if not events:
        console.print(f"nothing is known of {folder.id}" + (f" since {since} ago" if since else ""))
        return
    print_table(console, _table(events))


def _table(events: list[Event]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("when", "step", "who", "what", "outcome", "why"):
        table.add_column(column, overflow="fold", no_wrap=column == "when")
    for event in events:
        colour = COLOURS.get(event.kind, "white")
        outcome = event.outcome
        if event.until is not None and event.until > event.at:
            outcome += f" in {event.until - event.at:.2f} s"
        bad = any(outcome.startswith(word) for word in BAD_OUTCOMES)
        table.add_row(
            f"{datetime.fromtimestamp(event.at):%Y-%m-%d %H:%M:%S}",
            "" if event.step is None else str(event.step),
            escape(event.who),
            f"[{colour}]{escape(event.what)}[/]",
            f"[red]{escape(outcome)}[/]" if bad else escape(outcome),
            escape(event.why),
        )
    return table


@contextlib.contextmanager
def sidecar_journal(state_dir: Path) -> Iterator[Journal | None]:
    """The sidecar's journal; None where no sidecar ever ran."""
    path = state_dir / "journal.sqlite"
    if not path.exists():
        yield None
        return
    try:
        journal = Journal(path)
    except (sqlite3.Error, OSError) as error:
        raise _unreadable(path, error) from error
    try:
        yield journal
    except sqlite3.Error as error:  # a page in its middle may be damaged
        raise _unreadable(path, error) from error
    finally:
        journal.close()


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot read {path}: {error}", "a sidecar's journal", "name its folder with --state-dir"
    )
