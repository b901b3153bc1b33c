"""The board of one run: how it learns, how fast, where its time goes, what is saved, what it was told.

Called by `dashboards.write`.
"""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.models.dashboard import Panel

from obsinfra.alerting import dashboard_recordings as recorded
from obsinfra.catalog import metrics
from obsinfra.catalog.alerts import Alert
from obsinfra.dashboards import variables
from obsinfra.dashboards.addresses import ALERTS, GPU_HOST, RANKS, RUN, board_url
from obsinfra.dashboards.annotations import marks
from obsinfra.dashboards.board import Board, Row
from obsinfra.dashboards.panels import lines, link, map_over_time, named, number, rows
from obsinfra.dashboards.queries import RANKS as HERE
from obsinfra.dashboards.queries import RUN as ONE
from obsinfra.dashboards.queries import Query, latest, of, quantile, quantile_so_far, risen

STATES = {
    "starting": "blue",
    "running": "green",
    "paused": "yellow",
    "stopping": "orange",
    "finished": "blue",
    "stopped": "orange",
    "failed": "red",
}
"""State of a run → its colour."""

LOSSES = f'{HERE}, metric=~".*loss.*"'
ON_ALERTS = link("Alerts and actions of this run", board_url(ALERTS, run="${run}"))
ON_RANKS = link("Ranks of this run", board_url(RANKS, run="${run}"))
ON_HOST = link("GPUs and host of this run", board_url(GPU_HOST, run="${run}"))


def run_board(alerts: Mapping[str, Alert]) -> Board:
    """The board with the thresholds of this table."""
    return Board(
        uid=RUN,
        title="Run",
        about="One run: progress, learning, speed, time, checkpoints and commands.",
        variables=[
            variables.datasource(),
            variables.model(),
            variables.run(of_model=True),
            variables.rank(),
            variables.smoothing(),
        ],
        marks=marks(ONE),
        rows=[
            Row("Now", _now(alerts)),
            Row("Learning", _learning(alerts)),
            Row("Speed and time", _speed(alerts)),
            Row("Computing", _compute(alerts)),
            Row("Checkpoints", _checkpoints(alerts)),
            Row("Commands and telemetry", _control(alerts)),
        ],
    )


def share(name: str) -> str:
    """A recorded rate of seconds as a share of all the run's time, whatever the number of ranks."""
    whole = f"sum by (run, model) ({recorded.PHASES.name}{{{ONE}}})"
    return f"{name}{{{ONE}}} / on (run, model) group_left {whole}"


def _now(alerts: Mapping[str, Alert]) -> list[Panel]:
    step, planned = of(metrics.STEP, HERE), of(metrics.STEPS_PLANNED, HERE)
    return [
        number(
            "State",
            [Query(f"max by (state) ({latest(of(metrics.RUN_STATE, ONE))} == 1)", "{{state}}", instant=True)],
            unit="none",
            names=STATES,
            graph=False,
            empty="no run in this time",
            about="What the trainer said of itself last. A trainer that was killed still says `running` here "
            "until the time range leaves it behind; the alert tells.",
            mentions=named(alerts, "TrainerGone"),
        ),
        number(
            "Progress",
            [Query(f"max({step}) / max({planned})", "progress")],
            unit="percentunit",
            graph=False,
            empty="end not known",
            about="Steps taken ÷ steps of the planned epochs. Runs without a planned end show none.",
        ),
        number(
            "Time left",
            [Query(f"max({of(metrics.ETA_SECONDS, HERE)})", "time left")],
            unit="s",
            graph=False,
            empty="end not known",
            about="At the pace of this process so far, pauses and validations included. Wrong in the first "
            "minutes, and whenever the pace changes.",
        ),
        number(
            "Step",
            [Query(f"max({step})", "step")],
            unit="locale",
            about="The global step, restarts included. Flat means that nothing moves.",
        ),
        number(
            "Throughput",
            [Query(f"{recorded.THROUGHPUT.name}{{{ONE}}}", "samples/s")],
            unit="short",
            about="Samples per second over the last ten seconds, all ranks together.",
            links=[ON_RANKS],
        ),
        number(
            "Goodput",
            [Query(f"{recorded.GOODPUT.name}{{{ONE}}}", "goodput")],
            unit="percentunit",
            about="Productive share of the time since the process began: rollout, forward, backward and "
            "optimizer, without work done again. What is missing is in “Lost time by cause”.",
        ),
        number(
            "Alerts firing",
            [Query(f'count(ALERTS{{alertstate="firing", {ONE}}}) or vector(0)', "alerts")],
            unit="none",
            graph=False,
            about="Alerts that Prometheus holds firing for this run. Red marks on the curves say when "
            "each began.",
            links=[ON_ALERTS],
        ),
        number(
            "Last checkpoint",
            [Query(f"min({of(metrics.CHECKPOINT_AGE_SECONDS, ONE)})", "age")],
            unit="s",
            about="Seconds since the last commit, or since the start: the work that a crash would cost now.",
        ),
    ]


def _learning(alerts: Mapping[str, Alert]) -> list[Panel]:
    loss = of(metrics.TRAIN_LOSS, HERE)
    norm = of(metrics.GRADIENT_NORM, HERE)
    return [
        lines(
            "Loss",
            [
                Query(f"avg({loss})", "train, raw"),
                Query(f"avg(avg_over_time({loss}[$smoothing]))", "train, smoothed"),
                Query(f"max({of(metrics.TRAIN_LOSS_PEAK, HERE)})", "train, worst of 15 s"),
                Query(
                    f"max by (metric) ({of(metrics.VALIDATION_METRIC, LOSSES)})",
                    "validation, {{metric}}",
                ),
            ],
            unit="short",
            about="Training loss, mean of the ranks, as read back a step later, and smoothed; the worst of "
            "the last 15 seconds, so that no spike is missed; and the last validation loss. Validation that "
            "rises while training falls is overfitting.",
        ),
        lines(
            "Gradient norm",
            [
                Query(f"avg({norm})", "norm, mean of ranks"),
                Query(f"max({of(metrics.GRADIENT_NORM_PEAK, HERE)})", "worst of 15 s"),
            ],
            unit="short",
            logarithmic=True,
            about="Total norm before clipping, on a logarithmic axis. The dashed line is where the emergency "
            "checkpoint is taken.",
            alerts=named(alerts, "GradientExplosion"),
        ),
        lines(
            "Learning rate",
            [Query(f"max({of(metrics.LEARNING_RATE, HERE)})", "learning rate")],
            unit="sci",
            width=8,
            floor=0,
            about="Of the first parameter group, warm-up and decay as scheduled. A step down that the "
            "schedule does not explain is a command.",
        ),
        lines(
            "Validation and best",
            [
                Query(f"max by (metric) ({of(metrics.VALIDATION_METRIC, HERE)})", "{{metric}}"),
                Query(f"max({of(metrics.BEST_METRIC, HERE)})", "best so far"),
            ],
            unit="short",
            width=8,
            empty="no validation in this time",
            about="Every validation metric at its last value, and the best so far of the one by which the "
            "best model is chosen.",
        ),
        lines(
            "Further training metrics",
            [Query(f"avg by (metric) ({of(metrics.TRAIN_METRIC, HERE)})", "{{metric}}")],
            unit="short",
            width=8,
            empty="this workload reports none",
            about="What the workload reports beside its loss, mean of the ranks: entropy and value loss in "
            "reinforcement learning, for example.",
        ),
        lines(
            "How unusual is the loss",
            [
                Query(
                    f"(max by (run, model, rank) ({of(metrics.TRAIN_LOSS_PEAK, HERE)}) - "
                    f"max by (run, model, rank) (obsinfra:train_loss:median{{{HERE}}})) / "
                    f"(max by (run, model, rank) (obsinfra:train_loss:spread{{{HERE}}}) + "
                    f"0.02 * abs(max by (run, model, rank) (obsinfra:train_loss:median{{{HERE}}})))",
                    "rank {{rank}}",
                )
            ],
            unit="short",
            about="Robust standard deviations between the worst loss of the last 15 seconds and the median "
            "of ten minutes. Below zero the loss falls; a single tall spike is often one bad batch.",
            alerts=named(alerts, "LossSpike"),
        ),
        lines(
            "Losses that were no number, and the loss scale",
            [
                Query(f"sum({of(metrics.NONFINITE_LOSSES, HERE)})", "NaN or infinite losses"),
                Query(f"min({of(metrics.LOSS_SCALE, HERE)})", "loss scale"),
            ],
            unit="short",
            about="Steps whose loss or gradient norm was no finite number, counted within the time range up "
            "to each moment, and the fp16 scaler's scale (1 without one). A scale that keeps halving goes "
            "with them.",
            mentions=named(alerts, "NonFiniteLoss"),
        ),
    ]


def _speed(alerts: Mapping[str, Alert]) -> list[Panel]:
    buckets = of(metrics.STEP_DURATION_SECONDS, HERE, "_bucket")
    return [
        lines(
            "Samples per second",
            [Query(f"{recorded.THROUGHPUT.name}{{{ONE}}}", "all ranks")],
            unit="short",
            width=6,
            floor=0,
            about="Over ten seconds, all ranks together. Dents at regular distances are validations or "
            "checkpoints.",
            links=[ON_RANKS],
        ),
        lines(
            "Steps per second",
            [Query(f"sum by (rank) (rate({of(metrics.STEPS, HERE)}[$__rate_interval]))", "rank {{rank}}")],
            unit="short",
            width=6,
            floor=0,
            about="Of each selected rank; ranks that train in lockstep lie on one line.",
            links=[ON_RANKS],
        ),
        lines(
            "Step time",
            [
                Query(f"{recorded.STEP_QUANTILES['p50'].name}{{{ONE}}}", "p50"),
                Query(f"{recorded.STEP_QUANTILES['p95'].name}{{{ONE}}}", "p95"),
                Query(quantile(0.99, metrics.STEP_DURATION_SECONDS, HERE), "p99", exemplars=True),
                Query(f"max({of(metrics.STEP_TIME_SECONDS, HERE)})", "worst of 15 s"),
            ],
            unit="s",
            logarithmic=True,
            about="Wall time of a step. Diamonds are single traced steps: click one to open its trace. p50 "
            "and p95 are recorded over all ranks, p99 is of the ranks selected; quantiles are exact to a "
            "bucket.",
            alerts=named(alerts, "SlowStep"),
            links=[ON_RANKS],
        ),
        lines(
            "Phases",
            [Query(share(recorded.PHASES.name), "{{phase}}")],
            unit="percentunit",
            stacked=True,
            floor=0,
            ceiling=1,
            about="Where the time of all ranks goes, over the last minute. Phases are exclusive: nested time "
            "counts once, so that together they fill 100 %. A growing "
            "data phase is a pipeline that does not keep up.",
            mentions=named(alerts, "DataStarvation"),
        ),
        map_over_time(
            "Step time, all steps",
            [
                Query(
                    f"sum by (le) (rate({buckets}[$__rate_interval]))",
                    "{{le}}",
                    shape="buckets",
                    exemplars=True,
                )
            ],
            unit="s",
            cell_unit="ops",
            bucketed=True,
            about="How many steps a second took how long. Two bands are two kinds of step, as with "
            "validation or a slow loader; a band that wanders upwards is a leak or a throttled device.",
        ),
        lines(
            "Lost time by cause",
            [Query(share(recorded.LOST.name), "{{cause}}")],
            unit="percentunit",
            stacked=True,
            floor=0,
            about="Share of all ranks' time that was not productive, by cause, in the last minute. `rework` "
            "is steps computed again after a restart, `outside_step` the time between steps.",
        ),
        lines(
            "Shares that alert",
            [
                Query(f"max(obsinfra:data_share:ratio{{{HERE}}})", "waits for data, 5 min"),
                Query(f"max(obsinfra:lost_share:ratio{{{HERE}}})", "lost, 30 min"),
            ],
            unit="percentunit",
            floor=0,
            about="The worst rank's share of time spent waiting for data, and lost for any cause, as the "
            "alerts see them. High data share: more workers, prefetching or faster storage.",
            alerts=named(alerts, "DataStarvation", "GoodputLow"),
        ),
    ]


def _compute(alerts: Mapping[str, Alert]) -> list[Panel]:
    return [
        lines(
            "Model FLOPs utilisation",
            [
                Query(f"avg({of(metrics.MFU_RATIO, HERE)})", "MFU"),
                Query(f"avg({of(metrics.HFU_RATIO, HERE)})", "HFU"),
            ],
            unit="percentunit",
            width=8,
            floor=0,
            empty="the device's peak is not known",
            about="What the model's mathematics needs ÷ what the device computes at most in this precision, "
            "mean of the ranks; HFU counts what is computed twice twice. Absent where the device's peak or "
            "the model's operations are not known, as on CPUs.",
        ),
        lines(
            "Compiled anew, and not compiled",
            [
                Query(f"sum({of(metrics.COMPILE_RECOMPILES, HERE)})", "recompilations"),
                Query(f"sum({of(metrics.COMPILE_GRAPH_BREAKS, HERE)})", "graph breaks"),
                Query(f"sum by (cause) ({of(metrics.COMPILE_FALLBACKS, HERE)})", "{{cause}} fallback"),
            ],
            unit="none",
            width=8,
            floor=0,
            empty="nothing was compiled",
            about="Counted since the process began. Recompilations that go on come from inputs of ever new "
            "shapes; a fallback runs uncompiled from then on.",
        ),
        lines(
            "Out of memory, and smaller micro-batches",
            [
                Query(f"sum({of(metrics.OOM_RECOVERIES, HERE)})", "steps done again"),
                Query(f"min({of(metrics.MICRO_BATCH_ROWS, HERE)})", "rows of a micro-batch"),
            ],
            unit="none",
            width=8,
            floor=0,
            empty="not watched in this run",
            about="Steps that ran out of memory and were done again in smaller parts, and the rows of one "
            "forward and backward pass. Rows that stay low cost throughput: a smaller batch would not.",
            mentions=named(alerts, "OutOfMemoryRepeating"),
        ),
    ]


def _checkpoints(alerts: Mapping[str, Alert]) -> list[Panel]:
    age, promise = of(metrics.CHECKPOINT_AGE_SECONDS, ONE), of(metrics.CHECKPOINT_PROMISE_SECONDS, ONE)
    return [
        lines(
            "Age of the last checkpoint",
            [Query(f"min({age})", "age"), Query(f"min({promise})", "promised")],
            unit="s",
            width=8,
            floor=0,
            about="Seconds since the last commit, against the longest age that the settings promise (absent "
            "where they promise none). A saw's teeth are healthy; a tooth above the line alerts.",
            mentions=named(alerts, "CheckpointTooOld"),
        ),
        lines(
            "Steps at risk",
            [
                Query(
                    f"max({of(metrics.STEP, ONE)}) - max({of(metrics.CHECKPOINT_STEP, ONE)})",
                    "steps since the last commit",
                )
            ],
            unit="locale",
            width=8,
            floor=0,
            empty="nothing committed yet",
            about="Steps that would be computed again after a crash now: the present step less that of the "
            "last committed checkpoint, whose bytes the writer has hashed.",
        ),
        lines(
            "How long a checkpoint takes",
            [
                Query(quantile_so_far(0.5, metrics.CHECKPOINT_DURATION_SECONDS, ONE), "commit, p50"),
                Query(quantile_so_far(0.99, metrics.CHECKPOINT_DURATION_SECONDS, ONE), "commit, p99"),
                Query(quantile_so_far(0.99, metrics.SNAPSHOT_SECONDS, ONE), "loop waits, p99"),
            ],
            unit="s",
            width=8,
            logarithmic=True,
            empty="nothing committed yet",
            about="From the request to the durable commit, in the background, and what of it the loop waits "
            "for (the copy to host memory), since the process began.",
        ),
        lines(
            "Checkpoints committed and failed",
            [
                Query(f"sum by (kind) ({of(metrics.CHECKPOINTS, ONE)})", "{{kind}}"),
                Query(f"sum by (kind) ({of(metrics.CHECKPOINT_FAILURES, ONE)}) > 0", "{{kind}} failed"),
                Query(f"sum({of(metrics.CHECKPOINT_WRITER_RESTARTS, ONE)}) > 0", "writer restarts"),
            ],
            unit="short",
            width=8,
            floor=0,
            about="Counted since the process began, by kind. Failures and replaced writers appear only when "
            "there are any.",
            mentions=named(alerts, "CheckpointFailing", "CheckpointWriterRestarting"),
        ),
        lines(
            "Size",
            [
                Query(f"max({of(metrics.CHECKPOINT_BYTES, ONE)})", "tensors of the last one"),
                Query(f"sum({of(metrics.CHECKPOINT_WRITTEN_BYTES, ONE)})", "written in all"),
            ],
            unit="bytes",
            width=8,
            floor=0,
            about="Bytes of the last checkpoint's tensors, and all bytes written to the store by this "
            "process; the store writes unchanged data once, so the second grows more slowly than their sum.",
        ),
        lines(
            "Remote copy",
            [
                Query(f"max({of(metrics.CHECKPOINT_REMOTE_LAG_SECONDS, ONE)})", "oldest waiting"),
            ],
            unit="s",
            width=8,
            floor=0,
            empty="no remote configured",
            about="How long the oldest checkpoint has been waiting for its copy; 0 when all are there.",
            alerts=named(alerts, "RemoteBehind"),
        ),
    ]


def _control(alerts: Mapping[str, Alert]) -> list[Panel]:
    return [
        rows(
            "Commands in this time",
            [Query(f"sum by (action, outcome) ({risen(of(metrics.CONTROL_COMMANDS, ONE))}) > 0")],
            columns={"action": "Action", "outcome": "Outcome", "Value": "Times"},
            width=8,
            sort=("Times", True),
            empty="no command in this time",
            about="What the run was told, by people, signals or alerts, and what came of it.",
            mentions=named(alerts, "DeliveryFailing"),
        ),
        lines(
            "How long actions take",
            [
                Query(
                    f"sum by (action) ({of(metrics.CONTROL_ACTION_SECONDS, ONE, '_sum')}) / "
                    f"(sum by (action) ({of(metrics.CONTROL_ACTION_SECONDS, ONE, '_count')}) > 0)",
                    "{{action}}",
                )
            ],
            unit="s",
            width=8,
            floor=0,
            empty="no command in this time",
            about="Mean time from an action's start to its outcome, since the process began.",
        ),
        lines(
            "Telemetry's own health",
            [
                Query(f"sum by (component) ({of(metrics.TELEMETRY_ERRORS, HERE)})", "{{component}} errors"),
                Query(f"sum by (component) ({of(metrics.TELEMETRY_DROPPED, HERE)})", "{{component}} dropped"),
            ],
            unit="short",
            width=8,
            floor=0,
            about="Errors inside the telemetry, and records dropped because a buffer was full. Anything "
            "above zero means that some of what you see here is incomplete.",
            mentions=named(alerts, "TelemetryFailing", "TelemetryDropping"),
        ),
    ]
