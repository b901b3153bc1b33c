"""The board of all runs: what runs, how well, what fires, and which run to look at first.

Called by `dashboards.write`.
"""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.models.dashboard import Panel

from obsinfra.alerting import dashboard_recordings as recorded
from obsinfra.catalog import metrics
from obsinfra.catalog.alerts import Alert
from obsinfra.dashboards import variables
from obsinfra.dashboards.addresses import ALERTS, COMPARE, FLEET, GPU_HOST, RANKS, RUN, board_url
from obsinfra.dashboards.annotations import marks
from obsinfra.dashboards.board import Board, Row
from obsinfra.dashboards.panels import NO_GPU, bars, lines, link, named, number, rows, value_names
from obsinfra.dashboards.queries import RUNS as THESE
from obsinfra.dashboards.queries import Query, latest, of
from obsinfra.dashboards.run_board import STATES

OF_RUN = "${__field.labels.run}"
ON_RUN = link("The run", board_url(RUN, run=OF_RUN))
ON_RANKS = link("Its ranks", board_url(RANKS, run=OF_RUN))
ON_HOST = link("Its GPUs and host", board_url(GPU_HOST, run=OF_RUN))
ON_ALERTS = link("Alerts and actions", board_url(ALERTS))
WORST = 5
EACH_GPU = "max by (run, host, device)"
FIRING = f'ALERTS{{alertstate="firing", run!="", {THESE}}}'


def fleet_board(alerts: Mapping[str, Alert]) -> Board:
    """The board with the thresholds of this table."""
    return Board(
        uid=FLEET,
        title="Fleet",
        about="All runs: state, goodput, GPU hours, alerts, and which of them to look at first.",
        variables=[variables.datasource(), variables.model(), variables.runs()],
        marks=marks(THESE),
        rows=[
            Row("Now", _now()),
            Row("Runs", [_runs()]),
            Row("Look at these first", _worst(alerts)),
            Row("Over time", _course()),
        ],
        span="6h",
    )


def _now() -> list[Panel]:
    state = of(metrics.RUN_STATE, f'state="running", {THESE}')
    gpus = f"count by (host, device) ({of(metrics.GPU_MEMORY_TOTAL_BYTES, THESE)})"
    return [
        number(
            "Training",
            [Query(f"count(max by (run) ({state}) == 1) or vector(0)", "runs")],
            unit="none",
            about="Runs whose trainer says `running` and is scraped. A dip that no run's end explains is a "
            "host or the sidecar.",
        ),
        number(
            "Not answering",
            [Query(f'count(up{{job="trainers", {THESE}}} == 0) or vector(0)', "processes")],
            unit="none",
            graph=False,
            about="Ranks that the sidecar knows and Prometheus cannot scrape. Anything but 0 alerts after "
            "half a minute.",
        ),
        number(
            "Goodput",
            [Query(f"avg({recorded.GOODPUT.name}{{{THESE}}})", "goodput")],
            unit="percentunit",
            about="Mean over the runs of the productive share of their time. The worst are listed below.",
        ),
        number(
            "Samples/s",
            [Query(f"sum({recorded.THROUGHPUT.name}{{{THESE}}})", "samples/s")],
            unit="short",
            about="All runs together; a number for how busy the fleet is, not for comparing unlike models.",
        ),
        number(
            "GPUs in use",
            [Query(f"count({gpus})", "GPUs")],
            unit="none",
            empty=NO_GPU,
            about="Different GPUs that trainers see now, counted once however many ranks see them.",
        ),
        number(
            "GPU hours",
            [
                Query(
                    f"sum(sum_over_time({recorded.GPUS.name}{{{THESE}}}[$__range:30s])) / 120",
                    "GPU hours",
                    instant=True,
                )
            ],
            unit="suffix: h",
            graph=False,
            empty=NO_GPU,
            about="GPUs × hours within the time range, looked at every 30 seconds: what the runs held, "
            "whether they used it or not.",
        ),
        number(
            "Alerts firing",
            [Query(f"count({FIRING}) or vector(0)", "alerts")],
            unit="none",
            about="Alerts that Prometheus holds firing about these runs now.",
            links=[ON_ALERTS],
        ),
        number(
            "Hosts",
            [Query(f"count(count by (host) ({of(metrics.BUILD_INFO, THESE)}))", "hosts")],
            unit="none",
            about="Different hosts that a trainer of these runs is scraped on.",
        ),
    ]


def _runs() -> Panel:
    by = "max by (run, model)"
    return rows(
        "All runs",
        [
            Query(f"max by (run, model, state) ({latest(of(metrics.RUN_STATE, THESE))} == 1)"),
            Query(f"{by} ({latest(of(metrics.STEP, THESE))})"),
            Query(f"avg by (run, model) ({latest(of(metrics.TRAIN_LOSS, THESE))})"),
            Query(f"{by} ({recorded.THROUGHPUT.name}{{{THESE}}})"),
            Query(f"{by} ({latest(f'{recorded.GOODPUT.name}{{{THESE}}}')})"),
            Query(f"{by} ({recorded.GPUS.name}{{{THESE}}})"),
            Query(f"count by (run, model) ({FIRING})"),
            Query(f"min by (run, model) ({of(metrics.CHECKPOINT_AGE_SECONDS, THESE)})"),
            Query(f"{by} ({of(metrics.ETA_SECONDS, THESE)})"),
        ],
        height=9,
        columns={
            "run": "Run",
            "model": "Model",
            "state": "State",
            "Value #B": "Step",
            "Value #C": "Loss",
            "Value #D": "Samples/s",
            "Value #E": "Goodput",
            "Value #F": "GPUs",
            "Value #G": "Alerts",
            "Value #H": "Last checkpoint",
            "Value #I": "Time left",
        },
        units={
            "Step": "locale",
            "Samples/s": "short",
            "Goodput": "percentunit",
            "Last checkpoint": "s",
            "Time left": "s",
        },
        mappings={"State": [value_names({state: (state, colour) for state, colour in STATES.items()})]},
        links={"Run": link("Open the run", board_url(RUN, run="${__value.raw}"))},
        sort=("Run", True),
        empty="no run in this time",
        about="One row per run of the time range, with its last words: click its name to open it. Empty "
        "cells of a run that has ended are as they should be.",
    )


def _worst(alerts: Mapping[str, Alert]) -> list[Panel]:
    promise = (
        f"max by (run) ({of(metrics.CHECKPOINT_AGE_SECONDS, THESE)} / "
        f"{of(metrics.CHECKPOINT_PROMISE_SECONDS, THESE)})"
    )
    return [
        bars(
            "Most time lost",
            [
                Query(
                    f"topk({WORST}, max by (run) (obsinfra:lost_share:ratio{{{THESE}}}))",
                    "{{run}}",
                    instant=True,
                )
            ],
            unit="percentunit",
            width=6,
            ceiling=1,
            about="Share of the last half hour that was not productive, the worst rank's. The run's board "
            "says to which cause it went.",
            alerts=named(alerts, "GoodputLow"),
            links=[ON_RUN],
        ),
        bars(
            "Waiting for data",
            [
                Query(
                    f"topk({WORST}, max by (run) (obsinfra:data_share:ratio{{{THESE}}}))",
                    "{{run}}",
                    instant=True,
                )
            ],
            unit="percentunit",
            width=6,
            ceiling=1,
            about="Share of the last five minutes spent waiting for the next batch, the worst rank's.",
            alerts=named(alerts, "DataStarvation"),
            links=[ON_RUN],
        ),
        bars(
            "Slowest rank against its peers",
            [
                Query(
                    f"topk({WORST}, max by (run) (obsinfra:step_own_median:ratio_to_peers{{{THESE}}}))",
                    "{{run}}",
                    instant=True,
                )
            ],
            unit="suffix:×",
            width=6,
            about="What of the slowest rank's step waits for no other rank ÷ that of the run's median rank; "
            "1 for a run of one rank.",
            alerts=named(alerts, "StragglerRank"),
            links=[ON_RANKS],
        ),
        bars(
            "Memory nearest to its limit",
            [
                Query(
                    f"topk({WORST}, max by (run) ({of(metrics.MEMORY_PRESSURE_RATIO, THESE)}))",
                    "{{run}}",
                    instant=True,
                )
            ],
            unit="percentunit",
            width=6,
            ceiling=1,
            about="Memory in use on the run's fullest host, against the container's limit or the host's.",
            alerts=named(alerts, "HighMemory"),
            links=[ON_HOST],
        ),
        bars(
            "Oldest checkpoint against promise",
            [Query(f"topk({WORST}, {promise})", "{{run}}", instant=True)],
            unit="suffix:×",
            width=6,
            empty="no run promises any",
            about="Age of the last commit ÷ the longest age that the run's settings promise.",
            alerts=named(alerts, "CheckpointTooOld"),
            links=[ON_RUN],
        ),
        bars(
            "Least busy GPUs",
            [
                Query(
                    f"bottomk({WORST}, {EACH_GPU} ({of(metrics.GPU_UTILIZATION_RATIO, THESE)}))",
                    "{{run}} {{host}} {{device}}",
                    instant=True,
                )
            ],
            unit="percentunit",
            width=6,
            ceiling=1,
            empty=NO_GPU,
            about="Share of time in which a kernel was running, of the devices that do least: they cost as "
            "much as the others.",
            alerts=named(alerts, "GPUIdle"),
            links=[ON_HOST],
        ),
        bars(
            "Largest gradient norms",
            [
                Query(
                    f"topk({WORST}, max by (run) ({of(metrics.GRADIENT_NORM_PEAK, THESE)}))",
                    "{{run}}",
                    instant=True,
                )
            ],
            unit="short",
            width=6,
            about="The worst of the last 15 seconds before clipping: the runs nearest to an explosion.",
            alerts=named(alerts, "GradientExplosion"),
            links=[ON_RUN],
        ),
        bars(
            "Hottest GPUs",
            [
                Query(
                    f"topk({WORST}, {EACH_GPU} ({of(metrics.GPU_TEMPERATURE_CELSIUS, THESE)}))",
                    "{{run}} {{host}} {{device}}",
                    instant=True,
                )
            ],
            unit="celsius",
            width=6,
            empty=NO_GPU,
            about="Core temperature now. Devices side by side in one host that differ by much have different "
            "air.",
            alerts=named(alerts, "HighGPUTemperature"),
            links=[ON_HOST],
        ),
    ]


def _course() -> list[Panel]:
    return [
        lines(
            "Goodput of each run",
            [Query(f"max by (run) ({recorded.GOODPUT.name}{{{THESE}}})", "{{run}}")],
            unit="percentunit",
            floor=0,
            ceiling=1,
            about="Productive share of a run's time since its processes began; it moves slowly on old runs. "
            "Click a curve to open the run.",
            links=[ON_RUN],
        ),
        lines(
            "Samples per second of each run",
            [Query(f"max by (run) ({recorded.THROUGHPUT.name}{{{THESE}}})", "{{run}}")],
            unit="short",
            floor=0,
            about="All ranks of a run together. Runs that fall together share a host, a disk or a network.",
            links=[ON_RUN, link("Compare these runs", board_url(COMPARE))],
        ),
        lines(
            "Alerts firing, by name",
            [Query(f"count by (alertname) ({FIRING})", "{{alertname}}")],
            unit="none",
            stacked=True,
            floor=0,
            empty="nothing fired in this time",
            about="How many runs, ranks or devices each alert fires for. One name over many runs at once is "
            "the machine, not the model.",
            links=[ON_ALERTS],
        ),
        lines(
            "GPUs busy, of each run",
            [Query(f"avg by (run) ({of(metrics.GPU_UTILIZATION_RATIO, THESE)})", "{{run}}")],
            unit="percentunit",
            floor=0,
            ceiling=1,
            empty=NO_GPU,
            about="Mean over the run's devices of the share of time in which a kernel was running.",
            links=[ON_HOST],
        ),
    ]
