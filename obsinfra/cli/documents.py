"""`obsinfra rules | docs`: committed files that are generated from the catalogue, written or checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from obsinfra.alerting.prometheus_rules import render_rules
from obsinfra.catalog.alerts import with_thresholds
from obsinfra.catalog.metrics import METRICS, RUN_LABELS
from obsinfra.config.resolve import resolve
from obsinfra.run.files import write_atomic

console = Console()
RulesFile = Annotated[Path, typer.Option("--file", help="The generated file.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    for name, help_text, write, check in (
        ("rules", "Prometheus rules generated from the alert table.", rules_write, rules_check),
        ("docs", "Reference pages generated from the catalogue.", docs_write, docs_check),
    ):
        group = typer.Typer(help=help_text, no_args_is_help=True)
        group.command("write")(write)
        group.command("check")(check)
        app.add_typer(group, name=name, rich_help_panel="Generate")


def rules_write(file: RulesFile = Path("prometheus/rules/obsinfra.yml")) -> None:
    """Write the rules, with the thresholds of the environment or obsinfra.toml."""
    _write(file, render_rules(with_thresholds(resolve({}).settings.thresholds)))


def rules_check(file: RulesFile = Path("prometheus/rules/obsinfra.yml")) -> None:
    """Exit code 1 when the file is not what 'rules write' would write."""
    _check(file, render_rules(with_thresholds(resolve({}).settings.thresholds)), "obsinfra rules write")


def docs_write(file: RulesFile = Path("docs/metrics.md")) -> None:
    """Write docs/metrics.md."""
    _write(file, render_metrics_page())


def docs_check(file: RulesFile = Path("docs/metrics.md")) -> None:
    """Exit code 1 when docs/metrics.md is not what 'docs write' would write."""
    _check(file, render_metrics_page(), "obsinfra docs write")


def render_metrics_page() -> str:
    """docs/metrics.md: every metric of the catalogue, by exporter."""
    lines = [
        "# Metrics",
        "",
        "Generated from `obsinfra/catalog/metrics.py` by `obsinfra docs write`; do not edit by hand.",
        "",
        f"Every metric of a trainer also carries the labels {', '.join(f'`{name}`' for name in RUN_LABELS)}. "
        "Counters are shown with the `_total` they have on the wire. A metric whose source is absent "
        "(no GPU, no container limit, no validation yet) is absent, not zero.",
    ]
    for source, heading in (("trainer", "Trainer"), ("sidecar", "Sidecar")):
        lines += ["", f"## {heading}", "", "| metric | kind | labels | meaning |", "|---|---|---|---|"]
        for metric in METRICS:
            if metric.source == source:
                labels = ", ".join(f"`{name}`" for name in metric.labels)
                lines.append(f"| `{metric.sample_name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text, mode=0o644)
    console.print(f"wrote {file}")


def _check(file: Path, text: str, command: str) -> None:
    if not file.exists() or file.read_text() != text:
        console.print(f"[red]{file} is out of date[/]: run '{command}'")
        raise typer.Exit(1)
    console.print(f"{file} is up to date")
