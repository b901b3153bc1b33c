"""The metric table: name, kind, unit, labels and help of everything obsinfra exports, once.

The exporter, the sidecar, the rules, the page and docs/metrics.md read it. Names follow Prometheus: prefix
`obsinfra_`, base units, `_total` added to counters on the wire. Every trainer metric also carries the
labels in `RUN_LABELS`; `labels` lists only what comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]
Source = Literal["trainer", "sidecar"]

RUN_LABELS = ("run", "model", "rank")
"""On every metric a trainer exports: run id, model name, global rank."""

PHASES = ("data", "rollout", "forward", "backward", "optimizer", "checkpoint", "validation", "other")
"""Where wall time can go inside a run. `rollout` is experience collection in reinforcement learning."""

PRODUCTIVE_PHASES = frozenset({"rollout", "forward", "backward", "optimizer"})
"""Phases that count towards goodput, wherever they happen; `other` counts inside a step only."""

LOST_CAUSES = ("startup", "data", "checkpoint", "validation", "outside_step", "rework")
"""Why wall time was not productive. `rework`: steps computed again after a restart."""

STEP_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""Step durations in seconds, from a tiny CPU model to a very large one; 10 is the SlowStep threshold."""

LATENCY_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported metric family.

    Attributes:
        name: full name without the `_total` suffix that counters get on the wire.
        kind: `gauge`, `counter` or `histogram`.
        help: one sentence, shown by Prometheus and in docs/metrics.md.
        labels: label names beyond `RUN_LABELS`.
        buckets: upper bounds of a histogram, in the metric's unit.
        source: which program exports it.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    source: Source = "trainer"

    @property
    def sample_name(self) -> str:
        """The name a query uses for the plain sample of this family."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"obsinfra_{name}", "gauge", help, labels)


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"obsinfra_{name}", "counter", help, labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(f"obsinfra_{name}", "histogram", help, labels, buckets)


# Learning
TRAIN_LOSS = _gauge("train_loss", "Training loss of the last step read back from the device.")
VALIDATION_METRIC = _gauge("validation_metric", "Last value of a validation metric.", "metric")
TRAIN_METRIC = _gauge("train_metric", "Last value of a further training metric of the workload.", "metric")
BEST_METRIC = _gauge("best_metric", "Best validation value so far of the metric the best model is chosen by.")
LEARNING_RATE = _gauge("learning_rate", "Learning rate of the first parameter group.")
GRADIENT_NORM = _gauge("gradient_norm", "Total gradient norm of the last step, before clipping.")
GRADIENT_NORM_PEAK = _gauge(
    "gradient_norm_peak", "Largest gradient norm of the last 15 seconds, so that no scrape misses a spike."
)
LOSS_SCALE = _gauge("loss_scale", "Current scale of the fp16 gradient scaler; 1 without one.")
NONFINITE_LOSSES = _counter("nonfinite_losses", "Steps whose loss was NaN or infinite.")

# Progress
EPOCH = _gauge("epoch", "Current epoch, counted from 0.")
EPOCHS_PLANNED = _gauge("epochs_planned", "Epochs this run was asked for.")
STEP = _gauge("step", "Global step: optimizer steps since the run began, restarts included.")
STEPS = _counter("steps", "Steps taken by this process.")
SAMPLES = _counter("samples", "Samples consumed by this process.")
SAMPLES_PER_SECOND = _gauge("samples_per_second", "Samples per second over the last 10 seconds.")
RUN_STATE = _gauge("run_state", "1 for the run's present state, 0 for the others.", "state")
BUILD_INFO = _gauge(
    "build_info",
    "Versions in use; always 1.",
    "version",
    "torch",
    "python",
    "revision",
    "device",
    "precision",
)

# Time
STEP_DURATION_SECONDS = _histogram("step_duration_seconds", "Wall time of a step.", STEP_BUCKETS)
STEP_TIME_SECONDS = _gauge(
    "step_time_seconds", "Slowest of the steps that ended in the last 15 seconds and the one still running."
)
PHASE_SECONDS = _counter("phase_seconds", "Wall time by phase, exclusive: nested time counts once.", "phase")
LOST_SECONDS = _counter("lost_seconds", "Wall time that was not productive, by cause.", "cause")
GOODPUT_RATIO = _gauge("goodput_ratio", "Productive seconds ÷ wall seconds since the process started.")
INFERENCE_LATENCY_SECONDS = _histogram(
    "inference_latency_seconds", "Latency of a forward pass outside training.", LATENCY_BUCKETS
)

# Host
HOST_CPU_RATIO = _gauge("host_cpu_ratio", "Share of the host's processors in use.")
PROCESS_CPU_RATIO = _gauge("process_cpu_ratio", "Processors used by the trainer process; 1 is one full core.")
HOST_MEMORY_USED_BYTES = _gauge("host_memory_used_bytes", "Host memory in use (total − available).")
HOST_MEMORY_TOTAL_BYTES = _gauge("host_memory_total_bytes", "Host memory installed.")
CGROUP_MEMORY_USED_BYTES = _gauge("cgroup_memory_used_bytes", "Working set of the container's cgroup.")
CGROUP_MEMORY_LIMIT_BYTES = _gauge("cgroup_memory_limit_bytes", "Memory limit of the container's cgroup.")
MEMORY_PRESSURE_RATIO = _gauge(
    "memory_pressure_ratio", "Memory in use against the nearer limit: the cgroup's or the host's."
)
PROCESS_RESIDENT_MEMORY_BYTES = _gauge(
    "process_resident_memory_bytes", "Resident memory of the trainer process."
)
DISK_READ_BYTES = _counter("disk_read_bytes", "Bytes read from the host's disks since the process started.")
DISK_WRITTEN_BYTES = _counter(
    "disk_written_bytes", "Bytes written to the host's disks since the process started."
)
DISK_FREE_BYTES = _gauge("disk_free_bytes", "Free space where the run folder lives.")
NETWORK_RECEIVED_BYTES = _counter(
    "network_received_bytes", "Bytes received by the host since the process started."
)
NETWORK_SENT_BYTES = _counter("network_sent_bytes", "Bytes sent by the host since the process started.")

# GPU, as NVML tells
GPU_UTILIZATION_RATIO = _gauge("gpu_utilization_ratio", "Share of time a kernel was running.", "device")
GPU_MEMORY_USED_BYTES = _gauge("gpu_memory_used_bytes", "Device memory in use by all processes.", "device")
GPU_MEMORY_TOTAL_BYTES = _gauge("gpu_memory_total_bytes", "Device memory installed.", "device")
GPU_MEMORY_RATIO = _gauge("gpu_memory_ratio", "Device memory in use ÷ installed.", "device")
GPU_TEMPERATURE_CELSIUS = _gauge("gpu_temperature_celsius", "Core temperature.", "device")
GPU_POWER_WATTS = _gauge("gpu_power_watts", "Power drawn.", "device")
GPU_CLOCK_HERTZ = _gauge("gpu_clock_hertz", "Clock rate by domain (sm, memory).", "device", "clock")
GPU_THROTTLED = _gauge("gpu_throttled", "1 while the clock is held down for this reason.", "device", "reason")
GPU_ECC_ERRORS = _gauge(
    "gpu_ecc_errors",
    "ECC errors since the driver was loaded, by type (corrected, uncorrected).",
    "device",
    "type",
)
GPU_XID_ERRORS = _counter("gpu_xid_errors", "XID critical errors seen by this process.", "device", "xid")
CUDA_ALLOCATOR_BYTES = _gauge(
    "cuda_allocator_bytes",
    "PyTorch's caching allocator: allocated, reserved and their peaks.",
    "device",
    "state",
)
CUDA_ALLOCATOR_RETRIES = _counter(
    "cuda_allocator_retries", "Allocations retried after the cache was freed.", "device"
)

# Checkpoints
CHECKPOINTS = _counter(
    "checkpoints", "Checkpoints committed, by kind (regular, emergency, best, final).", "kind"
)
CHECKPOINT_FAILURES = _counter("checkpoint_failures", "Checkpoints that could not be committed.", "kind")
CHECKPOINT_WRITER_RESTARTS = _counter(
    "checkpoint_writer_restarts", "Checkpoint writer processes that died and were replaced."
)
CHECKPOINT_BYTES = _gauge("checkpoint_bytes", "Size of the last checkpoint's tensors.")
CHECKPOINT_WRITTEN_BYTES = _counter("checkpoint_written_bytes", "Bytes written to the checkpoint store.")
CHECKPOINT_DURATION_SECONDS = _histogram(
    "checkpoint_duration_seconds", "From the request to the durable commit.", DURATION_BUCKETS
)
CHECKPOINT_AGE_SECONDS = _gauge(
    "checkpoint_age_seconds", "Seconds since the last commit, or since the start."
)
CHECKPOINT_PROMISE_SECONDS = _gauge(
    "checkpoint_promise_seconds",
    "Longest age of the last commit that the settings promise; absent where they promise none.",
)
CHECKPOINT_STEP = _gauge("checkpoint_step", "Step of the last committed checkpoint.")
CHECKPOINT_REMOTE_PENDING = _gauge(
    "checkpoint_remote_pending", "Checkpoints that wait to be copied to the remote; absent without one."
)
CHECKPOINT_REMOTE_LAG_SECONDS = _gauge(
    "checkpoint_remote_lag_seconds",
    "How long the oldest checkpoint that was not copied to the remote has been waiting; 0 when all are "
    "there, absent without one.",
)
CHECKPOINT_REMOTE_FAILURES = _counter(
    "checkpoint_remote_failures", "Attempts to copy to the remote that failed."
)
CHECKPOINT_REMOTE_COPIED_BYTES = _counter("checkpoint_remote_copied_bytes", "Bytes copied to the remote.")
CHECKPOINT_REMOTE_RESTARTS = _counter(
    "checkpoint_remote_restarts", "Mirror processes that died and were replaced."
)
SNAPSHOT_SECONDS = _histogram(
    "snapshot_seconds", "Time the loop waited for a host snapshot.", LATENCY_BUCKETS
)

# Control and alerts
CONTROL_COMMANDS = _counter(
    "control_commands",
    "Commands by action and outcome (done, failed, rejected, expired).",
    "action",
    "outcome",
)
CONTROL_GARBAGE = _counter("control_garbage", "Messages at a control door that were no command.", "door")
ALERT_FIRING = _gauge(
    "alert_firing", "1 while the in-process evaluator holds the alert firing.", "alert", "severity"
)

# The stack's own health
TELEMETRY_ERRORS = _counter(
    "telemetry_errors", "Failures inside the telemetry itself, by component.", "component"
)
TELEMETRY_DROPPED = _counter("telemetry_dropped", "Records dropped because a buffer was full.", "component")
SPANS = _counter("spans", "Trace spans created from recorded timestamps.")

# The sidecar's own
SIDECAR_WEBHOOKS = Metric(
    "obsinfra_sidecar_webhooks",
    "counter",
    "Webhook calls by outcome (accepted, unauthorized, malformed, too_large, too_slow, journal_failed).",
    ("outcome",),
    source="sidecar",
)
SIDECAR_ALERTS = Metric(
    "obsinfra_sidecar_alerts",
    "counter",
    "Alerts heard of by what was decided (accepted, duplicate, informed, resolved, dry_run, no_run, "
    "unknown_run, run_ended, unknown_action, expired).",
    ("decision",),
    source="sidecar",
)
SIDECAR_COMMANDS = Metric(
    "obsinfra_sidecar_commands",
    "counter",
    "Commands sent on by action and final outcome.",
    ("action", "outcome"),
    source="sidecar",
)
SIDECAR_RUNS = Metric("obsinfra_sidecar_runs", "gauge", "Runs found, by state.", ("state",), source="sidecar")
SIDECAR_DELIVERY_SECONDS = Metric(
    "obsinfra_sidecar_delivery_seconds",
    "histogram",
    "From the webhook to the trainer's final ack.",
    ("action",),
    DURATION_BUCKETS,
    source="sidecar",
)

METRICS: tuple[Metric, ...] = tuple(value for value in list(vars().values()) if isinstance(value, Metric))
BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}
