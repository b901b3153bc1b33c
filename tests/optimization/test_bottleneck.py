"""What bounds a training: from readings of GPUs (a compiled NVML stand-in), phases and MFU, with evidence."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from monitoring.gpu_machine import GpuMachine, build_nvml
from waiting import wait_for

from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError
from obsinfra.monitoring.recorder import Recorder
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.optimization.bottleneck import (
    BOTTLENECKS,
    DeviceUse,
    Range,
    UtilizationReport,
    judge,
    monitor_gpu_utilization,
)
from obsinfra.optimization.gpu_optimizer import create_gpu_optimizer


def gpu(utilization: float, activity: float | None = 0.3) -> DeviceUse:
    def flat(value: float | None) -> Range | None:
        return None if value is None else Range(value, value, value)

    return DeviceUse("0", "a GPU", flat(utilization), flat(0.5), flat(activity), flat(300.0), flat(60.0))


@pytest.mark.parametrize(
    ("devices", "data", "mfu", "cpus", "verdict", "said"),
    [
        ((gpu(0.5),), 0.35, 0.1, 1, "input", "waited for data 35% of the time"),
        ((gpu(0.99),), 0.0, 0.47, 1, "compute", "MFU is 47%"),
        ((gpu(0.4),), 0.05, 0.1, 1, "launch", "A kernel was running 40% of the time"),
        ((gpu(0.99), gpu(0.3)), 0.05, 0.1, 1, "launch", "A kernel was running 30% of the time"),
        ((gpu(0.99, 0.8),), 0.0, 0.1, 1, "memory", "read or written 80% of the time"),
        ((gpu(0.99, 0.2),), 0.0, 0.1, 1, "memory", "by exclusion"),
        ((gpu(0.99, 0.2),), 0.0, None, 1, "compute", "by exclusion"),
        ((gpu(0.99, None),), 0.0, None, 1, None, "Neither MFU nor memory activity"),
        ((), 0.5, None, 0.4, "input", "waited for data 50% of the time"),
        ((), 0.0, None, 1.9, "compute", "used 1.9 processors"),
        ((), 0.0, None, 0.2, None, "waited for something else than data"),
    ],
)
def test_each_bottleneck_is_named_with_its_evidence(
    devices: tuple[DeviceUse, ...],
    data: float,
    mfu: float | None,
    cpus: float,
    verdict: str | None,
    said: str,
) -> None:
    found, evidence = judge(devices, {"data": data, "forward": 1 - data}, 10, mfu, cpus, watched_loop=True)
    assert found == verdict
    assert said in " ".join(evidence)


RATIO = st.floats(0, 1)


@given(
    st.lists(st.tuples(RATIO, st.none() | RATIO), max_size=3), RATIO, st.none() | RATIO, st.floats(0, 64),
    st.integers(0, 3), st.booleans(),
)  # fmt: skip
def test_there_is_always_a_verdict_or_a_reason(
    gpus: list[tuple[float, float | None]],
    data: float,
    mfu: float | None,
    cpus: float,
    steps: int,
    watched: bool,
) -> None:
    devices = tuple(gpu(*one) for one in gpus)
    phases = {"data": data, "forward": 1 - data} if watched else {}
    found, evidence = judge(devices, phases, steps, mfu, cpus, watched_loop=watched)
    assert found is None or found in BOTTLENECKS
    assert evidence and all(line.endswith(".") for line in evidence)
    if watched and steps and data >= 0.2:
        assert found == "input"
    report = UtilizationReport(1.0, devices, None, phases, steps, mfu, found, tuple(evidence))
    named = {s.labels["kind"]: s.value for s in report.samples() if s.metric is catalog.BOTTLENECK}
    assert named == {kind: float(kind == found) for kind in BOTTLENECKS}
    json.dumps(report.document(), allow_nan=False)


class LoopThread:
    """Steps without end on a thread, each with a wait for data and some arithmetic."""

    def __init__(self, recorder: Recorder, data_seconds: float) -> None:
        self.stop = threading.Event()
        self.recorder, self.data_seconds = recorder, data_seconds
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        recorder = self.recorder
        while not self.stop.is_set():
            with recorder.step_context():
                with recorder.phase("data"):
                    threading.Event().wait(self.data_seconds)
                with recorder.phase("forward"):
                    sum(range(2000))

    def __enter__(self) -> None:
        self.thread.start()
        wait_for(lambda: self.recorder.step > 2, "the first steps")

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def test_a_loop_that_waits_for_its_data_is_input_bound_without_a_gpu_and_exported() -> None:
    monitor = TrainingMonitor("m", metrics_port=0)
    gpu_optimizer = create_gpu_optimizer(device="cpu")
    gpu_optimizer.watch(monitor)
    with LoopThread(monitor.recorder, 0.01):
        report = gpu_optimizer.monitor_gpu_utilization(0.3, interval=0.1)
    assert report.bottleneck == "input" and report.phases["data"] > 0.5 and report.steps > 3
    assert abs(sum(report.phases.values()) - 1) < 1e-9
    if not report.devices:
        assert report.reason
    assert monitor.instruments.get(catalog.BOTTLENECK, kind="input") == 1.0
    assert monitor.instruments.get(catalog.BOTTLENECK, kind="compute") == 0.0


def test_a_loop_that_stands_still_has_no_bottleneck_and_an_early_end_is_obeyed() -> None:
    stop = threading.Event()
    stop.set()
    report = monitor_gpu_utilization(3600, Recorder(), stop=stop)
    assert report.seconds < 60 and report.bottleneck is None
    assert report.evidence == ("No step ended meanwhile.",)
    with pytest.raises(ConfigError, match="duration 0; expected a finite number above 0"):
        monitor_gpu_utilization(0)


WATCH = """
import json, threading
from obsinfra.monitoring.recorder import Recorder
from obsinfra.optimization.bottleneck import monitor_gpu_utilization
class End(threading.Event):
    readings = 0  # the watch waits once after each
    def wait(self, timeout=None):
        self.readings += 1
        return super().wait(timeout)
end, kept, pause = End(), [], threading.Event()
recorder = Recorder()
def watch():
    kept.append(monitor_gpu_utilization(600, recorder, mfu=lambda: 0.2, interval=0.01, stop=end))
def loop():
    while not end.is_set():
        with recorder.step_context():
            with recorder.phase("forward"):
                sum(range(5000))
threads = [threading.Thread(target=watch), threading.Thread(target=loop)]
for thread in threads: thread.start()
globals().update(locals())
"""

AFTER_SOME_READINGS = """
came = end.readings + 3
while end.readings < came:
    pause.wait(0.01)
"""

END = """
end.set()
for thread in threads: thread.join()
open(PATH, "w").write(json.dumps(kept[0].document()))
"""


@pytest.fixture
def two_gpus(tmp_path: Path) -> Any:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed, so the NVML stand-in cannot be built (Debian: apt install gcc)")
    state = {"count": 2}
    for n in range(2):
        state |= {
            f"{n}.name": f"NVIDIA Fake {n}",
            f"{n}.uuid": f"GPU-{n}{n}{n}{n}{n}{n}{n}{n}-0000",
            f"{n}.memory.total": 80 * 2**30,
            f"{n}.memory.used": 20 * 2**30,
            f"{n}.utilization": 40,
            f"{n}.memory.activity": 10,
            f"{n}.temperature": 60 + n,
            f"{n}.power": 300_000,
        }
    machine = GpuMachine(tmp_path, build_nvml(tmp_path / "nvml"), {}, state)
    yield machine
    machine.end()


def test_readings_of_every_gpu_have_a_smallest_a_mean_and_a_largest_value(
    two_gpus: GpuMachine, tmp_path: Path
) -> None:
    two_gpus.run(WATCH)
    two_gpus.run(AFTER_SOME_READINGS)
    two_gpus.set({"1.utilization": 60, "1.power": 500_000})
    two_gpus.run(AFTER_SOME_READINGS)
    two_gpus.run(END.replace("PATH", repr(str(tmp_path / "report.json"))))
    report = json.loads((tmp_path / "report.json").read_text())
    first, second = report["devices"]
    assert first["name"] == "NVIDIA Fake 0" and first["utilization"] == {"min": 0.4, "mean": 0.4, "max": 0.4}
    assert first["memory"]["max"] == 0.25 and first["memory_activity"]["max"] == 0.1
    assert first["power"]["max"] == 300 and first["temperature"]["mean"] == 60
    assert second["utilization"]["min"] == 0.4 and second["utilization"]["max"] == 0.6
    assert 0.4 < second["utilization"]["mean"] < 0.6
    assert second["power"]["min"] == 300 and second["power"]["max"] == 500
    assert report["bottleneck"] == "launch" and report["mfu"] == 0.2 and report["reason"] is None
    assert any("A kernel was running 40% of the time" in line for line in report["evidence"])
