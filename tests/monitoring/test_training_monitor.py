"""TrainingMonitor alone: every metric of the catalogue on a live scrape, and the summary of what it saw."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from waiting import wait_for

from obsinfra.alerting.evaluator import AlertStatus
from obsinfra.catalog import alerts as alert_catalog
from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError
from obsinfra.monitoring.cgroup import memory_limit
from obsinfra.monitoring.gpu_sampler import create_gpu_sampler
from obsinfra.monitoring.sample import Sample
from obsinfra.monitoring.training_monitor import TrainingMetrics, TrainingMonitor

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
BATCHES = 20


def scrape(monitor: TrainingMonitor, accept: str = "*/*") -> str:
    request = urllib.request.Request(f"{monitor.url}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def live(monitor: TrainingMonitor, since: int = 0) -> dict[str, Any]:
    with urllib.request.urlopen(f"{monitor.url}/api/live?since={since}", timeout=30) as response:
        document: dict[str, Any] = json.loads(response.read())
    return document


def values_of(monitor: TrainingMonitor) -> dict[str, float]:
    """Samples without labels beyond the run's own, by name."""
    return {
        sample.name: sample.value
        for family in parse_text(scrape(monitor))
        for sample in family.samples
        if set(sample.labels) == set(catalog.RUN_LABELS)
    }


def train(monitor: TrainingMonitor) -> None:
    """One epoch of a small network, with validation, a checkpoint, a command and an inference."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(BATCHES * 8, 6), torch.randint(0, 3, (BATCHES * 8,)))
    model = torch.nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.set_state("running")
    monitor.begin_epoch(0)
    for inputs, targets in monitor.watch(DataLoader(data, batch_size=8)):
        with monitor.step():
            with monitor.phase("forward"):
                loss = functional.cross_entropy(model(inputs), targets)
            with monitor.phase("backward"):
                optimizer.zero_grad()
                loss.backward()
            with monitor.phase("optimizer"):
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            accuracy = (model(inputs).argmax(1) == targets).float().mean()
            monitor.record(loss=loss, grad_norm=norm, samples=8, learning_rate=0.1, accuracy=accuracy)
    with monitor.phase("validation"):
        monitor.log_validation({"loss": 1.25, "accuracy": 0.5})
    with monitor.inference(), torch.inference_mode():
        model(data.tensors[0])
    monitor.checkpoint_committed(
        kind="regular",
        step=BATCHES,
        requested_at=time.time() - 0.2,
        bytes_total=84,
        bytes_written=42,
        path="checkpoints/20",
    )
    monitor.command_finished(
        id="c1",
        action="checkpoint",
        source="cli",
        reason="asked",
        outcome="done",
        step=BATCHES,
        started_at=time.time(),
    )
    monitor.end_epoch()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingMonitor]:
    """A monitor that has watched a real training and still serves; every step traced, one of them NaN."""
    folder = tmp_path_factory.mktemp("watched")
    monitor = TrainingMonitor(
        'tiny "net"\n\\',
        run="watched",
        metrics_port=0,
        sample_seconds=0.05,
        trace_every=1,
        trace_file=folder / "trace.jsonl",
        disk_path=folder,
        epochs=2,
    )
    with monitor:
        train(monitor)
        with monitor.step():
            monitor.record(loss=math.nan)
        wait_for(
            lambda: "NonFiniteLoss" in {s.alert.name for s in monitor.alerts if s.state == "firing"},
            "an alert for the NaN",
        )
        wait_for(lambda: monitor.recorder.exemplars, "an exemplar of a traced step")
        # CPU ratios are over the time between two samples.
        wait_for(lambda: "obsinfra_host_cpu_ratio" in scrape(monitor), "a CPU ratio")
        yield monitor


# ---- a live scrape -------------------------------------------------------------------------------

REMOTE = [metric for metric in catalog.METRICS if metric.name.startswith("obsinfra_checkpoint_remote_")]
DATA = [metric for metric in catalog.METRICS if metric.name.startswith("obsinfra_data_")]
OPTIMIZER = ("oom_", "micro_batch_", "memory_guard_", "memory_exhaustion_", "growing_tensor_", "gc_")
MEMORY = [m for m in catalog.METRICS if m.name.removeprefix("obsinfra_").startswith(OPTIMIZER)]
FAST = ("compile_", "scaler_", "model_flops_", "mfu_", "hfu_", "gpu_watch_", "bottleneck", "inference_")
SPEED = [m for m in catalog.METRICS if m.name.removeprefix("obsinfra_").startswith(FAST)]
SPEED.remove(catalog.INFERENCE_LATENCY_SECONDS)  # a monitor's own
GROUP = [metric for metric in catalog.METRICS if metric.name.startswith("obsinfra_group_")]

FED_ELSEWHERE = {
    catalog.LOSS_SCALE: "the trainer, with a gradient scaler",
    catalog.BEST_METRIC: "the trainer, which knows what is better",
    catalog.SNAPSHOT_SECONDS: "whoever takes snapshots",
    catalog.CHECKPOINT_WRITER_RESTARTS: "whoever has a writer process",
    catalog.CONTROL_GARBAGE: "the control channel",
    catalog.CONTROL_ACTION_SECONDS: "whoever executes commands",
    catalog.CHECKPOINT_PROMISE_SECONDS: "whoever commits checkpoints",
    **dict.fromkeys(REMOTE, "whoever has a remote copy"),
    **dict.fromkeys(DATA, "a data loader, as a source"),
    **dict.fromkeys(MEMORY, "the memory optimiser"),
    **dict.fromkeys(GROUP, "a run on several ranks"),
    **dict.fromkeys(SPEED, "the GPU optimiser"),
    catalog.ETA_SECONDS: "whoever knows how many steps an epoch has",
    catalog.STEPS_PLANNED: "likewise",
}
"""What a monitor alone has no source for; its instruments carry it when those report it."""


def absent_on_this_machine() -> set[catalog.Metric]:
    absent = set()
    if not create_gpu_sampler().describe():
        absent |= {metric for metric in catalog.METRICS if metric.name.startswith("obsinfra_gpu_")}
    if not torch.cuda.is_available():
        absent |= {catalog.CUDA_ALLOCATOR_BYTES, catalog.CUDA_ALLOCATOR_RETRIES}
    if memory_limit(Path("/")) is None:
        absent |= {catalog.CGROUP_MEMORY_USED_BYTES, catalog.CGROUP_MEMORY_LIMIT_BYTES}
    if psutil.disk_io_counters() is None:
        absent |= {catalog.DISK_READ_BYTES, catalog.DISK_WRITTEN_BYTES}
    if not set(psutil.net_io_counters(pernic=True)) - {"lo"}:
        absent |= {catalog.NETWORK_RECEIVED_BYTES, catalog.NETWORK_SENT_BYTES}
    return absent


def family_problem(metric: catalog.Metric, family: Family) -> str | None:
    """What differs between a scraped family and its row in the catalogue."""
    if family.type != metric.kind:
        return f"{metric.name} is a {family.type}"
    if family.documentation != metric.help:
        return f"{metric.name}: {family.documentation!r}"
    for sample in family.samples:
        names = set(sample.labels) - {"le"}
        if names != {*catalog.RUN_LABELS, *metric.labels}:
            return f"{sample.name} has labels {names}"
    return None


def test_every_metric_of_the_catalogue_is_on_a_live_scrape(watched: TrainingMonitor) -> None:
    families = {family.name: family for family in parse_openmetrics(scrape(watched, OPENMETRICS))}
    expected = {metric for metric in catalog.METRICS if metric.source == "trainer"}
    expected -= absent_on_this_machine()
    expected -= set(FED_ELSEWHERE)
    assert sorted(families) == sorted(metric.name for metric in expected)
    problems = [family_problem(metric, families[metric.name]) for metric in expected]
    assert [problem for problem in problems if problem] == []


class Loader:
    """Says 3 of everything."""

    def telemetry(self) -> list[Sample]:
        return [Sample(metric, dict.fromkeys(metric.labels, "hit"), 3.0) for metric in DATA]


def test_what_others_report_is_on_the_scrape_too() -> None:
    monitor = TrainingMonitor("m", metrics_port=0)
    loaders = [Loader(), Loader()]
    for loader in [*loaders, *loaders]:  # a source that comes twice counts once
        monitor.add_source(loader.telemetry)
    with monitor:
        monitor.recorder.loss_scale = 1024.0
        monitor.instruments.set(catalog.BEST_METRIC, 0.25)
        monitor.instruments.observe(catalog.SNAPSHOT_SECONDS, 0.25)
        monitor.instruments.add(catalog.CONTROL_GARBAGE, door="inbox")
        monitor.instruments.observe(catalog.CONTROL_ACTION_SECONDS, 0.1, action="profile")
        monitor.instruments.add(catalog.CHECKPOINT_WRITER_RESTARTS)
        monitor.instruments.set(catalog.CHECKPOINT_PROMISE_SECONDS, 300.0)
        for metric in [*REMOTE, *MEMORY, *SPEED, *GROUP]:
            report = monitor.instruments.add if metric.kind == "counter" else monitor.instruments.set
            report(metric, 1.0, **dict.fromkeys(metric.labels, "any"))
        monitor.epochs, monitor.steps_per_epoch = 2, 1000
        monitor.set_state("running")
        with monitor.step():
            pass
        families = {family.name for family in parse_text(scrape(monitor))}
        values = {sample.metric: sample.value for sample in monitor.samples()}
        assert [values[metric] for metric in DATA] == [6.0] * len(DATA)
        loaders.pop()
        del loader
        values = {sample.metric: sample.value for sample in monitor.samples()}
        assert [values[metric] for metric in DATA] == [3.0] * len(DATA)
    assert families >= {metric.name for metric in FED_ELSEWHERE}


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)"
)
def test_promtool_finds_nothing_to_say_about_a_live_scrape(watched: TrainingMonitor) -> None:
    said = subprocess.run(
        ["promtool", "check", "metrics"],
        input=scrape(watched),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_exemplars_of_the_step_histogram_lead_to_traces_in_the_trace_file(watched: TrainingMonitor) -> None:
    families = {family.name: family for family in parse_openmetrics(scrape(watched, OPENMETRICS))}
    exemplars = [
        sample.exemplar
        for sample in families["obsinfra_step_duration_seconds"].samples
        if sample.exemplar is not None
    ]
    assert exemplars
    assert watched._trace_file is not None
    spans = wait_for(watched._trace_file.read_text, "spans in the trace file")
    for exemplar in exemplars:
        assert exemplar.labels["trace_id"] in spans
        assert abs(float(exemplar.timestamp) - time.time()) < 3600


def test_the_values_are_those_of_the_training(watched: TrainingMonitor) -> None:
    values = values_of(watched)
    assert values["obsinfra_steps_total"] == values["obsinfra_step"] == BATCHES + 1
    assert values["obsinfra_samples_total"] == BATCHES * 8
    assert values["obsinfra_nonfinite_losses_total"] == 1
    assert math.isnan(values["obsinfra_train_loss"])
    assert values["obsinfra_learning_rate"] == 0.1
    assert values["obsinfra_epochs_planned"] == 2
    assert values["obsinfra_checkpoint_step"] == BATCHES
    assert values["obsinfra_checkpoint_bytes"] == 84
    assert values["obsinfra_checkpoint_written_bytes_total"] == 42
    assert values["obsinfra_step_duration_seconds_count"] == BATCHES + 1
    assert values["obsinfra_inference_latency_seconds_count"] == 1
    assert values["obsinfra_checkpoint_duration_seconds_sum"] == pytest.approx(0.2, abs=0.15)
    assert values["obsinfra_spans_total"] >= BATCHES
    assert 0 < values["obsinfra_goodput_ratio"] < 1
    by_label = {
        (sample.name, sample.labels.get("metric") or sample.labels.get("action")): sample.value
        for family in parse_text(scrape(watched))
        for sample in family.samples
    }
    assert by_label["obsinfra_validation_metric", "accuracy"] == 0.5
    assert 0 <= by_label["obsinfra_train_metric", "accuracy"] <= 1
    assert by_label["obsinfra_control_commands_total", "checkpoint"] == 1


def test_the_live_document_is_strict_json_and_says_the_same(watched: TrainingMonitor) -> None:
    document = live(watched)
    assert document["run"]["model"] == watched.model
    assert document["run"]["state"] == "running"
    assert document["progress"]["step"] == BATCHES + 1
    assert document["latest"]["loss"] is None  # NaN
    assert document["latest"]["validation"] == {"loss": 1.25, "accuracy": 0.5}
    assert "NonFiniteLoss" in [alert["name"] for alert in document["alerts"]]
    assert [checkpoint["step"] for checkpoint in document["checkpoints"]] == [BATCHES]
    assert [command["state"] for command in document["commands"]] == ["done"]
    assert document["reset"] is True
    after = wait_for(
        lambda: found if (found := live(watched, document["next"]))["series"]["time"] else None, "a new point"
    )
    assert after["reset"] is False


def test_counters_exist_before_their_first_event() -> None:
    """Prometheus sees an increase only from a value it has seen."""
    monitor = TrainingMonitor("m", metrics_port=0)
    with monitor:
        values = values_of(monitor)
        text = scrape(monitor)
    assert values["obsinfra_nonfinite_losses_total"] == values["obsinfra_steps_total"] == 0
    for kind in ("regular", "emergency", "best", "final"):
        for name in ("checkpoints_total", "checkpoint_failures_total"):
            assert f'obsinfra_{name}{{kind="{kind}"' in text or f'kind="{kind}"' in text.partition(name)[2]


def test_an_alert_that_fires_for_two_devices_is_one_series() -> None:
    """The same series twice would make Prometheus refuse the scrape."""
    hot = alert_catalog.BY_NAME["HighGPUTemperature"]
    monitor = TrainingMonitor("m", metrics_port=0, sample_seconds=3600)
    with monitor:
        monitor.alerts = [
            AlertStatus(hot, {"device": device}, 1e9, "firing", 1.0, 1.0) for device in ("0", "1")
        ]
        families = {family.name: family for family in parse_openmetrics(scrape(monitor, OPENMETRICS))}
    assert [sample.labels["alert"] for sample in families["obsinfra_alert_firing"].samples] == [hot.name]


def test_one_state_is_on_at_a_time() -> None:
    monitor = TrainingMonitor("m")
    for state in ("starting", "running", "finished"):
        monitor.set_state(state)
        on = [
            sample.labels["state"]
            for sample in monitor.samples()
            if sample.metric is catalog.RUN_STATE and sample.value == 1
        ]
        assert on == [state]


# ---- a loop that reports -------------------------------------------------------------------------


def test_it_is_where_the_documentation_says() -> None:
    module = importlib.import_module("obsinfra.monitoring.training_monitor")
    assert module.TrainingMonitor is TrainingMonitor
    assert module.TrainingMetrics is TrainingMetrics


def test_a_loop_that_only_reports_is_seen_without_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = TrainingMonitor("reported", metrics_port=0)
    monitor.start_monitoring()
    try:
        for step in range(10):
            monitor.log_training_metrics(
                TrainingMetrics(
                    epoch=3,
                    step=step,
                    loss=torch.tensor(2.0 - step / 10),
                    gradient_norm=0.5,
                    learning_rate=0.01,
                    samples=16,
                    step_time_seconds=0.25,
                    validation={"accuracy": 0.75} if step == 9 else {},
                    extra={"entropy": torch.tensor(0.5)},
                )
            )
        values = values_of(monitor)
        summary = monitor.get_performance_summary()
    finally:
        monitor.stop_monitoring()
    assert values["obsinfra_epoch"] == 3
    assert values["obsinfra_steps_total"] == values["obsinfra_step"] == 10
    assert values["obsinfra_samples_total"] == 160
    assert values["obsinfra_train_loss"] == pytest.approx(1.1)
    assert values["obsinfra_step_duration_seconds_sum"] == pytest.approx(2.5)
    assert summary["run"].startswith("reported-")
    assert (summary["model"], summary["epoch"], summary["step"], summary["steps"]) == ("reported", 3, 10, 10)
    assert summary["samples"] == 160
    for name in ("mean", "p50", "p95", "p99"):
        assert summary[f"step_seconds_{name}"] == pytest.approx(0.25)
    assert summary["loss"] == pytest.approx(1.1)
    assert summary["gradient_norm"] == 0.5
    assert summary["nonfinite_losses"] == 0
    assert set(summary["phase_seconds"]) == set(catalog.PHASES)
    assert monitor.validation == {"accuracy": 0.75}
    assert monitor.history.since(0)["validation_series"]["metrics"] == {"accuracy": [0.75]}
    assert list(tmp_path.iterdir()) == []


def test_the_summary_of_a_loop_that_has_not_begun_is_empty_not_an_error() -> None:
    summary = TrainingMonitor("m").get_performance_summary()
    assert summary["steps"] == 0
    assert summary["step_seconds_mean"] is summary["step_seconds_p99"] is summary["loss"] is None


def test_a_report_inside_a_timed_step_gives_that_step_its_number() -> None:
    monitor = TrainingMonitor("m")
    for step in (500, 501):
        with monitor.step():
            monitor.log_training_metrics(TrainingMetrics(epoch=7, step=step, loss=1.0, samples=4))
    summary = monitor.get_performance_summary()
    assert (summary["epoch"], summary["step"], summary["steps"], summary["samples"]) == (7, 502, 2, 8)


def test_quantiles_are_of_the_steps() -> None:
    monitor = TrainingMonitor("m")
    for step in range(100):
        monitor.log_training_metrics(TrainingMetrics(epoch=0, step=step, step_time_seconds=(step + 1) / 100))
    summary = monitor.get_performance_summary()
    assert summary["step_seconds_p50"] == pytest.approx(0.5, abs=0.011)
    assert summary["step_seconds_p95"] == pytest.approx(0.95, abs=0.011)
    assert summary["step_seconds_p99"] == pytest.approx(0.99, abs=0.011)
    assert summary["step_seconds_mean"] == pytest.approx(0.505)


# ---- a loader that is watched --------------------------------------------------------------------


def test_watching_a_loader_sees_the_wait_and_changes_nothing() -> None:
    monitor = TrainingMonitor("m")

    def batches() -> Iterator[int]:
        for batch in range(3):
            assert monitor.recorder.in_step_phase() == "data"
            yield batch

    seen = []
    for batch in monitor.watch(batches()):
        assert monitor.recorder.in_step_phase() != "data"
        seen.append(batch)
    assert seen == [0, 1, 2]
    assert monitor.recorder.phase_seconds()["data"] > 0
    assert monitor.recorder.in_step_phase() != "data"


def test_an_error_of_a_watched_loader_comes_through() -> None:
    monitor = TrainingMonitor("m")

    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(monitor.watch(broken()))
    assert monitor.recorder.in_step_phase() != "data"


# ---- inference -----------------------------------------------------------------------------------


def inference_histogram(monitor: TrainingMonitor) -> tuple[int, float]:
    for metric, _, histogram in monitor.instruments.histograms():
        if metric is catalog.INFERENCE_LATENCY_SECONDS:
            return sum(histogram.counts), histogram.total
    return 0, 0.0


def test_inferences_are_timed_one_by_one_and_outside_the_training_phases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monitor = TrainingMonitor("m")
    before = monitor.recorder.in_step_phase()
    moments = iter([10.0, 10.004, 20.0, 20.03])
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(moments))
        for _ in range(2):
            with monitor.inference():
                assert monitor.recorder.in_step_phase() == before
    ((metric, _, histogram),) = monitor.instruments.histograms()
    assert metric is catalog.INFERENCE_LATENCY_SECONDS
    assert histogram.total == pytest.approx(0.034)
    filled = [metric.buckets[index] for index, count in enumerate(histogram.counts) if count]
    assert filled == [0.005, 0.05]


def test_an_inference_that_raises_is_not_counted() -> None:
    monitor = TrainingMonitor("m")
    with pytest.raises(ZeroDivisionError), monitor.inference():
        raise ZeroDivisionError
    assert inference_histogram(monitor) == (0, 0.0)


# ---- robustness ----------------------------------------------------------------------------------


def test_a_checkpoint_committed_after_the_clock_was_set_back_takes_no_time() -> None:
    monitor = TrainingMonitor("m")
    monitor.checkpoint_committed(
        kind="best", step=1, requested_at=time.time() + 60, bytes_total=1, bytes_written=1, path="p"
    )
    ((_, _, histogram),) = monitor.instruments.histograms()
    assert (histogram.counts[0], histogram.total) == (1, 0.0)


def test_a_wrong_trace_address_leaves_nothing_open() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monitor = TrainingMonitor("m", metrics_port=port, otlp_endpoint="no address")
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        monitor.start_monitoring()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert monitor.url is None


def test_an_exception_in_the_loop_stops_the_monitor_and_comes_through() -> None:
    monitor = TrainingMonitor("m", metrics_port=0)
    with pytest.raises(ZeroDivisionError), monitor, monitor.step():
        raise ZeroDivisionError
    assert monitor.url is not None
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", urlsplit(monitor.url).port or 0)) != 0
    assert monitor.get_performance_summary()["steps"] == 0


def test_after_alerts_hears_of_every_evaluation_and_may_fail() -> None:
    heard: list[list[str]] = []

    def after(statuses: Any) -> None:
        heard.append([status.alert.name for status in statuses])
        raise RuntimeError("the listener is broken")

    monitor = TrainingMonitor("m", metrics_port=0, sample_seconds=0.01, after_alerts=after)
    with monitor:
        wait_for(lambda: heard, "an evaluation")
        with monitor.step():
            monitor.record(loss=math.inf)
        wait_for(lambda: "NonFiniteLoss" in heard[-1], "the alert to be heard of")
        failures = monitor.instruments.get(catalog.TELEMETRY_ERRORS, component="alerts")
    assert failures >= 2


def test_thresholds_can_be_overridden() -> None:
    monitor = TrainingMonitor("m", metrics_port=0, sample_seconds=0.01, thresholds={"gradient_norm": 0.5})
    with monitor:
        with monitor.step():
            monitor.record(grad_norm=0.75)
        wait_for(
            lambda: "GradientExplosion" in {status.alert.name for status in monitor.alerts},
            "the alert at the lower threshold",
        )


@pytest.mark.parametrize("values", [{"grad_norm": 1e6}, {"loss": math.inf}, {"grad_norm": math.nan}])
def test_what_must_not_wait_is_judged_before_the_next_round(values: dict[str, float]) -> None:
    """The next round of housekeeping is an hour away; an explosion or a NaN is heard of at once."""
    heard: list[set[str]] = []
    monitor = TrainingMonitor(
        "m",
        metrics_port=0,
        sample_seconds=3600,
        after_alerts=lambda alerts: heard.append({status.alert.name for status in alerts}),
    )
    with monitor:
        for _ in range(5):
            with monitor.step():
                monitor.record(loss=1.0, grad_norm=2.0)
        assert heard == []
        with monitor.step():
            monitor.record(**values)
        wait_for(lambda: heard, "an evaluation out of turn")
    assert heard[0] & {"GradientExplosion", "NonFiniteLoss"}


def test_a_loop_in_constant_alarm_is_not_evaluated_at_every_step() -> None:
    evaluations: list[int] = []
    monitor = TrainingMonitor(
        "m", metrics_port=0, sample_seconds=3600, after_alerts=lambda alerts: evaluations.append(1)
    )
    steps = 0
    with monitor:
        while len(evaluations) < 3:
            with monitor.step():
                monitor.record(grad_norm=1e6)
            steps += 1
    assert steps > 30 * len(evaluations)


def test_constant_alarm_keeps_no_sample_from_being_taken() -> None:
    monitor = TrainingMonitor("m", metrics_port=0, sample_seconds=0.05)
    with monitor:

        def sampled() -> bool:
            with monitor.step():
                monitor.record(grad_norm=1e6)
            return "obsinfra_host_memory_total_bytes" in scrape(monitor)

        wait_for(sampled, "a sample of the host while every step raises the alarm")


def test_a_threshold_of_the_alerts_table_can_be_changed_and_comes_back() -> None:
    monitor = TrainingMonitor("m", metrics_port=0, alerts={"gradient_norm": {"threshold": 50}})
    assert monitor.set_threshold("gradient_norm", 7.0) == (50.0, 7.0)
    assert monitor.set_threshold("gradient_norm", None) == (7.0, 50.0)
    with pytest.raises(ConfigError, match="threshold gradient_norm = nan; expected a finite number"):
        monitor.set_threshold("gradient_norm", math.nan)


def test_another_threshold_moves_the_alarm_too() -> None:
    monitor = TrainingMonitor("m", metrics_port=0, thresholds={"gradient_norm": 5.0})
    assert monitor.recorder.alarm_norm == 5.0
    monitor.set_threshold("gradient_norm", 7.0)
    assert monitor.recorder.alarm_norm == 7.0
    waiting = TrainingMonitor("m", metrics_port=0, alerts={"gradient_norm": {"for_seconds": 30}})
    assert waiting.recorder.alarm_norm == math.inf
