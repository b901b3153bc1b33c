"""`obsinfra checkpoints list | verify`: what a run has saved, and whether it is sound."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from obsinfra.cli.runs import OutputDir, RunName, find

console = Console()


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    group = typer.Typer(help="Checkpoints of a run.", no_args_is_help=True)
    group.command("list")(list_checkpoints)
    group.command("verify")(verify)
    app.add_typer(group, name="checkpoints", rich_help_panel="Look")


def list_checkpoints(run: RunName = "latest", output_dir: OutputDir = Path("runs")) -> None:
    """Checkpoints, newest last."""
    from obsinfra.backup.backup_system import create_backup_system

    table = Table(box=None, pad_edge=False)
    for column in ("checkpoint", "kind", "epoch", "step", "made", "MB", "why"):
        table.add_column(column, overflow="fold")
    for info in create_backup_system(find(output_dir, run).checkpoints).list():
        table.add_row(
            info.path.stem,
            info.kind,
            str(info.epoch),
            str(info.step),
            info.created_at,
            f"{info.bytes_total / 1e6:.1f}",
            escape(info.reason or ""),
        )
    console.print(table)


def verify(run: RunName = "latest", output_dir: OutputDir = Path("runs")) -> None:
    """Read every chunk of every checkpoint and compare its hash; exit code 1 when one is damaged."""
    from obsinfra.backup.backup_system import create_backup_system

    damaged = 0
    for result in create_backup_system(find(output_dir, run).checkpoints).verify():
        if result.problem is None:
            console.print(f"[green]sound[/]    {result.path.stem}")
        else:
            damaged += 1
            console.print(f"[red]damaged[/]  {result.path.stem}: {escape(result.problem)}", soft_wrap=True)
    if damaged:
        raise typer.Exit(1)
