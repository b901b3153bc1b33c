"""The board that lays runs over each other: by step, or by the time they have been training.

Called by `dashboards.write`.
"""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.models.dashboard import Panel

from obsinfra.alerting import dashboard_recordings as recorded
from obsinfra.catalog import metrics
from obsinfra.catalog.alerts import Alert
from obsinfra.dashboards import variables
from obsinfra.dashboards.addresses import COMPARE, RUN, board_url
from obsinfra.dashboards.annotations import marks
from obsinfra.dashboards.board import Board, Row
from obsinfra.dashboards.panels import lines, link, named, overlay, rows
from obsinfra.dashboards.queries import RUNS as THESE
from obsinfra.dashboards.queries import Query, latest, of

ALONG = {"step": metrics.STEP.sample_name, "seconds of training": recorded.WALL.name}
"""What the curves are laid along."""

X = Query("max by (run) ($along{" + THESE + "})", name="along", shape="table")
ON_RUN = link("The run", board_url(RUN, run="${__field.labels.run}"))


def compare_board(alerts: Mapping[str, Alert]) -> Board:
    """The board with the thresholds of this table."""
    return Board(
        uid=COMPARE,
        title="Compare runs",
        about="Two or more runs laid over each other by step or by time of training, and side by side.",
        variables=[
            variables.datasource(),
            variables.model(),
            variables.runs(),
            variables.choice(
                "along",
                "Along",
                ALONG,
                "Steps go on after a restart; seconds count from the start of the run's present process.",
            ),
            variables.metric(),
            variables.smoothing(),
        ],
        marks=marks(THESE),
        rows=[
            Row("Side by side", [_summary(), _settings()]),
            Row("Laid over each other", _overlaid(alerts)),
            Row("Over time", _course()),
        ],
        span="6h",
    )


def _summary() -> Panel:
    def best(series: str) -> str:
        return f"max by (run) ({latest(series)})"

    return rows(
        "How far they came",
        [
            Query(best(of(metrics.STEP, THESE))),
            Query(f"avg by (run) ({latest(of(metrics.TRAIN_LOSS, THESE))})"),
            Query(best(of(metrics.VALIDATION_METRIC, f'{THESE}, metric="$metric"'))),
            Query(best(of(metrics.BEST_METRIC, THESE))),
            Query(f"avg by (run) (avg_over_time({recorded.THROUGHPUT.name}{{{THESE}}}[$__range]))"),
            Query(f"max by (run) ({latest(of(metrics.STEP_MEDIAN_SECONDS, THESE))})"),
            Query(f"max by (run) ({latest(f'{recorded.GOODPUT.name}{{{THESE}}}')})"),
            Query(f"max by (run) ({latest(f'{recorded.WALL.name}{{{THESE}}}')})"),
        ],
        columns={
            "run": "Run",
            "Value #A": "Step",
            "Value #B": "Loss",
            "Value #C": "Validation",
            "Value #D": "Best",
            "Value #E": "Samples/s, mean",
            "Value #F": "Median step",
            "Value #G": "Goodput",
            "Value #H": "Time of training",
        },
        units={
            "Step": "locale",
            "Samples/s, mean": "short",
            "Median step": "s",
            "Goodput": "percentunit",
            "Time of training": "s",
        },
        links={"Run": link("Open the run", board_url(RUN, run="${__value.raw}"))},
        sort=("Run", True),
        height=7,
        empty="no run in this time",
        about="The last word of each run within the time range. Validation is of the metric chosen at the "
        "top. Compare losses at equal steps, below, not here.",
    )


def _settings() -> Panel:
    return rows(
        "What they ran on",
        [
            Query(
                "max by (run, model, version, torch, python, revision, device, precision) "
                f"({latest(of(metrics.BUILD_INFO, THESE))})"
            )
        ],
        columns={
            "run": "Run",
            "model": "Model",
            "revision": "Revision",
            "version": "obsinfra",
            "torch": "PyTorch",
            "python": "Python",
            "device": "Device",
            "precision": "Precision",
        },
        sort=("Run", True),
        height=7,
        empty="no run in this time",
        about="Versions, device and precision: a difference here explains many a difference below. All "
        "settings are in each run's config.toml.",
    )


def _overlaid(alerts: Mapping[str, Alert]) -> list[Panel]:
    loss, norm = of(metrics.TRAIN_LOSS, THESE), of(metrics.GRADIENT_NORM, THESE)
    validation = of(metrics.VALIDATION_METRIC, f'{THESE}, metric="$metric"')
    rate = f"{recorded.THROUGHPUT.name}{{{THESE}}}"
    return [
        overlay(
            "Loss",
            X,
            Query(f"avg by (run) (avg_over_time({loss}[$smoothing]))", name="loss", shape="table"),
            by="run",
            unit="short",
            about="Training loss, mean of the ranks, smoothed as chosen, along steps or seconds. A resumed "
            "run that was killed goes back to its checkpoint and draws that stretch twice.",
        ),
        overlay(
            "Validation",
            X,
            Query(f"max by (run) ({validation})", name="validation", shape="table"),
            by="run",
            unit="short",
            about="The validation metric chosen at the top; level between two validations.",
        ),
        overlay(
            "Gradient norm",
            X,
            Query(f"avg by (run) (avg_over_time({norm}[$smoothing]))", name="norm", shape="table"),
            by="run",
            unit="short",
            logarithmic=True,
            about="Before clipping, mean of the ranks, smoothed as chosen, on a logarithmic axis.",
            mentions=named(alerts, "GradientExplosion"),
        ),
        overlay(
            "Samples per second",
            X,
            Query(f"max by (run) ({rate})", name="samples per second", shape="table"),
            by="run",
            unit="short",
            about="All ranks of a run together. Along seconds it shows start-up and warm-up; along steps "
            "what a change of data or length of sequence costs.",
        ),
    ]


def _course() -> list[Panel]:
    quantiles = recorded.STEP_QUANTILES
    return [
        lines(
            "Loss over time",
            [Query(f"avg by (run) (avg_over_time({of(metrics.TRAIN_LOSS, THESE)}[$smoothing]))", "{{run}}")],
            unit="short",
            about="The same losses by the clock: which run was when where.",
            links=[ON_RUN],
        ),
        lines(
            "Step time, p50 and p99",
            [
                Query(f"max by (run) ({quantiles['p50'].name}{{{THESE}}})", "{{run}} p50"),
                Query(f"max by (run) ({quantiles['p99'].name}{{{THESE}}})", "{{run}} p99"),
            ],
            unit="s",
            logarithmic=True,
            about="Over all ranks of each run, exact to a bucket. Runs alike in p50 and not in p99 differ in "
            "what interrupts them.",
            links=[ON_RUN],
        ),
    ]
