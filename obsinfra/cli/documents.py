"""`obsinfra docs`: reference pages that are generated from the catalogue, written or checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from obsinfra.alerting.promql import expression
from obsinfra.alerting.wording import plain_number, summary_template, threshold_text, until_text
from obsinfra.catalog.alert_changes import FIELDS
from obsinfra.catalog.alerts import ALERTS
from obsinfra.catalog.condition_changes import AGGREGATIONS
from obsinfra.catalog.conditions import window_of
from obsinfra.catalog.metrics import (
    METRICS,
    RECORDED_PER_RANK,
    RECORDED_PER_RUN,
    RUN_LABELS,
    SERIES_PER_ACTION,
    SERIES_PER_DEVICE,
    SERIES_PER_RANK,
)
from obsinfra.catalog.units import UNITS
from obsinfra.cli.actions_page import render_actions_page
from obsinfra.cli.generated import check_generated, write_generated

console = Console()
Folder = Annotated[Path, typer.Option("--folder", help="The folder of the pages.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    group = typer.Typer(help="Reference pages generated from the catalogue.", no_args_is_help=True)
    group.command("write")(docs_write)
    group.command("check")(docs_check)
    app.add_typer(group, name="docs", rich_help_panel="Generate")


def docs_write(folder: Folder = Path("docs")) -> None:
    """Write every generated page."""
    write_generated(_files(folder), console)


def docs_check(folder: Folder = Path("docs")) -> None:
    """Exit code 1 when a page is not what 'docs write' would write."""
    files = _files(folder)
    fine = ", ".join(map(str, files)) + " are up to date"
    check_generated(files, console, fix="'obsinfra docs write'", fine=fine)


def _files(folder: Path) -> dict[Path, str]:
    return {folder / name: render() for name, render in PAGES.items()}


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
        "",
        f"Budget of time series, kept by a test: a rank exports at most {SERIES_PER_RANK}, and "
        f"{SERIES_PER_DEVICE} more for each GPU that it sees and {SERIES_PER_ACTION} more for each action it "
        f"was told; Prometheus records at most {RECORDED_PER_RUN} of a run and {RECORDED_PER_RANK} of each "
        "rank. No label holds a step, a path, a text or an id.",
    ]
    for source, heading in (("trainer", "Trainer"), ("sidecar", "Sidecar")):
        lines += ["", f"## {heading}", "", "| metric | kind | labels | meaning |", "|---|---|---|---|"]
        for metric in METRICS:
            if metric.source == source:
                labels = ", ".join(f"`{name}`" for name in metric.labels)
                lines.append(f"| `{metric.sample_name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"


def render_alerts_page() -> str:
    """docs/alerts.md: the alert table with its defaults, and how to change it."""
    lines = [
        "# Alerts",
        "",
        "Generated from `obsinfra/catalog/alerts.py` by `obsinfra docs write`; do not edit by hand.",
        "",
        "Each alert has a runbook of its name in `docs/runbooks/`. `obsinfra rules test` plays series to "
        "every one with promtool and shows that it fires, waits and resolves. In `obsinfra.toml`:",
        "",
        "```toml",
        "[thresholds]",
        "gpu_temperature = 80          # the key below, in the unit below",
        "",
        "# any of: " + ", ".join(FIELDS),
        "[alerts.data_share]",
        "window_seconds = 600",
        'action = "checkpoint"         # or "none"',
        'runbook_url = "https://wiki.example.org/data"',
        "",
        "[alerts.gpu_temperature]",
        "clear_threshold = 70          # fires beyond the threshold, goes on until it is back here",
        "",
        "[alerts.gpu_idle]",
        "enabled = false",
        "",
        "[alerts.gpu_utilization]      # another condition: the next section",
        'metric = "obsinfra_gpu_power_watts"',
        'aggregation = "average"',
        'comparator = "<"',
        "window_seconds = 300",
        "threshold = 0.2",
        'threshold_unit = "kW"',
        "```",
        "",
        "Then `obsinfra rules write` writes Prometheus's rules; `obsinfra up` and `obsinfra train` read the "
        "settings themselves. “Alone” says that a trainer without Prometheus judges the alert as well. A "
        "summary may name `{threshold}`; summary and description may name labels, as `{{ $labels.run }}`. "
        "Without `clear_threshold` an alert ends at its threshold; where the table has one, it gives way to "
        "a threshold set beyond it. Alerts over a window take none, nor do those held against a number that "
        "moves. An alert of another name or expression is a rule of your own: a file beside the generated "
        "one in `prometheus/rules/`, to which the sidecar's policy and the routes to people apply as well.",
        "",
        *_condition_section(),
        "",
        "## The table",
        "",
        "| alert | key | fires when | for | severity | scope | action | alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for alert in ALERTS:
        window = window_of(alert.condition)
        over = f", over {plain_number(window)} s" if window else ""
        meaning = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"‹\1›", summary_template(alert))
        limit = (
            f" ({alert.comparator} {threshold_text(alert)}{until_text(alert)}{over})" if alert.metric else ""
        )
        lines.append(
            f"| [{alert.name}](runbooks/{alert.name}.md) | `{alert.key}` | {meaning}{limit} "
            f"| {plain_number(alert.for_seconds)} s | {alert.severity} | {alert.scope} "
            f"| {alert.action.name if alert.action else '–'} | {'yes' if alert.in_process else 'no'} |"
        )
    lines += ["", "## Expressions", ""]
    for alert in ALERTS:
        lines += [f"**{alert.name}** – {alert.description}", "", "```promql", expression(alert), "```", ""]
    return "\n".join(lines)


def _condition_section() -> list[str]:
    """How to have an alert look at something else."""
    rows = [
        f"| `{name}` | {row.kind} | {row.meaning} | "
        + ", ".join([*(f"`{field}`" for field in row.needs), *(f"[`{field}`]" for field in row.optional)])
        + " |"
        for name, row in AGGREGATIONS.items()
    ]
    units = "; ".join(
        f"{quantity}: {', '.join(f'`{unit}`' if unit else 'none' for unit in of)}"
        for quantity, of in UNITS.items()
    )
    return [
        "## What an alert looks at",
        "",
        "Each alert holds one number, made of a `metric` (of [metrics.md](metrics.md), or of the stack's own "
        "that alerts below look at) by an `aggregation`, with a `comparator` (`>` or `<`) against its "
        "threshold. Each of them can be set; what is not set stays as the table has it. An aggregation of "
        "another kind needs the fields that the last column names (those in brackets may be left out):",
        "",
        "| aggregation | of a | the number | needs |",
        "|---|---|---|---|",
        *rows,
        "",
        '- `where` picks series by their labels, as `where = { reason = ["hw_slowdown"] }`; with another '
        "metric the table's is dropped. Of `up`, `where = { job = … }` says whose.",
        "- `threshold_unit` is one that the number can be in, and is the base unit when the number becomes "
        f"one of another kind ({units}). A number of another kind also needs a `threshold` of its own.",
        "- `scope` says what one firing speaks of, and must be one that the labels of the series tell. An "
        "alert about a series that has a label `run` goes to that run, whatever its scope; one about a host "
        'that has none (HostDown with `scope = "host"`) to every live run on that host. Scope `stack` speaks '
        "of no run and takes no action.",
        "- Without a `summary` and `description` of yours, people read what is looked at instead of the "
        "table's sentences, which would no longer be true. The runbook stays, unless `runbook_url` is set; a "
        "clearing threshold of the table goes.",
        "- An alert about metrics of the sidecar or the stack, or of `against_peers`, is judged by "
        "Prometheus alone; every other one by a trainer without it too, with the same outcome.",
        "- `increase` with `<` holds once the counter is as old as the window, so that a start is no "
        "standstill. `average`, `highest` and `lowest` take a younger series for what there is of it, and "
        "end with it.",
        "",
        "What does not fit together is refused with exit code 2 and what would fit. `obsinfra rules diff` "
        "shows what a change makes of the rules, and `obsinfra rules test` plays series to the changed alert "
        "as well.",
    ]


PAGES: dict[str, Callable[[], str]] = {
    "metrics.md": render_metrics_page,
    "alerts.md": render_alerts_page,
    "actions.md": render_actions_page,
}
