"""`obsinfra rules`: Prometheus's rules, written from the alert table, compared with it, and tested."""

from __future__ import annotations

import difflib
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from obsinfra.alerting.prometheus_rules import render_rules, write_rules
from obsinfra.alerting.rule_tests import write_rule_tests
from obsinfra.catalog.alerts import Alert
from obsinfra.cli.generated import check_generated, content_of, write_generated
from obsinfra.config.resolve import resolve
from obsinfra.errors import UserError

console = Console()
RulesFile = Annotated[Path, typer.Option("--file", help="The generated file.")]
DEFAULT_FILE = Path("prometheus/rules/obsinfra.yml")


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    group = typer.Typer(help="Prometheus rules generated from the alert table.", no_args_is_help=True)
    for name, command in (("write", write), ("check", check), ("diff", diff), ("test", test)):
        group.command(name)(command)
    app.add_typer(group, name="rules", rich_help_panel="Generate")


def write(file: RulesFile = DEFAULT_FILE) -> None:
    """Write the rules, with the tables thresholds and alerts of the environment or obsinfra.toml."""
    write_generated({file: render_rules(_table())}, console)


def check(file: RulesFile = DEFAULT_FILE) -> None:
    """Exit code 1 when the file is not what 'rules write' would write."""
    check_generated(
        {file: render_rules(_table())},
        console,
        fix="'obsinfra rules write', or see 'obsinfra rules diff' ('obsinfra up' makes its own file)",
        fine=f"{file} is up to date",
    )


def diff(file: RulesFile = DEFAULT_FILE) -> None:
    """Show what 'rules write' would change; exit code 1 when there is something."""
    found, wanted = content_of(file) or "", render_rules(_table())
    if found == wanted:
        console.print(f"{file} is up to date")
        return
    for line in difflib.unified_diff(
        found.splitlines(), wanted.splitlines(), str(file), "generated", lineterm=""
    ):
        colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "default")
        console.print(f"[{colour}]{escape(line)}[/]", soft_wrap=True, highlight=False)
    raise typer.Exit(1)


def test(
    promtool: Annotated[
        str, typer.Option(help="The promtool to use: a name on PATH or a path.")
    ] = "promtool",
) -> None:
    """Play series to every alert with promtool: it fires, waits and resolves as the table says.

    The rules are made anew from the table, with the tables thresholds and alerts of the environment
    or obsinfra.toml; no file is read. Exit code 1 when a test fails.
    """
    table = _table()
    with tempfile.TemporaryDirectory(prefix="obsinfra-rules-") as folder:
        rules = Path(folder) / "obsinfra.yml"
        write_rules(rules, table)
        checked = _run(promtool, "check", "rules", "--lint-fatal", str(rules))
        played = _run(promtool, "test", "rules", *map(str, write_rule_tests(Path(folder), table)))
    for done in (checked, played):
        if done.returncode:
            console.print(escape((done.stdout + done.stderr).strip()), soft_wrap=True, highlight=False)
            raise typer.Exit(1)
    version = (_run(promtool, "--version").stdout.splitlines() or ["promtool"])[0]
    said = f"{len(table)} alerts: rules valid, each fires, waits and resolves"
    console.print(f"{said} ({version.split(' (')[0]})", soft_wrap=True)


def _table() -> tuple[Alert, ...]:
    return resolve({}).settings.alert_table()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except OSError as error:
        raise UserError(
            f"cannot run {command[0]}: {error.strerror or error}",
            "Prometheus's promtool",
            "install Prometheus (Debian: apt install prometheus) or name it with --promtool",
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} did not come to an end within 300 s", "a promtool that answers"
        ) from None
