"""Entry point of `obsinfra`: the commands, and how errors reach a person.

A `UserError` becomes one line on stderr and exit code 2. torch is imported only by the commands that need it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from obsinfra.cli import alerts, checkpoints, dashboards, documents, history, report, rules, runs, stack
from obsinfra.cli.options import with_settings
from obsinfra.cli.tables import print_table
from obsinfra.config.resolve import resolve
from obsinfra.config.settings import Settings, group_of
from obsinfra.errors import ObsinfraError

app = typer.Typer(
    name="obsinfra",
    help="An observability-first PyTorch training stack: what is observed is acted on.\n\n"
    "Begin with [bold]obsinfra doctor[/bold], [bold]obsinfra demo[/bold] and [bold]obsinfra train[/bold].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()
stderr = Console(stderr=True, highlight=False)

ConfigFile = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads it at run time
    typer.Option("--config", help="TOML file of settings; default: obsinfra.toml in this folder, if any."),
]

MANY = "Several ranks"
Ranks = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--nproc-per-node", help="Processes on this host: N, gpu, cpu or auto.", rich_help_panel=MANY
    ),
]


@app.command(rich_help_panel="Train")
@with_settings
def train(
    flags: dict[str, Any],
    config: ConfigFile = None,
    nproc_per_node: Ranks = None,
    nnodes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Hosts: N, or MIN:MAX for a run that goes on with fewer.", rich_help_panel=MANY),
    ] = None,
    rdzv_endpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="HOST:PORT where the hosts meet, the same on each.", rich_help_panel=MANY),
    ] = None,
    rdzv_id: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Name of the job, the same on each host.", rich_help_panel=MANY),
    ] = None,
    rdzv_conf: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="More for torchrun's rendezvous: KEY=VALUE,…", rich_help_panel=MANY),
    ] = None,
    local_addr: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="This host's address as the others reach it.", rich_help_panel=MANY),
    ] = None,
    max_restarts: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=0, help="Start the ranks again after a failure, so often at most.", rich_help_panel=MANY
        ),
    ] = None,
) -> None:
    """Train a model, watched and saved.

    Every setting can also come from the environment (OBSINFRA_<NAME>) or a TOML file; a flag wins over the
    environment, the environment over the file. On SIGTERM or Ctrl-C the run checkpoints and stops with exit
    code 128 + signal; 'obsinfra train --resume auto' goes on exactly where it was.

    With --nproc-per-node or any other option of "Several ranks" it is torchrun that starts the processes;
    'torchrun … -m obsinfra.cli train …' is the same.
    """
    from obsinfra.cli.launch import Launcher, launch
    from obsinfra.cli.training import run_training

    launcher = Launcher(nproc_per_node, nnodes, rdzv_endpoint, rdzv_id, rdzv_conf, local_addr, max_restarts)
    if launcher.wanted:
        raise typer.Exit(launch(launcher, flags, config))
    raise typer.Exit(run_training(flags, config))


@app.command(rich_help_panel="Train")
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the demo's runs and stack.")] = Path(
        "runs/demo"
    ),
    stack_mode: Annotated[
        str,
        typer.Option(
            "--stack", help="auto: real Prometheus and Alertmanager where installed; off: in-process."
        ),
    ] = "auto",
) -> None:
    """The whole story in under two minutes.

    Trains, makes the gradients explode, sees the alert, gets the emergency checkpoint, kills the trainer with
    SIGKILL, resumes, and proves that the continuation is identical.
    """
    from obsinfra.deployment.demo import run_demo

    raise typer.Exit(run_demo(output_dir, stack_mode, console))


@app.command(rich_help_panel="Look")
def doctor(
    output_dir: Annotated[Path, typer.Option(help="Folder where runs would go.")] = Path("runs"),
) -> None:
    """What this machine has, what is missing, and what to do about it."""
    from obsinfra.deployment.doctor import examine

    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    marks = {"ok": "[green]ok[/]", "missing": "[yellow]missing[/]", "problem": "[red]problem[/]"}
    findings = examine(output_dir)
    for finding in findings:
        table.add_row(marks[finding.status], finding.name, escape(finding.detail), escape(finding.fix or ""))
    print_table(console, table, prose=True)
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command(rich_help_panel="Train")
def models() -> None:
    """The workloads that --model-name knows."""
    from obsinfra.workloads.registry import available_workloads

    for name, description in available_workloads().items():
        console.print(f"[bold]{name}[/bold]  {escape(description)}")


config_app = typer.Typer(help="Settings and where their values come from.", no_args_is_help=True)
app.add_typer(config_app, name="config", rich_help_panel="Look")


@config_app.callback()
def _config() -> None:
    """Settings and where their values come from."""


@config_app.command("show")
@with_settings
def config_show(flags: dict[str, Any], config: ConfigFile = None) -> None:
    """Each resolved setting, its value and its origin."""
    resolved = resolve(flags, file=config)
    table = Table(box=None, pad_edge=False)
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    group = ""
    for field in Settings.model_fields:
        if group_of(field) != group:
            group = group_of(field)
            table.add_row(f"[bold]{group}[/]", "", "")
        value = getattr(resolved.settings, field)
        origin = resolved.origins[field]
        table.add_row(
            f"  {field}",
            escape(_as_typed(value)),
            origin if origin == "default" else f"[cyan]{escape(origin)}[/]",
        )
    print_table(console, table, prose=True)


def _as_typed(value: Any) -> str:
    """A setting as one would write it into a variable; `–` where there is nothing."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, dict):
        return ",".join(f"{key}={text}" for key, text in _flat(value)) or "–"
    return "–" if value is None else ",".join(value) if isinstance(value, tuple) else str(value)


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in table.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(item)


runs.register(app)
history.register(app)
report.register(app)
stack.register(app)
alerts.register(app)
checkpoints.register(app)
rules.register(app)
dashboards.register(app)
documents.register(app)


MISUSED: type[Any] = typer.BadParameter.__mro__[1]
"""typer's UsageError (unknown option, missing value), which it exports under no name of its own."""


def main() -> None:
    """Run the CLI; errors made for people become one line."""
    try:
        sys.exit(app(prog_name="obsinfra", standalone_mode=False))
    except ObsinfraError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except MISUSED as error:
        if not error.message:  # no arguments at all: typer has the help at hand
            error.show()
        else:
            command = error.ctx.command_path if error.ctx else "obsinfra"
            _complain(f"{error.format_message().rstrip('.')}; fix: see '{command} --help'")
        sys.exit(2)
    except typer.Abort:
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(141)


def _complain(text: str) -> None:
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ and "WORLD_SIZE" in os.environ else ""
    stderr.print(f"[bold red]error{rank}:[/] {escape(text)}", soft_wrap=True)


if __name__ == "__main__":
    main()
