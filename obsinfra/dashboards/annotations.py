"""What happened, as marks on every curve: alerts, checkpoints, commands, starts and restarts.

Called by the boards. All from Prometheus, so that Grafana needs neither a plugin nor the sidecar's token.
"""

from __future__ import annotations

from dataclasses import dataclass

from obsinfra.catalog import metrics
from obsinfra.catalog.metrics import Metric
from obsinfra.dashboards.queries import of

STEP = "15s"
"""Annotation queries look every so often; one scrape at least lies between two looks."""


@dataclass(frozen=True, slots=True)
class Marks:
    """One kind of mark.

    Attributes:
        name: on the switch at the top of the board.
        expression: PromQL; a mark wherever it has a value.
        title, text: with `{{label}}`.
        colour: of the mark.
    """

    name: str
    expression: str
    title: str
    text: str
    colour: str


def marks(where: str) -> tuple[Marks, ...]:
    """The marks of the runs that `where` selects."""
    events = "run, model, rank"
    return (
        Marks(
            "Alerts",
            "max by (alertname, severity, run, rank, device) "
            f'(ALERTS{{alertstate="firing", run!="", {where}}})',
            "{{alertname}}",
            "{{severity}} {{run}} {{rank}} {{device}}",
            "red",
        ),
        Marks(
            "Checkpoints",
            f"sum by ({events}, kind) ({_counted(metrics.CHECKPOINTS, where)})",
            "{{kind}} checkpoint",
            "committed by rank {{rank}} of {{run}}",
            "green",
        ),
        Marks(
            "Commands",
            f"sum by ({events}, action, outcome) ({_counted(metrics.CONTROL_COMMANDS, where)})",
            "{{action}}: {{outcome}}",
            "command to rank {{rank}} of {{run}}",
            "purple",
        ),
        Marks(
            "Starts",
            # Younger than two looks, by its own clock: a scrape that was missed is no restart.
            f"sum by ({events}) ({of(metrics.PHASE_SECONDS, where)}) < 30",
            "start or restart",
            "rank {{rank}} of {{run}}",
            "blue",
        ),
    )


def _counted(metric: Metric, where: str) -> str:
    """Where a counter rose, or came to be above zero, since the last look."""
    series = of(metric, where)
    return f"({series} - {series} offset {STEP} > 0) or ({series} > 0 unless {series} offset {STEP})"
