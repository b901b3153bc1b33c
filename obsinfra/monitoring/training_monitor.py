"""TrainingMonitor: one object that watches a training loop and shows what it sees.

Wires the recorder, the samplers, the evaluator, the tracer and the metrics server for one process. Useful
alone; `obsinfra.observe` uses it for the whole loop. Knows no checkpoints and no commands: whoever makes
them reports them here.
"""

from __future__ import annotations

import math
import os
import platform
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from obsinfra.alerting.evaluator import AlertEvaluator, AlertStatus
from obsinfra.catalog import metrics as catalog
from obsinfra.catalog.alert_changes import CHANGEABLE, alert_table
from obsinfra.catalog.conditions import Value
from obsinfra.errors import ConfigError
from obsinfra.monitoring.exporter import MetricsServer
from obsinfra.monitoring.exposition import HistogramSample, SampleCollector
from obsinfra.monitoring.history import History
from obsinfra.monitoring.instruments import HistogramValue, Instruments
from obsinfra.monitoring.json_numbers import finite
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.machine import Machine
from obsinfra.monitoring.performance_history import NullPerformanceHistory, PerformanceHistory
from obsinfra.monitoring.recorder import Recorder, _Phase, _Step
from obsinfra.monitoring.sample import Sample
from obsinfra.monitoring.tracing import Tracer, create_tracer, null_tracer, trace_id_of

RUN_STATES = ("starting", "running", "paused", "stopping", "finished", "stopped", "failed")
HURRY_SECONDS = 0.1
"""At least so long between two evaluations out of turn."""

SHOWN_EVENTS = 20
"""Checkpoints and commands kept for the page."""


@dataclass(frozen=True, slots=True)
class TrainingMetrics:
    """Values of one moment of training, for loops that report instead of being timed.

    Attributes:
        epoch, step: where training is; `step` is the global step just finished.
        loss, gradient_norm: numbers or one-element tensors.
        learning_rate: of the first parameter group.
        samples: samples consumed since the last report.
        step_time_seconds: duration of the step, where no `step()` context measured it; left out, the
            step lasted since the previous report.
        validation: validation metrics by name, when there are new ones.
        extra: further values by name.
    """

    epoch: int
    step: int
    loss: Any = None
    gradient_norm: Any = None
    learning_rate: float | None = None
    samples: int = 0
    step_time_seconds: float | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


class TrainingMonitor:
    """Watches one training process.

    Args:
        model: model name; the `model` label.
        run: run id; the `run` label. Default: model and start time.
        rank, world_size: this process's place among the ranks.
        metrics_host, metrics_port: where `/metrics` and the page listen; a taken port gives way to the next.
        sample_seconds: interval of host and GPU samples, alert evaluation and history points.
        thresholds: other thresholds of the alert table, by key (`catalog.alerts`).
        alerts: other fields of its rows: key → field → value, as under `[alerts]` of the settings.
        trace_every: trace every Nth step besides the slow ones; 0 traces only those.
        otlp_endpoint: OTLP/HTTP collector; None uses one that answers on 127.0.0.1:4318.
        trace_file: where spans are also kept, one JSON document a line.
        history_file: where the numbers are kept as they go (`performance_history`); its folder must exist.
        disk_path: folder whose free space is watched.
        epochs: epochs planned, for progress and ETA; 0 when open-ended.
        device, precision: shown in build info and on the page.
        after_alerts: called with all pending and firing alerts after each evaluation, on the housekeeping
            thread.
        alert_mode: returns `sidecar` or `in-process`, who acts on alerts now; shown on the page.
        all_runs_page: returns where a page of all runs is, or None; the page leads there.

    Attributes:
        optimizer: whose first group has the learning rate that is shown where none is recorded; may be None.
    """

    def __init__(
        self,
        model: str = "custom",
        *,
        run: str | None = None,
        rank: int = 0,
        world_size: int = 1,
        metrics_host: str = "127.0.0.1",
        metrics_port: int = 9464,
        sample_seconds: float = 1.0,
        thresholds: Mapping[str, float] | None = None,
        alerts: Mapping[str, Mapping[str, Any]] | None = None,
        trace_every: int = 100,
        otlp_endpoint: str | None = None,
        trace_file: Path | None = None,
        history_file: Path | None = None,
        disk_path: Path | None = None,
        epochs: int = 0,
        device: str = "cpu",
        precision: str = "fp32",
        git_revision: str | None = None,
        after_alerts: Callable[[Sequence[AlertStatus]], None] | None = None,
        alert_mode: Callable[[], str] = lambda: "in-process",
        all_runs_page: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.model = model
        self.run = run or f"{model}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        self.rank, self.world_size = rank, world_size
        self.epochs = epochs
        self.steps_per_epoch: int | None = None
        self.state = "starting"
        self.resumed_from_step: int | None = None
        self.optimizer: object | None = None
        self.device, self.precision = device, precision
        self.started_at = time.time()
        self.recorder = Recorder(trace_every=trace_every)
        self.recorder.own_time_known = device == "cpu"
        self.instruments = Instruments()
        self._sources: list[weakref.WeakMethod[Callable[[], Iterable[Sample]]]] = []
        self.history = History()
        self._kept = PerformanceHistory(history_file, rank) if history_file else NullPerformanceHistory()
        self.tracer: Tracer = null_tracer()
        self.trace_id: str | None = None
        self.url: str | None = None
        self.validation: dict[str, float] = {}
        self.checkpoints: deque[dict[str, Any]] = deque(maxlen=SHOWN_EVENTS)
        self.commands: deque[dict[str, Any]] = deque(maxlen=SHOWN_EVENTS)
        self._last_commit_at = self.started_at
        self._address = (metrics_host, metrics_port)
        self._sample_seconds = sample_seconds
        self._otlp_endpoint, self._trace_file = otlp_endpoint, trace_file
        self._machine = Machine(disk_path or Path.cwd())
        self._alert_mode = alert_mode
        self._all_runs_page = all_runs_page
        self._alerts = alert_table(thresholds, alerts)
        self._evaluator = AlertEvaluator(self._alerts, self._for_alerts, clock=time.time)
        self._after_alerts = after_alerts
        self.alerts: list[AlertStatus] = []
        self._server: MetricsServer | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self.recorder.on_alarm = self._wake.set
        self._set_alarm()
        self._known_failures: set[str] = set()
        self._log = get_logger("system")
        self._revision = git_revision
        self._exist_from_the_start()

    # ---- life ------------------------------------------------------------------------------------

    def start_monitoring(self) -> None:
        """Open `/metrics` and the page, start the housekeeping thread and the run's trace.

        Raises:
            ConfigError: the address cannot be listened on, or the OTLP endpoint is none.
        """
        if self._thread is not None:
            return
        collector = SampleCollector(
            {"run": self.run, "model": self.model, "rank": str(self.rank)}, self.samples, self._histograms
        )
        host, port = self._address
        server = MetricsServer(
            collector, self.live, host=host, port=port, on_error=lambda error: self._failed("exporter", error)
        )
        try:
            self.tracer = create_tracer(
                run_id=self.run,
                model=self.model,
                rank=self.rank,
                world_size=self.world_size,
                endpoint=self._otlp_endpoint,
                trace_file=self._trace_file,
                probe=self._otlp_endpoint is None,
            )
        except BaseException:
            server.stop()
            raise
        self._server, self.url = server, server.url
        started = self.tracer.start_run(
            time.time_ns(), {"obsinfra.device": self.device, "obsinfra.epochs": self.epochs}
        )
        self.trace_id = trace_id_of(started)
        self._kept.start(self._facts())
        self._stop.clear()
        self._wake.clear()
        self._thread = threading.Thread(target=self._housekeeping, name="obsinfra-monitor", daemon=True)
        self._thread.start()

    def stop_monitoring(self) -> None:
        """Last samples and spans, then close the port and end the thread. May be called twice."""
        if self._thread is None:
            return
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=10)
        self._thread = None
        self._tick(last=True)
        self._kept.close()
        self.tracer.close(timeout=3.0)
        if self._server is not None:
            self._server.stop()
            self._server = None
        self._machine.close()

    def __enter__(self) -> TrainingMonitor:
        self.start_monitoring()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop_monitoring()

    # ---- the loop's side -------------------------------------------------------------------------

    def step(self) -> _Step:
        """Context manager of one step."""
        return self.recorder.step_context()

    def phase(self, name: str) -> _Phase:
        """Context manager of a phase (`catalog.metrics.PHASES`)."""
        return self.recorder.phase(name)

    def record(self, **values: Any) -> None:
        """Values of the current step; see `Recorder.record`."""
        self.recorder.record(**values)

    def watch(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Iterate `loader` with the wait for each batch seen as the data phase."""
        phase = self.recorder.phase("data")
        iterator = iter(loader)
        while True:
            try:
                with phase:
                    batch = next(iterator)
            except StopIteration:
                return
            yield batch

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Context manager that times one forward pass outside training; one that raises is not counted.

        It measures wall time. On CUDA call `torch.cuda.synchronize()` before leaving it, or it measures
        the launch only.
        """
        started = time.perf_counter()
        yield
        self.instruments.observe(catalog.INFERENCE_LATENCY_SECONDS, time.perf_counter() - started)

    def log_training_metrics(self, metrics: TrainingMetrics) -> None:
        """Report a moment of training; see `TrainingMetrics`."""
        recorder = self.recorder
        recorder.epoch, recorder.step = metrics.epoch, metrics.step
        in_step = recorder.seconds_in_step() is not None
        recorder.record(
            loss=metrics.loss,
            grad_norm=metrics.gradient_norm,
            samples=metrics.samples,
            learning_rate=metrics.learning_rate,
            **metrics.extra,
        )
        if not in_step:
            recorder.finish_untimed_step(metrics.step_time_seconds)
        if metrics.validation:
            self.log_validation(metrics.validation)

    def log_validation(self, values: Mapping[str, float]) -> None:
        """New validation metrics at the present step."""
        self.validation = {name: float(value) for name, value in values.items()}
        for name, value in self.validation.items():
            self.instruments.set(catalog.VALIDATION_METRIC, value, metric=name)
        self.history.add_validation(self.recorder.step, self.validation)
        self._kept.validation(self.recorder.step, self.validation)

    def begin_epoch(self, epoch: int) -> None:
        """An epoch starts, or goes on after a restart."""
        self.recorder.epoch = epoch
        self.tracer.start_epoch(epoch, time.time_ns())

    def end_epoch(self) -> None:
        """The present epoch is over."""
        self.tracer.end_epoch(time.time_ns())

    def set_state(self, state: str) -> None:
        """The run's state, one of `RUN_STATES`."""
        self.state = state
        for name in RUN_STATES:
            self.instruments.set(catalog.RUN_STATE, float(name == state), state=name)

    def set_threshold(self, key: str, value: float | None) -> tuple[float, float]:
        """Judge one alert by another threshold until the process ends. On any thread.

        Args:
            key: as under `[thresholds]`.
            value: in the unit of the alert table; None: what the settings say.

        Returns:
            The threshold until now, and the new one.

        Raises:
            ConfigError: an unknown key, or an alert that is not judged in this process.
        """
        judged = {row.key: row for row in self._evaluator.alerts}
        if key not in judged:
            raise ConfigError(
                f"threshold {key!r} is not one of those judged in this process",
                f"one of {', '.join(judged)}",
                "correct key",
            )
        if value is None:
            value = next(row.threshold for row in self._alerts if row.key == key)
        try:
            changed = CHANGEABLE["threshold"](judged[key], value)
        except ValueError as error:
            raise ConfigError(f"threshold {key} = {value}", str(error), "give another value") from None
        self._evaluator.replace(changed)
        self._set_alarm()
        return judged[key].threshold, changed.threshold

    # ---- what others report ----------------------------------------------------------------------

    def checkpoint_committed(
        self,
        *,
        kind: str,
        step: int,
        requested_at: float,
        bytes_total: int,
        bytes_written: int,
        path: str,
        traceparent: str | None = None,
    ) -> None:
        """A checkpoint became durable now. `requested_at` is epoch seconds."""
        now = time.time()
        seconds = max(0.0, now - requested_at)  # the clock may have been set back in between
        self._last_commit_at = now
        self.checkpoints.appendleft(
            {"step": step, "kind": kind, "at": now, "bytes": bytes_total, "seconds": seconds}
        )
        add, put = self.instruments.add, self.instruments.set
        add(catalog.CHECKPOINTS, kind=kind)
        add(catalog.CHECKPOINT_WRITTEN_BYTES, bytes_written)
        put(catalog.CHECKPOINT_BYTES, bytes_total)
        put(catalog.CHECKPOINT_STEP, step)
        self.instruments.observe(catalog.CHECKPOINT_DURATION_SECONDS, seconds)
        self.tracer.emit(
            "checkpoint",
            int(requested_at * 1e9),
            int(now * 1e9),
            {
                "obsinfra.kind": kind,
                "obsinfra.step": step,
                "obsinfra.bytes": bytes_total,
                "obsinfra.path": path,
            },
            parent_traceparent=traceparent,
        )

    def command_finished(
        self,
        *,
        id: str,
        action: str,
        source: str,
        reason: str,
        outcome: str,
        step: int | None,
        started_at: float,
        traceparent: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """A control command reached its final state now.

        Args:
            started_at: epoch seconds.
            seconds: how long its action took; None when it was not carried out.
        """
        now = time.time()
        self.commands.appendleft(
            {
                "id": id,
                "action": action,
                "source": source,
                "state": outcome,
                "at": now,
                "step": step,
                "reason": reason,
            }
        )
        self.instruments.add(catalog.CONTROL_COMMANDS, action=action, outcome=outcome)
        if seconds is not None:
            self.instruments.observe(catalog.CONTROL_ACTION_SECONDS, seconds, action=action)
        self.tracer.emit(
            f"command {action}",
            int(started_at * 1e9),
            int(now * 1e9),
            {"obsinfra.command.id": id, "obsinfra.command.source": source, "obsinfra.outcome": outcome},
            parent_traceparent=traceparent,
        )

    # ---- what it shows ---------------------------------------------------------------------------

    def get_performance_summary(self) -> dict[str, Any]:
        """Totals, rates, quantiles of the last 4,096 step times (seconds), phases and goodput so far."""
        recorder = self.recorder
        recorder.fold()
        recent = sorted(recorder.recent_seconds)

        def quantile(q: float) -> float | None:
            return recent[min(len(recent) - 1, int(q * len(recent)))] if recent else None

        return {
            "run": self.run,
            "model": self.model,
            "epoch": recorder.epoch,
            "step": recorder.step,
            "steps": recorder.steps,
            "samples": recorder.samples,
            "wall_seconds": time.time() - self.started_at,
            "samples_per_second": recorder.samples_per_second(),
            "step_seconds_mean": recorder.step_seconds_sum / recorder.steps if recorder.steps else None,
            "step_seconds_p50": quantile(0.50),
            "step_seconds_p95": quantile(0.95),
            "step_seconds_p99": quantile(0.99),
            "phase_seconds": recorder.phase_seconds(),
            "lost_seconds": recorder.lost_seconds(),
            "goodput_ratio": recorder.goodput(),
            "loss": recorder.last_loss,
            "gradient_norm": recorder.last_grad_norm,
            "nonfinite_losses": recorder.nonfinite,
        }

    def samples(self) -> list[Sample]:
        """Every gauge and counter of this process, as of now."""
        recorder = self.recorder
        recorder.fold()
        out: list[Sample] = []

        def put(metric: catalog.Metric, value: float | None, /, **labels: str) -> None:
            if value is not None:
                out.append(Sample(metric, labels, float(value)))

        put(catalog.TRAIN_LOSS, recorder.last_loss)
        put(catalog.TRAIN_LOSS_PEAK, recorder.peak_loss())
        put(catalog.GRADIENT_NORM, recorder.last_grad_norm)
        put(catalog.GRADIENT_NORM_PEAK, recorder.peak_grad_norm())
        put(catalog.LEARNING_RATE, self._learning_rate())
        put(catalog.LOSS_SCALE, recorder.loss_scale)
        put(catalog.NONFINITE_LOSSES, recorder.nonfinite)
        put(catalog.EPOCH, recorder.epoch)
        put(catalog.EPOCHS_PLANNED, self.epochs or None)
        put(catalog.STEP, recorder.step)
        if self.epochs and self.steps_per_epoch:
            put(catalog.STEPS_PLANNED, self.epochs * self.steps_per_epoch)
        put(catalog.ETA_SECONDS, self._progress()["eta_seconds"])
        put(catalog.STEPS, recorder.steps)
        put(catalog.SAMPLES, recorder.samples)
        put(catalog.SAMPLES_PER_SECOND, self._samples_per_second())
        put(catalog.STEP_TIME_SECONDS, recorder.step_time())
        put(catalog.STEP_MEDIAN_SECONDS, recorder.median_step_seconds() or None)
        put(catalog.STEP_OWN_MEDIAN_SECONDS, recorder.own_median_seconds())
        if self.state == "running":
            put(catalog.SECONDS_SINCE_STEP, recorder.seconds_since_step())
        put(catalog.GOODPUT_RATIO, recorder.goodput())
        put(catalog.CHECKPOINT_AGE_SECONDS, time.time() - self._last_commit_at)
        put(catalog.TELEMETRY_DROPPED, self.tracer.dropped, component="tracing")
        put(catalog.TELEMETRY_DROPPED, recorder.dropped, component="recorder")
        put(catalog.SPANS, self.tracer.created)
        for name, seconds in recorder.phase_seconds().items():
            put(catalog.PHASE_SECONDS, seconds, phase=name)
        for name, seconds in recorder.lost_seconds().items():
            put(catalog.LOST_SECONDS, seconds, cause=name)
        for name, value in recorder.train_metric_values().items():
            put(catalog.TRAIN_METRIC, value, metric=name)
        firing = {
            (status.alert.name, status.alert.severity) for status in self.alerts if status.state == "firing"
        }  # one series, however many devices the alert fires for
        for name, severity in sorted(firing):
            put(catalog.ALERT_FIRING, 1.0, alert=name, severity=severity)
        return [*out, *self._from_sources(), *self._machine.samples, *self.instruments.samples()]

    def present_value(self, metric: catalog.Metric) -> float | None:
        """What a metric without labels of its own shows now; None while it is absent."""
        return next((sample.value for sample in self.samples() if sample.metric is metric), None)

    def add_source(self, read: Callable[[], Iterable[Sample]]) -> None:
        """Show what `read` returns as well, for as long as the object lives whose method it is.

        Values of several sources with the same metric and labels are added up. May be called again with the
        same method.
        """
        source = weakref.WeakMethod(read)
        if source not in self._sources:
            self._sources.append(source)

    def _from_sources(self) -> list[Sample]:
        totals: dict[tuple[str, tuple[tuple[str, str], ...]], Sample] = {}
        for source in list(self._sources):
            read = source()
            for sample in read() if read is not None else ():
                key = (sample.metric.name, tuple(sorted(sample.labels.items())))
                before = totals[key].value if key in totals else 0.0
                totals[key] = Sample(sample.metric, sample.labels, before + sample.value)
        return list(totals.values())

    def live(self, since: int) -> dict[str, Any]:
        """The document of `/api/live`; numbers that are not finite become null."""
        recorder = self.recorder
        recorder.fold()
        now = time.time()
        document: dict[str, Any] = {
            "version": 1,
            "run": {
                "id": self.run,
                "model": self.model,
                "rank": self.rank,
                "world_size": self.world_size,
                "host": socket.gethostname(),
                "device": self.device,
                "precision": self.precision,
                "started": datetime.fromtimestamp(self.started_at, UTC).isoformat(timespec="seconds"),
                "state": self.state,
                "pid": os.getpid(),
                "resumed_from_step": self.resumed_from_step,
            },
            "now": now,
            "uptime_seconds": now - self.started_at,
            "progress": self._progress(),
            "goodput": {"ratio": recorder.goodput(), "lost_seconds": recorder.lost_seconds()},
            "phases": recorder.phase_seconds(),
            "latest": {
                "loss": recorder.last_loss,
                "grad_norm": recorder.last_grad_norm,
                "learning_rate": self._learning_rate(),
                "samples_per_second": self._samples_per_second(),
                "step_time_seconds": recorder.median_step_seconds() or None,
                "loss_scale": recorder.loss_scale,
                "validation": self.validation,
                "train": dict(recorder.train_metric_values()),
            },
            "host": self._machine.host,
            "alerts": [
                {
                    "name": status.alert.name,
                    "severity": status.alert.severity,
                    "state": status.state,
                    "value": status.value / status.alert.scale,
                    "threshold": status.alert.threshold,
                    "unit": status.alert.threshold_unit,
                    "since": status.since,
                    "summary": status.alert.description,
                    "labels": dict(status.labels),
                }
                for status in self.alerts
            ],
            "alert_mode": self._alert_mode(),
            "all_runs_page": self._all_runs_page(),
            "checkpoints": list(self.checkpoints),
            "commands": list(self.commands),
            "gpus": self._machine.gpus(),
            **self.history.since(since),
        }
        shown: dict[str, Any] = finite(document, instead=lambda number: None)
        return shown

    # ---- inside ------------------------------------------------------------------------------------

    def _exist_from_the_start(self) -> None:
        """Counters and constant facts are there from the first scrape, so that first events are seen."""
        add = self.instruments.add
        for kind in ("regular", "emergency", "best", "final"):
            add(catalog.CHECKPOINTS, 0, kind=kind)
            add(catalog.CHECKPOINT_FAILURES, 0, kind=kind)
        add(catalog.CHECKPOINT_WRITTEN_BYTES, 0)
        self.set_state("starting")
        self.instruments.set(
            catalog.BUILD_INFO,
            1.0,
            version=version("obsinfra"),
            torch=_torch_version(),
            python=platform.python_version(),
            revision=self._revision or "",
            device=self.device,
            precision=self.precision,
        )

    def _facts(self) -> dict[str, Any]:
        """What this process is and what it runs on."""
        return {
            "model": self.model,
            "rank": self.rank,
            "world_size": self.world_size,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "resumed_from_step": self.resumed_from_step,
            "device": self.device,
            "precision": self.precision,
            "revision": self._revision,
            "versions": {
                "obsinfra": version("obsinfra"),
                "torch": _torch_version(),
                "python": platform.python_version(),
            },
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "gpus": self._machine.gpu_names(),
        }

    def _housekeeping(self) -> None:
        """A round every `sample_seconds`; the alerts at once when the recorder raises an alarm."""
        due = time.monotonic() + self._sample_seconds
        while True:
            self._wake.wait(max(0.0, due - time.monotonic()))
            self._wake.clear()
            if self._stop.is_set():
                return
            if time.monotonic() >= due:  # also where alarms never cease
                self._tick()
                due = time.monotonic() + self._sample_seconds
            else:
                self._look_after(("recorder", self.recorder.fold), ("alerts", self._evaluate))
                self._stop.wait(HURRY_SECONDS)  # a loop that raises one every step gets no evaluation each

    def _tick(self, *, last: bool = False) -> None:
        """One round of housekeeping."""
        self._look_after(
            ("recorder", self.recorder.fold),
            ("samplers", self._machine.sample),
            ("alerts", self._evaluate),
            ("tracing", self._trace),
            ("history", self._remember),
            ("history_file", lambda: self._kept.summary(self.get_performance_summary, last=last)),
            ("history_file", self._kept.write),
        )

    def _look_after(self, *parts: tuple[str, Callable[[], None]]) -> None:
        """Each part may fail without stopping the others."""
        for name, part in parts:
            try:
                part()
            except Exception as error:
                self._failed(name, error)

    def _failed(self, component: str, error: Exception) -> None:
        self.instruments.add(catalog.TELEMETRY_ERRORS, component=component)
        if component not in self._known_failures:
            self._known_failures.add(component)
            self._log.error("telemetry_failed", component=component, error=repr(error), exc_info=error)

    def _for_alerts(self) -> list[tuple[str, Mapping[str, str], float]]:
        return [(sample.metric.sample_name, sample.labels, sample.value) for sample in self.samples()]

    def _set_alarm(self) -> None:
        """A gradient norm that makes an alert fire at once is not left to the next round."""
        limits = [
            alert.limit
            for alert in self._evaluator.alerts
            if alert.condition == Value(catalog.GRADIENT_NORM_PEAK)
            and alert.comparator == ">"
            and not alert.for_seconds
        ]
        self.recorder.alarm_norm = min(limits, default=math.inf)

    def _evaluate(self) -> None:
        self.alerts = self._evaluator.evaluate()
        self._kept.alerts(self.alerts, self.recorder.step)
        if self._after_alerts is not None:
            self._after_alerts(self.alerts)

    def _trace(self) -> None:
        for step in self.recorder.traced_steps():
            attributes: dict[str, Any] = {} if step.loss is None else {"obsinfra.loss": step.loss}
            trace_id = self.tracer.emit_step(
                step.step, step.epoch, step.start_ns, step.end_ns, step.phases, attributes, reason=step.reason
            )
            if trace_id:
                self.recorder.attach_exemplar(
                    (step.end_ns - step.start_ns) / 1e9, trace_id, step.end_ns / 1e9
                )

    def _remember(self) -> None:
        recorder = self.recorder
        gpu_ratio, gpu_memory_ratio = self._machine.gpu_load()
        point: dict[str, float | None] = {
            "time": time.time(),
            "step": recorder.step,
            "loss": recorder.take_mean_loss(),
            "grad_norm": recorder.take_peak_grad_norm(),
            "learning_rate": self._learning_rate(),
            "samples_per_second": self._samples_per_second(),
            "step_time_seconds": recorder.median_step_seconds() or None,
            "cpu_ratio": self._machine.host.get("cpu_ratio"),
            "memory_ratio": self._machine.host.get("memory_ratio"),
            "gpu_ratio": gpu_ratio,
            "gpu_memory_ratio": gpu_memory_ratio,
        }
        self.history.add(point)
        self._kept.point(point)

    def _learning_rate(self) -> float | None:
        """As recorded, or as the optimizer has it; None where neither knows, or only the device does."""
        if self.recorder.learning_rate is not None:
            return self.recorder.learning_rate
        groups = getattr(self.optimizer, "param_groups", None)
        rate = groups[0].get("lr") if groups else None
        return float(rate) if isinstance(rate, (int, float)) else None

    def _samples_per_second(self) -> float | None:
        """None where the loop never told how many samples a step has."""
        return self.recorder.samples_per_second() if self.recorder.samples else None

    def _progress(self) -> dict[str, Any]:
        recorder = self.recorder
        eta = None
        per_epoch = self.steps_per_epoch
        if per_epoch and self.epochs and recorder.steps:
            left = self.epochs * per_epoch - recorder.step
            busy = time.time() - self.started_at - recorder.lost_seconds()["startup"]
            eta = max(0.0, left * busy / recorder.steps)
        return {
            "epoch": recorder.epoch,
            "epochs": self.epochs or None,
            "step": recorder.step,
            "steps_per_epoch": per_epoch,
            "samples": recorder.samples,
            "eta_seconds": eta if self.state == "running" else None,
        }

    def _histograms(self) -> list[HistogramSample]:
        recorder = self.recorder
        steps = HistogramValue(
            list(recorder.bucket_counts),
            recorder.step_seconds_sum,
            {
                index: ({"trace_id": exemplar.trace_id}, exemplar.seconds, exemplar.at)
                for index, exemplar in recorder.exemplars.copy().items()
            },
        )
        return [(catalog.STEP_DURATION_SECONDS, {}, steps), *self.instruments.histograms()]


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"
