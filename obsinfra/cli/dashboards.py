"""`obsinfra dashboards`: Grafana's boards and provisioning, written, checked, and drawn without Grafana."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape

from obsinfra.catalog.alerts import Alert
from obsinfra.cli.generated import check_generated, write_generated
from obsinfra.config.resolve import resolve
from obsinfra.errors import UserError

console = Console()
Folder = Annotated[Path, typer.Option("--folder", help="Grafana's folder.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    group = typer.Typer(help="Grafana's boards, generated from the catalogue.", no_args_is_help=True)
    for name, command in (("write", write), ("check", check), ("preview", preview)):
        group.command(name)(command)
    app.add_typer(group, name="dashboards", rich_help_panel="Generate")


def write(folder: Folder = Path("grafana")) -> None:
    """Write boards and provisioning, with the tables thresholds and alerts of the environment or
    obsinfra.toml."""
    write_generated(_files(folder), console)


def check(folder: Folder = Path("grafana")) -> None:
    """Exit code 1 when a file is not what 'dashboards write' would write, or a board is not sound.

    Sound: stable uids, known metrics and variables, no panel without a unit and a description, links that
    lead somewhere; and Grafana's own types, as its SDK has them, read and write it without a change.
    """
    from obsinfra.dashboards.structure import differences_after_sdk, problems

    files = _files(folder)
    found: list[str] = []
    for path, text in files.items():
        if path.suffix == ".json":
            found += problems(json.loads(text))
            found += [f"{path}: {difference}" for difference in differences_after_sdk(text)]
    for problem in found:
        console.print(f"[red]{escape(problem)}[/]", soft_wrap=True)
    if found:
        raise typer.Exit(1)
    check_generated(
        files, console, fix="'obsinfra dashboards write'", fine=f"{folder}: {len(files)} files are up to date"
    )


def preview(
    folder: Folder = Path("grafana"),
    prometheus: Annotated[str, typer.Option(help="Address of the Prometheus to ask.")] = (
        "http://127.0.0.1:9090"
    ),
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("docs/images"),
    span: Annotated[
        Optional[str],  # noqa: UP045 - typer reads it at run time
        typer.Option("--range", help="Time range, as 15m; default: what each board opens with."),
    ] = None,
    until: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="End of the range, epoch seconds; default: now."),
    ] = None,
    scrape_interval: Annotated[str, typer.Option(help="That Prometheus's scrape interval.")] = "5s",
    choose: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--var",
            help="A variable's value, of all boards or of one: run=NAME, ranks:run=NAME; as often as needed.",
        ),
    ] = None,
) -> None:
    """Draw every board's panels with the answers of a real Prometheus, one PNG per board, without Grafana."""
    from obsinfra.dashboards.asking import Prometheus, Range, default_range, seconds_of

    try:
        from obsinfra.dashboards.preview import draw_board
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    found = sorted((folder / "dashboards").glob("*.json"))
    if not found:
        raise UserError(f"no boards in {folder / 'dashboards'}", "JSON files", "'obsinfra dashboards write'")
    wanted = [_choice(text) for text in choose or ()]
    end = until or time.time()
    asked = Prometheus(prometheus)
    out.mkdir(parents=True, exist_ok=True)
    for path in found:
        board = json.loads(path.read_text())
        over = default_range(board, end)
        start = end - seconds_of(span) if span else over.start
        over = Range(start, end, seconds_of(scrape_interval))
        target = out / f"dashboard-{path.stem}.png"
        chosen = {name: value for board_name, name, value in wanted if board_name in ("", path.stem)}
        draw_board(board, asked, over, chosen, target)
        console.print(f"drew {escape(str(target))}", soft_wrap=True)


def _choice(text: str) -> tuple[str, str, str]:
    """Board (empty for all), variable and value."""
    match = re.fullmatch(r"(?:([\w-]+):)?(\w+)=(.*)", text)
    if match is None:
        raise UserError(f"--var {text!r}", "NAME=VALUE or BOARD:NAME=VALUE, as run=my-run")
    return match[1] or "", match[2], match[3]


def _not_installed(error: ModuleNotFoundError) -> UserError:
    return UserError(
        f"{error.name} is not installed",
        "what the boards are built and drawn with",
        "pip install 'obsinfra[dashboards]'",
    )


def _files(folder: Path) -> dict[Path, str]:
    try:
        from obsinfra.dashboards.write import dashboard_files
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    return {folder / path: text for path, text in dashboard_files(_table()).items()}


def _table() -> tuple[Alert, ...]:
    return resolve({}).settings.alert_table()
