"""The metric table: name, kind, unit, labels and help of everything obsinfra exports, once.

The exporter, the sidecar, the rules, the page and docs/metrics.md read it. Names follow Prometheus: prefix
`obsinfra_`, base units, `_total` added to counters on the wire. Every trainer metric also carries the
labels in `RUN_LABELS`; `labels` lists only what comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]
Source = Literal["trainer", "sidecar", "stack"]

RUN_LABELS = ("run", "model", "rank")
"""On every metric a trainer exports: run id, model name, global rank."""

SERIES_PER_RANK, SERIES_PER_DEVICE, SERIES_PER_ACTION = 250, 40, 20
"""Budget of time series that a rank exports: without GPUs and commands, more for each GPU that it sees, and
more for each action that it was told. No label is unbounded: none holds a step, a path, a text or an id."""

RECORDED_PER_RUN, RECORDED_PER_RANK = 40, 5
"""Budget of series that Prometheus records of a run for alerts and dashboards, and more for each rank."""

PHASES = (
    "data", "rollout", "forward", "backward", "optimizer", "checkpoint", "validation", "paused", "other",
)  # fmt: skip
"""Where wall time can go inside a run. `rollout` is experience collection in reinforcement learning; `paused`
is the wait between the commands `pause` and `resume`."""

PRODUCTIVE_PHASES = frozenset({"rollout", "forward", "backward", "optimizer"})
"""Phases that count towards goodput, wherever they happen; `other` counts inside a step only."""

LOST_CAUSES = ("startup", "data", "checkpoint", "validation", "paused", "outside_step", "rework")
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
        source: which program exports it; `stack` for the metrics of Prometheus and Alertmanager themselves.
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

    @property
    def label_names(self) -> tuple[str, ...]:
        """All labels of its series, those every trainer metric carries included."""
        return (*RUN_LABELS, *self.labels) if self.source == "trainer" else self.labels


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"obsinfra_{name}", "gauge", help, labels)


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"obsinfra_{name}", "counter", help, labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(f"obsinfra_{name}", "histogram", help, labels, buckets)


# Learning
TRAIN_LOSS = _gauge("train_loss", "Training loss of the last step read back from the device.")
TRAIN_LOSS_PEAK = _gauge(
    "train_loss_peak", "Largest training loss of the last 15 seconds, so that no scrape misses a spike."
)
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
STEPS_PLANNED = _gauge(
    "steps_planned", "Global step at which the planned epochs end; absent where that is not known."
)
ETA_SECONDS = _gauge(
    "eta_seconds", "Seconds until the planned epochs end, at the pace so far; absent where that is not known."
)
STEPS = _counter("steps", "Steps taken by this process.")
SAMPLES = _counter("samples", "Samples consumed by this process.")
SAMPLES_PER_SECOND = _gauge(
    "samples_per_second",
    "Samples per second over the last 10 seconds; absent until the loop tells how many a step has.",
)
GROUP_RESTARTS = _counter(
    "group_restarts",
    "How often the ranks of this launch met again, by cause: killed, timeout, error or membership.",
    "cause",
)
GROUP_DOWNTIME_SECONDS = _gauge(
    "group_downtime_seconds", "From the last failure of a rank to the first step of the group after it."
)
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
    "step_time_seconds",
    "Slowest of the steps that ended in the last 15 seconds and the one still running; of the first step of "
    "a process that compiles its model, what goes beyond 300 s.",
)
STEP_MEDIAN_SECONDS = _gauge("step_median_seconds", "Smoothed median of the step durations.")
STEP_OWN_MEDIAN_SECONDS = _gauge(
    "step_own_median_seconds",
    "Smoothed median of what of a step waited for no other rank: data, rollout, forward, and the backward "
    "pass up to the wait for the exchange of gradients; absent where that cannot be told.",
)
SECONDS_SINCE_STEP = _gauge(
    "seconds_since_step",
    "Seconds since the last step ended, validation and pauses left out; absent before the first step and "
    "after training.",
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
HOST_SWAP_USED_BYTES = _gauge("host_swap_used_bytes", "Swap in use on the host.")
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
GPU_MEMORY_ACTIVITY_RATIO = _gauge(
    "gpu_memory_activity_ratio", "Share of time device memory was read or written.", "device"
)
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
GPU_PCIE_REPLAYS = _gauge(
    "gpu_pcie_replays",
    "Times the PCIe link had to send a packet again, since the driver was loaded.",
    "device",
)
GPU_NVLINK_ERRORS = _gauge(
    "gpu_nvlink_errors",
    "NVLink errors over all links since the driver was loaded, by type (crc, replay, recovery).",
    "device",
    "type",
)
CUDA_ALLOCATOR_BYTES = _gauge(
    "cuda_allocator_bytes",
    "PyTorch's caching allocator: allocated, reserved and their peaks, since the start or since the "
    "micro-batch last changed.",
    "device",
    "state",
)
CUDA_ALLOCATOR_RETRIES = _counter(
    "cuda_allocator_retries", "Allocations retried after the cache was freed.", "device"
)

# Memory that runs short
OOM_RECOVERIES = _counter(
    "oom_recoveries", "Steps that ran out of memory and were done again with smaller micro-batches."
)
MICRO_BATCH_GROWTHS = _counter("micro_batch_growths", "Times a larger micro-batch was tried again.")
MEMORY_GUARD_MEASURES = _counter(
    "memory_guard_measures",
    "What was done because host memory was short, by measure (gc, trim, prefetch, cache, other).",
    "measure",
)
MEMORY_GUARD_FREED_BYTES = _counter(
    "memory_guard_freed_bytes", "Resident memory that went with each of these measures.", "measure"
)
MEMORY_EXHAUSTION_SECONDS = _gauge(
    "memory_exhaustion_seconds",
    "Seconds until memory is exhausted if it grows on as in the last minutes; a day where it does not. The "
    "device is host, or a CUDA device by its allocator's peak.",
    "device",
)
GROWING_TENSOR_BYTES = _gauge(
    "growing_tensor_bytes",
    "Bytes of tensors of a kind (shape, type, device) there were more of at each of the last looks.",
)
GC_COLLECTIONS = _counter(
    "gc_collections",
    "Collections of Python's garbage between two steps (--gc boundary), by generation.",
    "generation",
)
GC_SECONDS = _counter("gc_seconds", "Time the loop waited for them.", "generation")
MICRO_BATCH_ROWS = _gauge("micro_batch_rows", "Rows of one forward and backward pass at most.")

# Speed of a step
COMPILE_GRAPHS = _counter("compile_graphs", "Graphs that torch.compile compiled, recompilations included.")
COMPILE_SECONDS = _counter("compile_seconds", "Time the loop waited for torch.compile's backend.")
COMPILE_RECOMPILES = _counter(
    "compile_recompiles", "Graphs compiled again because an input or the model was of another kind."
)
COMPILE_GRAPH_BREAKS = _counter(
    "compile_graph_breaks", "Places at which torch.compile had to go back to Python."
)
COMPILE_FALLBACKS = _counter(
    "compile_fallbacks",
    "Times something runs uncompiled, by cause: the compiler failed on a graph (backend), the tracer on code "
    "(tracing), or there were more kinds of input than torch keeps compiled (variants).",
    "cause",
)
SCALER_SKIPPED_STEPS = _counter(
    "scaler_skipped_steps", "Optimizer steps left out because a gradient under fp16 was not finite."
)
MODEL_FLOPS_PER_SECOND = _gauge(
    "model_flops_per_second",
    "Floating-point operations a second that the model's mathematics needs, at the present throughput.",
)
MFU_RATIO = _gauge(
    "mfu_ratio",
    "Model FLOPs utilisation: what the model needs ÷ what the device computes at most in this precision; "
    "absent where either is not known.",
)
HFU_RATIO = _gauge(
    "hfu_ratio", "Hardware FLOPs utilisation: as the MFU, with what is computed twice counted twice."
)

# Of the last watch over utilisation: the smallest, mean and largest reading
GPU_WATCH_UTILIZATION_RATIO = _gauge(
    "gpu_watch_utilization_ratio", "Share of time a kernel was running, while watched.", "device", "statistic"
)
GPU_WATCH_MEMORY_RATIO = _gauge(
    "gpu_watch_memory_ratio", "Device memory in use ÷ installed, while watched.", "device", "statistic"
)
GPU_WATCH_MEMORY_ACTIVITY_RATIO = _gauge(
    "gpu_watch_memory_activity_ratio",
    "Share of time device memory was read or written, while watched.",
    "device",
    "statistic",
)
GPU_WATCH_POWER_WATTS = _gauge("gpu_watch_power_watts", "Power drawn, while watched.", "device", "statistic")
GPU_WATCH_TEMPERATURE_CELSIUS = _gauge(
    "gpu_watch_temperature_celsius", "Core temperature, while watched.", "device", "statistic"
)
BOTTLENECK = _gauge(
    "bottleneck",
    "1 for what bounded the training when last watched (input, launch, compute, memory), 0 for the rest.",
    "kind",
)
INFERENCE_ENGINE_LATENCY_SECONDS = _gauge(
    "inference_engine_latency_seconds",
    "Quantiles of single calls of an optimised model, by engine, as measured when it was made.",
    "engine",
    "quantile",
)
INFERENCE_FALLBACKS = _counter(
    "inference_fallbacks",
    "Calls of an optimised model that went to the model itself: inputs of another form.",
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

# Data
DATA_RECORDS_SKIPPED = _counter("data_records_skipped", "Corrupt records that the data loader left out.")
DATA_LOADER_WORKERS = _gauge("data_loader_workers", "Worker processes that the data loader was planned with.")
DATA_CACHE_BYTES = _gauge("data_cache_bytes", "Held by the caches of data sets, in all worker processes.")
DATA_CACHE_LOOKUPS = _counter(
    "data_cache_lookups",
    "Blocks that a data set wanted, by whether its cache had them (hit, miss).",
    "outcome",
)

# Control and alerts
CONTROL_COMMANDS = _counter(
    "control_commands",
    "Commands by action and outcome (done, failed, rejected, expired).",
    "action",
    "outcome",
)
CONTROL_ACTION_SECONDS = _histogram(
    "control_action_seconds",
    "How long an action took, from its start to its outcome.",
    DURATION_BUCKETS,
    "action",
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
    "Webhook calls by outcome (accepted, unauthorized, malformed, too_large, too_slow, too_many, "
    "journal_failed).",
    ("outcome",),
    source="sidecar",
)
SIDECAR_ALERTS = Metric(
    "obsinfra_sidecar_alerts",
    "counter",
    "Alerts by what was decided about them, when heard of or later (accepted, duplicate, again, informed, "
    "resolved, escalated, undone, cool_down, hourly_limit, dry_run, no_run, unknown_run, run_ended, "
    "unknown_action, expired).",
    ("decision",),
    source="sidecar",
)
SIDECAR_COMMANDS = Metric(
    "obsinfra_sidecar_commands",
    "counter",
    "Commands sent on by action and outcome (done, failed, rejected, expired; undelivered: the run ended or "
    "could not be reached; unacknowledged: handed over, and not a word of how it ended).",
    ("action", "outcome"),
    source="sidecar",
)
SIDECAR_ESCALATIONS = Metric(
    "obsinfra_sidecar_escalations",
    "counter",
    "Further steps of the policy taken because an alert went on firing, and undone when it resolved.",
    ("alert", "action"),
    source="sidecar",
)
SIDECAR_HELD_BACK = Metric(
    "obsinfra_sidecar_held_back",
    "counter",
    "Commands that the policy held back, by reason (cool_down, hourly_limit, dry_run).",
    ("reason",),
    source="sidecar",
)
SIDECAR_ACTION_SECONDS = Metric(
    "obsinfra_sidecar_action_seconds",
    "gauge",
    "What was done about an alert that fires: seconds from its being heard to the outcome (as of "
    "obsinfra_sidecar_commands_total), or so far (under_way); 0 for what the policy held back (cool_down, "
    "hourly_limit, dry_run, unknown_action). Gone when the alert is over.",
    ("run", "alert", "action", "outcome"),
    source="sidecar",
)
SIDECAR_ACTION_STEP = Metric(
    "obsinfra_sidecar_action_step",
    "gauge",
    "Global step at which that was done, or that was saved; absent where none is known.",
    ("run", "alert", "action"),
    source="sidecar",
)
SIDECAR_RUNS = Metric("obsinfra_sidecar_runs", "gauge", "Runs found, by state.", ("state",), source="sidecar")
SIDECAR_RUN_UP = Metric(
    "obsinfra_sidecar_run_up",
    "gauge",
    "1 while a trainer of the run lives; 0 for an hour after one died without saying how it ended; "
    "absent for runs that ended.",
    ("run", "model"),
    source="sidecar",
)
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
