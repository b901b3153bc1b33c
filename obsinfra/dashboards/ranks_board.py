"""The board of one run's ranks: who is slow, by how much, and where the slow one's time goes.

Called by `dashboards.write`.
"""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.models.dashboard import Panel

from obsinfra.catalog import metrics
from obsinfra.catalog.alerts import Alert
from obsinfra.dashboards import variables
from obsinfra.dashboards.addresses import GPU_HOST, RANKS, RUN, board_url
from obsinfra.dashboards.annotations import marks
from obsinfra.dashboards.board import Board, Row
from obsinfra.dashboards.panels import lines, link, map_over_time, named, number, rows
from obsinfra.dashboards.queries import RANKS as HERE
from obsinfra.dashboards.queries import RUN as ONE
from obsinfra.dashboards.queries import Query, of

RATIO = "obsinfra:step_own_median:ratio_to_peers"
RANK = "rank {{rank}}"
ON_RUN = link("The run", board_url(RUN, run="${run}"))
ON_HOST = link("Its GPUs and host", board_url(GPU_HOST, run="${run}"))


def ranks_board(alerts: Mapping[str, Alert]) -> Board:
    """The board with the thresholds of this table."""
    return Board(
        uid=RANKS,
        title="Ranks",
        about="The ranks of one run side by side: stragglers, spread, and where each rank's time goes.",
        variables=[
            variables.datasource(),
            variables.model(),
            variables.run(of_model=True),
            variables.rank(),
        ],
        marks=marks(ONE),
        rows=[
            Row("Now", _now(alerts)),
            Row("Stragglers", _stragglers(alerts)),
            Row("Where each rank's time goes", _time()),
        ],
    )


def _now(alerts: Mapping[str, Alert]) -> list[Panel]:
    median = of(metrics.STEP_MEDIAN_SECONDS, HERE)
    return [
        number(
            "Ranks",
            [Query(f"count(max by (rank) ({of(metrics.STEP, ONE)}))", "ranks")],
            unit="none",
            width=4,
            about="Ranks that are scraped. Fewer than the run's world size: see those that do not answer.",
        ),
        number(
            "Not answering",
            [Query(f'count(up{{job="trainers", {ONE}}} == 0) or vector(0)', "ranks")],
            unit="none",
            width=4,
            graph=False,
            about="Ranks that the sidecar knows and Prometheus cannot scrape.",
            mentions=named(alerts, "TrainerUnreachable"),
        ),
        number(
            "Slowest against median",
            [Query(f"max({RATIO}{{{HERE}}})", "slowest")],
            unit="suffix:×",
            width=4,
            about="Own time of the slowest rank's step, in which it waits for no other, ÷ that of the median "
            "rank. 1 means that all take alike. Where steps are synchronous all wait for the slowest.",
            alerts=named(alerts, "StragglerRank"),
        ),
        number(
            "Slowest rank's step",
            [Query(f"max({median})", "slowest")],
            unit="s",
            width=4,
            about="Smoothed median step of the slowest rank, waiting for others included.",
            links=[ON_RUN],
        ),
        number(
            "Fastest rank's step",
            [Query(f"min({median})", "fastest")],
            unit="s",
            width=4,
            about="Smoothed median step of the fastest rank; close to the slowest's where ranks wait for "
            "each other.",
            links=[ON_RUN],
        ),
        number(
            "Steps apart",
            [Query(f"max({of(metrics.STEP, HERE)}) - min({of(metrics.STEP, HERE)})", "steps")],
            unit="locale",
            width=4,
            about="Steps between the rank that is furthest and the one that is least far. Ranks that train "
            "in lockstep differ by one at most, as scrapes catch them at different moments.",
        ),
    ]


def _stragglers(alerts: Mapping[str, Alert]) -> list[Panel]:
    by = "max by (rank, host)"
    return [
        map_over_time(
            "Own time per step of each rank",
            [Query(f"max by (rank) ({of(metrics.STEP_OWN_MEDIAN_SECONDS, HERE)})", "{{rank}}")],
            unit="none",
            cell_unit="s",
            about="One row per rank, coloured by what of its median step waits for no other rank: green is "
            "fast, red is slow. A row of another colour is a straggler; a column is something that struck "
            "all.",
            mentions=named(alerts, "StragglerRank"),
        ),
        lines(
            "Own time against the median rank",
            [Query(f"max by (rank) ({RATIO}{{{HERE}}})", RANK)],
            unit="suffix:×",
            about="What of each rank's median step waits for no other rank ÷ that of the run's median rank.",
            alerts=named(alerts, "StragglerRank"),
            links=[ON_HOST],
        ),
        rows(
            "Ranks, slowest first",
            [
                Query(f"{by} ({RATIO}{{{HERE}}})"),
                Query(f"{by} ({of(metrics.STEP_MEDIAN_SECONDS, HERE)})"),
                Query(f"{by} ({of(metrics.STEP, HERE)})"),
                Query(f"{by} ({of(metrics.SAMPLES_PER_SECOND, HERE)})"),
                Query(f"{by} ({of(metrics.GOODPUT_RATIO, HERE)})"),
                Query(f"{by} ({of(metrics.SECONDS_SINCE_STEP, HERE)})"),
                Query(f"{by} ({of(metrics.PROCESS_RESIDENT_MEMORY_BYTES, HERE)})"),
                Query(f"{by} ({of(metrics.HOST_CPU_RATIO, HERE)})"),
                Query(f"{by} ({of(metrics.STEP_OWN_MEDIAN_SECONDS, HERE)})"),
            ],
            columns={
                "rank": "Rank",
                "host": "Host",
                "Value #A": "Against the median",
                "Value #B": "Median step",
                "Value #C": "Step",
                "Value #D": "Samples/s",
                "Value #E": "Goodput",
                "Value #F": "Since last step",
                "Value #G": "Memory",
                "Value #H": "Host's processors",
                "Value #I": "Own time of a step",
            },
            units={
                "Against the median": "suffix:×",
                "Median step": "s",
                "Own time of a step": "s",
                "Step": "locale",
                "Samples/s": "short",
                "Goodput": "percentunit",
                "Since last step": "s",
                "Memory": "bytes",
                "Host's processors": "percentunit",
            },
            thresholds={
                heading: alerts[name]
                for heading, name in (
                    ("Against the median", "StragglerRank"),
                    ("Host's processors", "HighCPU"),
                )
                if name in alerts
            },
            links={"Host": link("The host", board_url(GPU_HOST, run="${run}", host="${__value.raw}"))},
            sort=("Against the median", True),
            about="A slow rank on a host with busy processors shares it with something; a slow rank that "
            "waits for data (below) has a slow disk or a larger share of the data.",
            mentions=named(alerts, "NoProgress"),
        ),
    ]


def _time() -> list[Panel]:
    def share(phase: str) -> str:
        every = of(metrics.PHASE_SECONDS, HERE)
        part = f"sum by (rank) (rate({of(metrics.PHASE_SECONDS, f'{HERE}, {phase}')}[$__rate_interval]))"
        return f"{part} / sum by (rank) (rate({every}[$__rate_interval]))"

    return [
        lines(
            "Waiting for data",
            [Query(share('phase="data"'), RANK)],
            unit="percentunit",
            width=8,
            floor=0,
            ceiling=1,
            about="Share of each rank's time spent waiting for the next batch. One rank above the others: "
            "its disk, its loader workers or its part of the data.",
            links=[ON_HOST],
        ),
        lines(
            "Backward, communication included",
            [Query(share('phase="backward"'), RANK)],
            unit="percentunit",
            width=8,
            floor=0,
            ceiling=1,
            about="Share of each rank's time in the backward pass, in which gradients are exchanged. The "
            "fast ranks wait there for the slow one, so the straggler is the rank with the smallest share: "
            "what the others have above it is communication and waiting.",
        ),
        lines(
            "Time that was not productive",
            [
                Query(
                    f"sum by (rank) (rate({of(metrics.LOST_SECONDS, HERE)}[$__rate_interval])) / "
                    f"sum by (rank) (rate({of(metrics.PHASE_SECONDS, HERE)}[$__rate_interval]))",
                    RANK,
                )
            ],
            unit="percentunit",
            width=8,
            floor=0,
            about="Share of each rank's time lost to any cause. By cause, over all ranks: the run's board.",
            links=[ON_RUN],
        ),
        lines(
            "Spread of the step time",
            [
                Query(f"max({of(metrics.STEP_MEDIAN_SECONDS, HERE)})", "slowest"),
                Query(f"quantile(0.5, {of(metrics.STEP_MEDIAN_SECONDS, HERE)})", "median"),
                Query(f"min({of(metrics.STEP_MEDIAN_SECONDS, HERE)})", "fastest"),
            ],
            unit="s",
            floor=0,
            about="Median step of the slowest, the median and the fastest rank. Ranks that "
            "exchange gradients wait for each other and take about as long; their own time tells them apart.",
        ),
        lines(
            "Loss of each rank",
            [Query(f"max by (rank) ({of(metrics.TRAIN_LOSS, HERE)})", RANK)],
            unit="short",
            about="Ranks see different data, so their losses differ a little. One that leaves the others has "
            "bad data or a bad device.",
            links=[ON_RUN],
        ),
    ]
