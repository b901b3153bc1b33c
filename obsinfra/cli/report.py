"""`obsinfra report`: one run, or one beside another, as a file to keep, send or print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from obsinfra.cli.history import sidecar_journal
from obsinfra.cli.runs import OutputDir, RunName, find
from obsinfra.errors import ConfigError

console = Console()
FORMATS = {"html": ".html", "markdown": ".md"}


def register(app: typer.Typer) -> None:
    """Add this command to the app."""
    app.command(rich_help_panel="Look")(report)


def report(
    run: RunName = "latest",
    output_dir: OutputDir = Path("runs"),
    compare: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Option(metavar="RUN2", help="A second run to set beside it."),
    ] = None,
    format: Annotated[str, typer.Option("--format", help="html or markdown.")] = "html",
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output", "-o", help="File to write; '-' for the terminal. Default: reports/ of the run."
        ),
    ] = None,
    state_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The sidecar's state folder; default: <output-dir>/.stack/sidecar."),
    ] = None,
) -> None:
    """A run in one file: curves, where the time went, alerts, actions, checkpoints, environment, settings."""
    from obsinfra.reporting.compose import compose
    from obsinfra.reporting.gather import gather
    from obsinfra.reporting.html_form import to_html
    from obsinfra.reporting.markdown_form import to_markdown
    from obsinfra.run.files import write_atomic

    if format not in FORMATS:
        raise ConfigError(f"format {format!r}", f"one of {', '.join(FORMATS)}", "correct --format")
    folder = find(output_dir, run)
    beside = find(output_dir, compare) if compare is not None else None
    with sidecar_journal(state_dir or output_dir / ".stack" / "sidecar") as journal:
        story = gather(folder, journal)
        other = gather(beside, journal) if beside is not None else None
    document = compose(story, other)
    text = to_html(document) if format == "html" else to_markdown(document)
    if output == Path("-"):
        print(text, end="")
        return
    target = output or folder.reports / (f"report{FORMATS[format]}")
    try:
        if output is None:
            target.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomic(target, text, mode=0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot write {target}: {error.strerror or error}", "a writable place", "choose another --output"
        ) from error
    console.print(f"{target}", soft_wrap=True, highlight=False)
