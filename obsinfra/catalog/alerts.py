"""The alert table: every condition, threshold, severity and action, once.

The in-process evaluator, `prometheus/rules/obsinfra.yml` and its tests, the sidecar's policy, the runbooks
and the settings under `[thresholds]` and `[alerts]` all come from here, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from obsinfra.catalog import actions, metrics
from obsinfra.catalog import stack_metrics as stack
from obsinfra.catalog.actions import Action
from obsinfra.catalog.conditions import (
    AgainstPast,
    AgainstPeers,
    Always,
    Condition,
    Forecast,
    Increase,
    Multiple,
    Ratio,
    Rise,
    RobustZ,
    Share,
    Slope,
    Value,
    in_process,
    metric_of,
)
from obsinfra.catalog.metrics import Metric

Severity = Literal["info", "warning", "critical"]
Scope = Literal["run", "rank", "device", "host", "stack"]


@dataclass(frozen=True, slots=True)
class Alert:
    """One row of the table: `condition comparator threshold`, held for `for_seconds`.

    Attributes:
        name: CamelCase alert name, the `alertname` label.
        key: the name a user writes under `[thresholds]` and `[alerts]`.
        condition: the number looked at.
        comparator: `>` or `<`.
        threshold: in the unit of `threshold_unit`, as a person writes it (90 for 90 %).
        threshold_unit: unit of `threshold`, for messages.
        clear_threshold: once firing, the alert goes on until its value is back at this one, in the unit of
            `threshold`; None, or one beyond `threshold`: until it is back at `threshold` itself.
        scale: factor from `threshold_unit` to the condition's base unit (0.01 for percent → ratio).
        for_seconds: how long the condition must hold before the alert fires.
        severity: `info`, `warning` or `critical`.
        scope: what one firing speaks of: the run, a rank, a device, the host, or the stack itself.
        action: what the trainer is told to do when it fires; None only informs.
        summary, description: what people read; `{{ $labels.run }}` and the like as in Prometheus templates,
            `{threshold}` in the summary.
        runbook_url: where its runbook is read; None: the page of its name that the sidecar serves.
        enabled: False leaves it out of rules and evaluator.
    """

    name: str
    key: str
    condition: Condition
    threshold: float
    threshold_unit: str
    for_seconds: float
    severity: Severity
    scope: Scope
    action: Action | None
    summary: str
    description: str
    comparator: Literal[">", "<"] = ">"
    scale: float = 1.0
    enabled: bool = True
    runbook_url: str | None = None
    clear_threshold: float | None = None

    @property
    def limit(self) -> float:
        """The threshold in the condition's own base unit, free of the product's last-digit noise."""
        return float(f"{self.threshold * self.scale:.12g}")

    @property
    def clears_at(self) -> float | None:
        """`clear_threshold` where it keeps the alert firing longer than `threshold` does; else None."""
        clear = self.clear_threshold
        if clear is None or (clear >= self.threshold if self.comparator == ">" else clear <= self.threshold):
            return None
        return clear

    @property
    def clear_limit(self) -> float:
        """What a firing alert's value must be back at, in the condition's own base unit."""
        return self.limit if self.clears_at is None else float(f"{self.clears_at * self.scale:.12g}")

    @property
    def metric(self) -> Metric | None:
        """The metric looked at; None for the alert that fires always."""
        return metric_of(self.condition)

    @property
    def in_process(self) -> bool:
        """Whether a trainer can judge it alone; the others need Prometheus."""
        return in_process(self.condition)

    def crossed(self, value: float) -> bool:
        """Whether `value`, in the condition's base unit, is beyond the threshold. NaN never is."""
        return value > self.limit if self.comparator == ">" else value < self.limit

    def holds(self, value: float) -> bool:
        """Whether `value`, in the base unit, keeps firing what fires already, beyond the threshold or not."""
        if self.clears_at is None:
            return False
        return value > self.clear_limit if self.comparator == ">" else value < self.clear_limit


MINUTE, HOUR = 60.0, 3600.0

# ---- the machine ---------------------------------------------------------------------------------------

_HOST = (
    Alert(
        name="HighCPU",
        key="cpu",
        condition=Value(metrics.HOST_CPU_RATIO),
        threshold=90.0,
        threshold_unit="%",
        scale=0.01,
        for_seconds=60.0,
        severity="warning",
        scope="host",
        action=None,
        summary="CPU above {threshold} %",
        description="The host's processors have been busy beyond the threshold; data loading may starve the "
        "device. Look at the data phase and the number of loader workers.",
    ),
    Alert(
        name="HighMemory",
        key="memory",
        condition=Value(metrics.MEMORY_PRESSURE_RATIO),
        threshold=85.0,
        threshold_unit="%",
        scale=0.01,
        for_seconds=15.0,
        severity="critical",
        scope="host",
        action=actions.EMERGENCY_CHECKPOINT,
        summary="Memory above {threshold} %",
        description="Memory in use, against the container's limit if there is one, is beyond the threshold; "
        "the kernel may kill the trainer next.",
    ),
    Alert(
        name="CgroupLimitNear",
        key="cgroup_memory",
        condition=Ratio(metrics.CGROUP_MEMORY_USED_BYTES, metrics.CGROUP_MEMORY_LIMIT_BYTES),
        threshold=92.0,
        threshold_unit="%",
        scale=0.01,
        for_seconds=5.0,
        severity="critical",
        scope="host",
        action=actions.EMERGENCY_CHECKPOINT,
        summary="The container uses more than {threshold} % of its memory limit",
        description="The container's working set is close to its limit; at the limit the kernel kills its "
        "processes without warning.",
    ),
    Alert(
        name="MemoryCreep",
        key="memory_creep",
        condition=Slope(metrics.PROCESS_RESIDENT_MEMORY_BYTES, 30 * MINUTE, 40 * MINUTE),
        threshold=500.0,
        threshold_unit="MB/h",
        scale=1e6 / HOUR,
        for_seconds=10 * MINUTE,
        severity="warning",
        scope="rank",
        action=actions.MEMORY_SNAPSHOT,
        summary="The trainer's memory grows by more than {threshold} MB an hour",
        description="Resident memory of the trainer process has been growing steadily: a leak in the data "
        "pipeline, tensors kept with their graph, or lists that collect results.",
    ),
    Alert(
        name="MemoryExhaustionForeseen",
        key="memory_forecast",
        condition=Value(metrics.MEMORY_EXHAUSTION_SECONDS),
        comparator="<",
        threshold=600.0,
        threshold_unit="s",
        for_seconds=30.0,
        severity="warning",
        scope="rank",
        action=actions.CHECKPOINT,
        summary="Memory of {{ $labels.device }} will be exhausted within {threshold} s",
        description="Memory in use has been growing steadily for minutes and will reach its limit soon: the "
        "host's or the container's, or a device's by the allocator's peak.",
    ),
    Alert(
        name="MemoryGuardActing",
        key="memory_guard",
        condition=Increase(metrics.MEMORY_GUARD_MEASURES, 5 * MINUTE),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="warning",
        scope="rank",
        action=None,
        summary="Host memory was short: {{ $labels.measure }} was done",
        description="Memory in use crossed max_memory_percent of the nearest limit, and the trainer gave "
        "back what it could: garbage, free pages, batches loaded ahead, data-set caches.",
    ),
    Alert(
        name="OutOfMemoryRepeating",
        key="oom_recoveries",
        condition=Increase(metrics.OOM_RECOVERIES, 10 * MINUTE),
        threshold=3.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="warning",
        scope="rank",
        action=actions.MEMORY_SNAPSHOT,
        summary="Steps ran out of memory more than {threshold} times in 10 minutes",
        description="Each was done again in smaller micro-batches, so nothing is lost but time; but "
        "something grows, or other processes take the device's memory.",
    ),
    Alert(
        name="SwapInUse",
        key="swap",
        condition=Value(metrics.HOST_SWAP_USED_BYTES),
        threshold=1.0,
        threshold_unit="GB",
        scale=1e9,
        for_seconds=60.0,
        severity="warning",
        scope="host",
        action=None,
        summary="More than {threshold} GB of swap in use",
        description="The host swaps; steps that touch swapped pages slow down by orders of magnitude.",
    ),
    Alert(
        name="DiskFilling",
        key="disk_filling",
        condition=Forecast(metrics.DISK_FREE_BYTES, 30 * MINUTE, 4 * HOUR),
        comparator="<",
        threshold=0.0,
        threshold_unit="GB",
        scale=1e9,
        for_seconds=5 * MINUTE,
        severity="warning",
        scope="host",
        action=None,
        summary="The run folder's disk will be full within 4 hours",
        description="At the rate of the last half hour, the file system that holds the run folder runs out "
        "of space within four hours; checkpoints fail then.",
    ),
    Alert(
        name="DiskLow",
        key="disk_free",
        condition=Value(metrics.DISK_FREE_BYTES),
        comparator="<",
        threshold=2.0,
        threshold_unit="GB",
        scale=1e9,
        for_seconds=30.0,
        severity="critical",
        scope="host",
        action=None,
        summary="Less than {threshold} GB free where the run folder lies",
        description="The file system that holds the run folder is nearly full. The store prunes by "
        "its policy before it gives up, but a checkpoint may fail soon.",
    ),
)

# ---- the devices -----------------------------------------------------------------------------------------

_DEVICE = (
    Alert(
        name="HighGPUUtilization",
        key="gpu_utilization",
        condition=Value(metrics.GPU_UTILIZATION_RATIO),
        threshold=95.0,
        threshold_unit="%",
        scale=0.01,
        for_seconds=300.0,
        severity="info",
        scope="device",
        action=None,
        summary="GPU {{ $labels.device }} busy above {threshold} %",
        description="The device is well used. This is what one wants; it is here to be seen, not acted on.",
    ),
    Alert(
        name="GPUIdle",
        key="gpu_idle",
        condition=Value(metrics.GPU_UTILIZATION_RATIO),
        comparator="<",
        threshold=10.0,
        threshold_unit="%",
        scale=0.01,
        for_seconds=10 * MINUTE,
        severity="warning",
        scope="device",
        action=None,
        summary="GPU {{ $labels.device }} busy below {threshold} %",
        description="The device has had almost nothing to do: a slow data pipeline, a hang, or a run that "
        "does not need it.",
    ),
    Alert(
        name="HighGPUMemory",
        key="gpu_memory",
        condition=Value(metrics.GPU_MEMORY_RATIO),
        threshold=90.0,
        threshold_unit="%",
        scale=0.01,
        for_seconds=30.0,
        severity="warning",
        scope="device",
        action=actions.CHECKPOINT,
        summary="GPU {{ $labels.device }} memory above {threshold} %",
        description="Device memory is nearly full; a larger batch or a longer sequence will not fit.",
    ),
    Alert(
        name="HighGPUTemperature",
        key="gpu_temperature",
        condition=Value(metrics.GPU_TEMPERATURE_CELSIUS),
        threshold=85.0,
        clear_threshold=75.0,
        threshold_unit="°C",
        for_seconds=10.0,
        severity="critical",
        scope="device",
        action=actions.EMERGENCY_CHECKPOINT,
        summary="GPU {{ $labels.device }} hotter than {threshold} °C",
        description="The device will throttle and may fall off the bus; check cooling and power.",
    ),
    Alert(
        name="GPUThrottling",
        key="gpu_throttling",
        condition=Value(
            metrics.GPU_THROTTLED,
            (
                (
                    "reason",
                    ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown"),
                ),
            ),
        ),
        threshold=0.0,
        threshold_unit="",
        for_seconds=60.0,
        severity="warning",
        scope="device",
        action=None,
        summary="GPU {{ $labels.device }} is held down: {{ $labels.reason }}",
        description="Heat or power keeps the device below its clock rate, so every step takes longer. The "
        "power cap that data centres set on purpose does not count.",
    ),
    Alert(
        name="GPUMemoryFault",
        key="gpu_ecc",
        condition=Rise(metrics.GPU_ECC_ERRORS, HOUR, (("type", ("uncorrected",)),)),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="critical",
        scope="device",
        action=actions.EMERGENCY_CHECKPOINT,
        summary="GPU {{ $labels.device }} had an uncorrectable memory error",
        description="A double-bit error: data on the device was lost, and what was computed since may be "
        "wrong. Newer devices remap the row after a reset.",
    ),
    Alert(
        name="GPUXidError",
        key="gpu_xid",
        condition=Increase(metrics.GPU_XID_ERRORS, 10 * MINUTE),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="critical",
        scope="device",
        action=actions.EMERGENCY_CHECKPOINT,
        summary="GPU {{ $labels.device }} reported XID {{ $labels.xid }}",
        description="The driver reported a critical error of the device (79: fallen off the bus, 48: "
        "double-bit error, 94 and 95: contained and uncontained memory errors; NVIDIA's XID catalogue names "
        "the others). The process may not survive it.",
    ),
    Alert(
        name="NVLinkErrors",
        key="nvlink_errors",
        condition=Rise(metrics.GPU_NVLINK_ERRORS, 10 * MINUTE),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="warning",
        scope="device",
        action=None,
        summary="GPU {{ $labels.device }} has NVLink {{ $labels.type }} errors",
        description="A link between devices corrects or repeats its traffic; collectives slow down and may "
        "hang next.",
    ),
    Alert(
        name="PCIeReplays",
        key="pcie_replays",
        condition=Rise(metrics.GPU_PCIE_REPLAYS, 10 * MINUTE),
        threshold=10.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="warning",
        scope="device",
        action=None,
        summary="GPU {{ $labels.device }} repeats PCIe packets",
        description="The PCIe link had to send packets again, more often than noise explains: a loose riser, "
        "a bad slot or a device about to fall off the bus.",
    ),
)

# ---- learning --------------------------------------------------------------------------------------------

_LEARNING = (
    Alert(
        name="NonFiniteLoss",
        key="nonfinite_loss",
        condition=Increase(metrics.NONFINITE_LOSSES, 60.0),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="critical",
        scope="run",
        action=actions.EMERGENCY_CHECKPOINT,
        summary="The loss is NaN or infinite",
        description="A step produced a loss that is no finite number. The last good state gets saved.",
    ),
    Alert(
        name="LossSpike",
        key="loss_spike",
        condition=RobustZ(metrics.TRAIN_LOSS_PEAK, metrics.TRAIN_LOSS, 10 * MINUTE, "obsinfra:train_loss"),
        threshold=10.0,
        threshold_unit="σ",
        for_seconds=0.0,
        severity="warning",
        scope="run",
        action=actions.CHECKPOINT,
        summary="The loss jumped more than {threshold} robust standard deviations above its median",
        description="Within the last 15 seconds a step's loss stood far above the last ten minutes. "
        "Bad data, a learning rate too high, or the beginning of a divergence.",
    ),
    Alert(
        name="GradientExplosion",
        key="gradient_norm",
        condition=Value(metrics.GRADIENT_NORM_PEAK),
        threshold=100.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="critical",
        scope="run",
        action=actions.EMERGENCY_CHECKPOINT,
        summary="Gradient norm above {threshold}",
        description="The gradient norm before clipping peaked beyond the threshold; divergence may follow.",
    ),
    Alert(
        name="GradientNormRising",
        key="gradient_trend",
        condition=AgainstPast(metrics.GRADIENT_NORM, 2 * MINUTE, 15 * MINUTE),
        threshold=5.0,
        threshold_unit="×",
        for_seconds=60.0,
        severity="warning",
        scope="run",
        action=actions.CHECKPOINT,
        summary="The gradient norm is more than {threshold} times what it was",
        description="The gradient norm of the last two minutes is far above the quarter of an hour "
        "before: an explosion on its way, while there is still a good state to save.",
    ),
)

# ---- progress and efficiency -----------------------------------------------------------------------------

_PROGRESS = (
    Alert(
        name="SlowStep",
        key="step_time",
        condition=Value(metrics.STEP_TIME_SECONDS),
        threshold=10.0,
        threshold_unit="s",
        for_seconds=0.0,
        severity="warning",
        scope="rank",
        action=actions.CHECKPOINT,
        summary="A step takes longer than {threshold} s",
        description="The last step, or the one still running, took too long: storage, network, "
        "a straggler, a recompile or a hang.",
    ),
    Alert(
        name="NoProgress",
        key="no_progress",
        condition=Multiple(metrics.SECONDS_SINCE_STEP, metrics.STEP_MEDIAN_SECONDS, 60.0),
        threshold=10.0,
        threshold_unit="× the median step",
        for_seconds=0.0,
        severity="critical",
        scope="rank",
        action=actions.EMERGENCY_CHECKPOINT,
        summary="No step has ended for 60 s and {threshold} times the median step",
        description="The loop does not come round any more: a deadlock, a collective that waits for a dead "
        "peer, storage that does not answer. The last snapshot is committed without the loop's help.",
    ),
    Alert(
        name="TrainerGone",
        key="trainer_gone",
        condition=Value(metrics.SIDECAR_RUN_UP),
        comparator="<",
        threshold=1.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="critical",
        scope="run",
        action=None,
        summary="The trainer of {{ $labels.run }} died without saying why",
        description="The run's folder says that it is running, but its process is gone: killed by the kernel "
        "for want of memory, by a person, or by a crash of the interpreter.",
    ),
    Alert(
        name="TrainerUnreachable",
        key="trainer_unreachable",
        condition=Value(stack.TRAINER_UP, (("job", ("trainers",)),)),
        comparator="<",
        threshold=1.0,
        threshold_unit="",
        for_seconds=30.0,
        severity="warning",
        scope="rank",
        action=None,
        summary="Rank {{ $labels.rank }} of {{ $labels.run }} cannot be scraped",
        description="The trainer lives, but its metrics do not answer: the host is overloaded, the port is "
        "not reachable from Prometheus, or the process is stopped.",
    ),
    Alert(
        name="StragglerRank",
        key="straggler",
        condition=AgainstPeers(metrics.STEP_OWN_MEDIAN_SECONDS, "obsinfra:step_own_median:ratio_to_peers"),
        threshold=1.3,
        threshold_unit="×",
        for_seconds=2 * MINUTE,
        severity="warning",
        scope="rank",
        action=None,
        summary="Rank {{ $labels.rank }} works {threshold} times as long per step as the median rank",
        description="One rank is slower than its peers by what of a step waits for no other rank; where "
        "steps are synchronous, all wait for it.",
    ),
    Alert(
        name="DataStarvation",
        key="data_share",
        condition=Share(
            metrics.PHASE_SECONDS,
            metrics.PHASE_SECONDS,
            5 * MINUTE,
            "obsinfra:data_share:ratio",
            (("phase", ("data",)),),
        ),
        threshold=30.0,
        threshold_unit="%",
        scale=0.01,
        for_seconds=2 * MINUTE,
        severity="warning",
        scope="rank",
        action=None,
        summary="The loop waits for data more than {threshold} % of the time",
        description="The data pipeline is the bottleneck: more workers, prefetching, faster storage or "
        "cheaper preprocessing would speed the run up.",
    ),
    Alert(
        name="GoodputLow",
        key="lost_share",
        condition=Share(
            metrics.LOST_SECONDS, metrics.PHASE_SECONDS, 30 * MINUTE, "obsinfra:lost_share:ratio"
        ),
        threshold=50.0,
        threshold_unit="%",
        scale=0.01,
        for_seconds=5 * MINUTE,
        severity="warning",
        scope="rank",
        action=None,
        summary="More than {threshold} % of the time is lost",
        description="Waiting for data, checkpoints, validation, work done again or time outside steps took "
        "more than half of the last 30 minutes; obsinfra_lost_seconds_total says which.",
    ),
)

# ---- checkpoints -----------------------------------------------------------------------------------------

_CHECKPOINTS = (
    Alert(
        name="CheckpointTooOld",
        key="checkpoint_age",
        condition=Ratio(metrics.CHECKPOINT_AGE_SECONDS, metrics.CHECKPOINT_PROMISE_SECONDS),
        threshold=1.0,
        threshold_unit="× the promise",
        for_seconds=30.0,
        severity="warning",
        scope="run",
        action=actions.CHECKPOINT,
        summary="The last checkpoint is older than the settings promise",
        description="No checkpoint was committed for longer than the settings promise; a crash now "
        "costs more work than was agreed.",
    ),
    Alert(
        name="CheckpointFailing",
        key="checkpoint_failures",
        condition=Increase(metrics.CHECKPOINT_FAILURES, 10 * MINUTE),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="critical",
        scope="run",
        action=None,
        summary="A {{ $labels.kind }} checkpoint could not be committed",
        description="Writing a checkpoint failed; training goes on without the protection. The run's log "
        "says why: no space, an I/O error, a read-only file system.",
    ),
    Alert(
        name="CheckpointWriterRestarting",
        key="checkpoint_writer",
        condition=Increase(metrics.CHECKPOINT_WRITER_RESTARTS, 10 * MINUTE),
        threshold=2.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="warning",
        scope="run",
        action=None,
        summary="The checkpoint writer keeps dying",
        description="The process that writes checkpoints died and was replaced more than {threshold} times: "
        "usually the kernel kills it for want of memory.",
    ),
    Alert(
        name="RemoteBehind",
        key="remote_lag",
        condition=Value(metrics.CHECKPOINT_REMOTE_LAG_SECONDS),
        threshold=900.0,
        threshold_unit="s",
        for_seconds=0.0,
        severity="warning",
        scope="run",
        action=None,
        summary="A checkpoint has been waiting for its remote copy for more than {threshold} s",
        description="The remote store is unreachable, refuses, or is slower than the run makes checkpoints. "
        "Nothing is lost here, but the loss of this machine would be.",
    ),
)

# ---- the stack itself ------------------------------------------------------------------------------------

_STACK = (
    Alert(
        name="HostDown",
        key="host_down",
        condition=Value(stack.HOST_UP, (("job", ("hosts",)),)),
        comparator="<",
        threshold=1.0,
        threshold_unit="",
        for_seconds=30.0,
        severity="critical",
        scope="stack",
        action=None,
        summary="Host {{ $labels.host }} does not answer",
        description="The node exporter of a host named in prometheus/hosts/ cannot be scraped: the host, or "
        "the network to it, is down, and every run on it with it.",
    ),
    Alert(
        name="SidecarGone",
        key="sidecar_gone",
        condition=Value(stack.SERVICE_UP, (("job", ("sidecar",)),)),
        comparator="<",
        threshold=1.0,
        threshold_unit="",
        for_seconds=30.0,
        severity="critical",
        scope="stack",
        action=None,
        summary="The sidecar does not answer",
        description="Without it no alert becomes a command; within 30 seconds the trainers act on their own "
        "alerts again, but nobody watches whether they live.",
    ),
    Alert(
        name="DeliveryFailing",
        key="delivery_failures",
        condition=Increase(
            metrics.SIDECAR_COMMANDS,
            10 * MINUTE,
            (("outcome", ("expired", "failed", "rejected", "undelivered", "unacknowledged")),),
        ),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="critical",
        scope="stack",
        action=None,
        summary="A command to a trainer came to nothing: {{ $labels.action }} {{ $labels.outcome }}",
        description="An alert asked for an action and the trainer did not do it, or did not say so.",
    ),
    Alert(
        name="SidecarJournalFailing",
        key="journal_failures",
        condition=Increase(metrics.SIDECAR_WEBHOOKS, 5 * MINUTE, (("outcome", ("journal_failed",)),)),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="critical",
        scope="stack",
        action=None,
        summary="The sidecar cannot write its journal",
        description="Alerts are refused until it can, so that none is done twice or forgotten; Alertmanager "
        "tries again. Usually the disk is full.",
    ),
    Alert(
        name="TelemetryFailing",
        key="telemetry_errors",
        condition=Increase(metrics.TELEMETRY_ERRORS, 10 * MINUTE),
        threshold=10.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="warning",
        scope="rank",
        action=None,
        summary="The telemetry component {{ $labels.component }} keeps failing",
        description="Part of what should be observed is not. Training goes on; the run's log names "
        "the error.",
    ),
    Alert(
        name="TelemetryDropping",
        key="telemetry_dropped",
        condition=Increase(metrics.TELEMETRY_DROPPED, 10 * MINUTE),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="info",
        scope="rank",
        action=None,
        summary="The telemetry component {{ $labels.component }} drops records",
        description="A buffer was full: a collector that does not answer, or steps faster than the "
        "housekeeping thread can fold. Counters stay right, single records are missing.",
    ),
    Alert(
        name="PrometheusRuleFailures",
        key="rule_failures",
        condition=Increase(stack.RULE_FAILURES, 5 * MINUTE),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="critical",
        scope="stack",
        action=None,
        summary="Prometheus cannot evaluate rules",
        description="Some alerts are not judged at all while this lasts. Prometheus's log names the rule.",
    ),
    Alert(
        name="PrometheusWithoutAlertmanager",
        key="alertmanagers",
        condition=Value(stack.ALERTMANAGERS),
        comparator="<",
        threshold=1.0,
        threshold_unit="",
        for_seconds=60.0,
        severity="critical",
        scope="stack",
        action=None,
        summary="Prometheus knows no Alertmanager",
        description="Alerts fire and reach nobody.",
    ),
    Alert(
        name="PrometheusDroppingAlerts",
        key="dropped_alerts",
        condition=Increase(stack.NOTIFICATION_ERRORS, 5 * MINUTE),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="critical",
        scope="stack",
        action=None,
        summary="Prometheus could not hand alerts to Alertmanager",
        description="Alertmanager does not answer or refuses; alerts of that time were dropped, and are sent "
        "again while they fire.",
    ),
    Alert(
        name="PrometheusConfigBroken",
        key="prometheus_config",
        condition=Value(stack.PROMETHEUS_RELOADED),
        comparator="<",
        threshold=1.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="warning",
        scope="stack",
        action=None,
        summary="Prometheus could not load its configuration",
        description="It goes on with the one before; changed thresholds do not hold yet.",
    ),
    Alert(
        name="AlertmanagerGone",
        key="alertmanager_gone",
        condition=Value(stack.SERVICE_UP, (("job", ("alertmanager",)),)),
        comparator="<",
        threshold=1.0,
        threshold_unit="",
        for_seconds=30.0,
        severity="critical",
        scope="stack",
        action=None,
        summary="Alertmanager does not answer",
        description="Nobody is notified and no command is sent. This alert cannot reach people on its own: "
        "the dead-man's switch does.",
    ),
    Alert(
        name="AlertmanagerConfigBroken",
        key="alertmanager_config",
        condition=Value(stack.ALERTMANAGER_RELOADED),
        comparator="<",
        threshold=1.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="warning",
        scope="stack",
        action=None,
        summary="Alertmanager could not load its configuration",
        description="It goes on with the one before; changed routes and receivers do not hold yet.",
    ),
    Alert(
        name="NotificationsFailing",
        key="notification_failures",
        condition=Increase(stack.NOTIFICATIONS_FAILED, 5 * MINUTE),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="critical",
        scope="stack",
        action=None,
        summary="Notifications by {{ $labels.integration }} fail",
        description="Alertmanager gave up on a notification: a wrong address or credential, or a "
        "service that is down. People do not hear of alerts this way.",
    ),
    Alert(
        name="Watchdog",
        key="watchdog",
        condition=Always(),
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        severity="info",
        scope="stack",
        action=None,
        summary="Alerting works",
        description="Fires always. Send it to a dead-man's switch, which raises the alarm when it "
        "goes quiet.",
    ),
)

ALERTS: tuple[Alert, ...] = (*_LEARNING, *_PROGRESS, *_HOST, *_DEVICE, *_CHECKPOINTS, *_STACK)

BY_NAME: dict[str, Alert] = {alert.name: alert for alert in ALERTS}
BY_KEY: dict[str, Alert] = {alert.key: alert for alert in ALERTS}
