"""How busy the hardware was for a while, and what the training waited for.

Reads NVML (`monitoring.gpu_sampler`), the recorder's phases and the MFU; changes nothing. Called through
`gpu_optimizer`, or alone, from a thread beside the loop.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from obsinfra.catalog import metrics as catalog
from obsinfra.monitoring.gpu_sampler import create_gpu_sampler
from obsinfra.monitoring.instruments import Instruments
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.recorder import Recorder
from obsinfra.monitoring.sample import Sample
from obsinfra.optimization.arguments import LONGEST_SECONDS, number

BOTTLENECKS = ("input", "launch", "compute", "memory")
"""What can bound a training: data that comes too slowly; kernels launched too slowly, or waits for the device
in the loop; arithmetic; device memory."""

INPUT_SHARE = 0.2
"""Waiting for data so much of the time is more than a faster step could win back."""

BUSY_RATIO = 0.7
"""Below it the GPU is without a kernel often enough to be what is to be looked at first."""

COMPUTE_MFU = 0.4
"""From here on a training uses the arithmetic units as well as published ones do (PaLM: 46 %)."""

MEMORY_ACTIVITY = 0.5
"""Device memory read or written so much of the time, by the driver's account, is close to its limit."""


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest, mean and largest value."""

    min: float
    mean: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Range | None:
        """None of no values."""
        seen = list(values)
        if not seen:
            return None
        smallest, largest = min(seen), max(seen)
        # A mean of equal numbers may be rounded past them.
        return cls(smallest, min(max(statistics.fmean(seen), smallest), largest), largest)


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """One GPU; a reading it does not have is None.

    Attributes:
        device: torch's index, as text.
        name: as the driver tells.
        utilization: share of time a kernel was running.
        memory: device memory in use ÷ installed.
        memory_activity: share of time device memory was read or written.
        power: watts.
        temperature: °C.
    """

    device: str
    name: str
    utilization: Range | None
    memory: Range | None
    memory_activity: Range | None
    power: Range | None
    temperature: Range | None


@dataclass(frozen=True, slots=True)
class UtilizationReport:
    """What was seen.

    Attributes:
        seconds: how long.
        devices: of each GPU; none without one.
        reason: why there are none.
        phases: share of the time of each phase that took any; empty without a recorder.
        steps: that ended meanwhile.
        mfu: model FLOPs utilisation, where known.
        bottleneck: one of `BOTTLENECKS`; None where nothing is said, which `evidence` explains.
        evidence: sentences with the numbers behind it.
    """

    seconds: float
    devices: tuple[DeviceUse, ...]
    reason: str | None
    phases: Mapping[str, float]
    steps: int
    mfu: float | None
    bottleneck: str | None
    evidence: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return asdict(self)

    def export(self, instruments: Instruments) -> None:
        """Show it as metrics until the next one."""
        for metric, labels, value in self.samples():
            instruments.set(metric, value, **labels)

    def samples(self) -> list[Sample]:
        """The report as metrics."""
        out = [
            Sample(catalog.BOTTLENECK, {"kind": kind}, float(kind == self.bottleneck)) for kind in BOTTLENECKS
        ]
        for use in self.devices:
            for metric, reading in (
                (catalog.GPU_WATCH_UTILIZATION_RATIO, use.utilization),
                (catalog.GPU_WATCH_MEMORY_RATIO, use.memory),
                (catalog.GPU_WATCH_MEMORY_ACTIVITY_RATIO, use.memory_activity),
                (catalog.GPU_WATCH_POWER_WATTS, use.power),
                (catalog.GPU_WATCH_TEMPERATURE_CELSIUS, use.temperature),
            ):
                if reading is not None:
                    for statistic in ("min", "mean", "max"):
                        labels = {"device": use.device, "statistic": statistic}
                        out.append(Sample(metric, labels, getattr(reading, statistic)))
        return out


def monitor_gpu_utilization(
    duration: float,
    recorder: Recorder | None = None,
    *,
    mfu: Callable[[], float | None] = lambda: None,
    interval: float = 0.1,
    stop: threading.Event | None = None,
) -> UtilizationReport:
    """Watch for `duration` seconds, then say how busy the hardware was and what bounds the training.

    Waits meanwhile: call it on a thread beside the loop.

    Args:
        duration: seconds.
        recorder: of the loop, for phases and steps; without one a GPU's readings alone are reported.
        mfu: asked at the end.
        interval: seconds between two readings. NVML renews utilisation a few times a second.
        stop: ends it early when set.

    Raises:
        ConfigError: a duration or an interval that is no finite number above 0.
    """
    number("duration", duration, above=0, most=LONGEST_SECONDS)
    number("interval", interval, above=0, most=LONGEST_SECONDS)
    stop = stop or threading.Event()
    sampler = create_gpu_sampler()
    values: dict[tuple[str, str], list[float]] = {}
    process = psutil.Process()
    cpu_before, steps_before = sum(process.cpu_times()[:2]), _steps(recorder)
    phases_before = recorder.phase_seconds() if recorder else {}
    started = time.perf_counter()
    try:
        devices = {row["device"]: row["name"] for row in sampler.describe()}
        while True:
            for metric, labels, value in sampler.sample():
                if "device" in labels and len(labels) == 1:
                    values.setdefault((metric.name, labels["device"]), []).append(value)
            left = started + duration - time.perf_counter()
            if left <= 0 or stop.wait(min(interval, left)):
                break
    finally:
        sampler.close()
    seconds = time.perf_counter() - started
    phases = recorder.phase_seconds() if recorder else {}
    spent = {name: phases[name] - phases_before[name] for name in phases}
    total = sum(spent.values())
    shares = {name: part / total for name, part in spent.items() if part > 0} if total > 0 else {}

    def reading(metric: catalog.Metric, device: str) -> Range | None:
        return Range.of(values.get((metric.name, device), ()))

    uses = tuple(
        DeviceUse(
            device,
            name,
            reading(catalog.GPU_UTILIZATION_RATIO, device),
            reading(catalog.GPU_MEMORY_RATIO, device),
            reading(catalog.GPU_MEMORY_ACTIVITY_RATIO, device),
            reading(catalog.GPU_POWER_WATTS, device),
            reading(catalog.GPU_TEMPERATURE_CELSIUS, device),
        )
        for device, name in devices.items()
    )
    steps, found = _steps(recorder) - steps_before, mfu()
    cpus = (sum(process.cpu_times()[:2]) - cpu_before) / seconds
    bottleneck, evidence = judge(uses, shares, steps, found, cpus, watched_loop=recorder is not None)
    report = UtilizationReport(
        seconds, uses, sampler.reason, shares, steps, found, bottleneck, tuple(evidence)
    )
    get_logger("performance").info(
        "utilization",
        seconds=round(seconds, 3),
        bottleneck=bottleneck,
        evidence=" ".join(evidence),
        steps_seen=steps,
        no_gpu=sampler.reason,
    )
    return report


def judge(
    devices: tuple[DeviceUse, ...],
    phases: Mapping[str, float],
    steps: int,
    mfu: float | None,
    cpus: float,
    *,
    watched_loop: bool,
) -> tuple[str | None, list[str]]:
    """What bounds the training, and why that is said.

    Args:
        devices: the GPUs in use.
        phases: shares of the time.
        steps: that ended.
        mfu: where known.
        cpus: processors the process used; 1 is one full core.
        watched_loop: whether phases and steps are known.
    """
    if watched_loop and not steps:
        return None, ["No step ended meanwhile."]
    data = phases.get("data", 0.0)
    evidence = [f"The loop waited for data {data:.0%} of the time."] if watched_loop else []
    if data >= INPUT_SHARE:
        return "input", [*evidence, "More workers, or data that is prepared beforehand, would help first."]
    busy = [use.utilization.mean for use in devices if use.utilization is not None]
    if not busy:
        return _judge_cpu(cpus, evidence, watched_loop=watched_loop)
    idle = 1 - min(busy)
    evidence.append(f"A kernel was running {min(busy):.0%} of the time.")
    if 1 - idle < BUSY_RATIO:
        if not watched_loop:
            return None, [*evidence, "Whether it waited for data or for launches, the phases would tell."]
        return "launch", [
            *evidence,
            "Kernels are launched too slowly, or the loop waits for the device (.item(), .cpu()): "
            "torch.compile, CUDA graphs (--compile-mode reduce-overhead) or larger batches would help first.",
        ]
    activity = max((use.memory_activity.mean for use in devices if use.memory_activity), default=None)
    if activity is not None:
        evidence.append(f"Device memory was read or written {activity:.0%} of the time.")
    if mfu is not None:
        evidence.append(f"MFU is {mfu:.0%}.")
        if mfu >= COMPUTE_MFU:
            return "compute", evidence
    if activity is not None and activity >= MEMORY_ACTIVITY:
        return "memory", [*evidence, "Fusing kernels (torch.compile) or 16 bits would help first."]
    if mfu is None and activity is not None:
        return "compute", [*evidence, "Without an MFU that is by exclusion."]
    if mfu is None:
        return None, [*evidence, "Neither MFU nor memory activity is known."]
    return "memory", [
        *evidence,
        "Kernels run, but compute little: by exclusion they wait for memory, or are too small.",
    ]


def _judge_cpu(cpus: float, evidence: list[str], *, watched_loop: bool) -> tuple[str | None, list[str]]:
    """Without a GPU: arithmetic and memory of a CPU are not told apart."""
    evidence = [*evidence, f"The process used {cpus:.1f} processors."]
    if not watched_loop:
        return None, [*evidence, "No loop was watched."]
    if cpus >= BUSY_RATIO:
        return "compute", [*evidence, "Whether arithmetic or memory bounds a CPU is not measured."]
    return None, [*evidence, "It waited for something else than data: look at `obsinfra trace export`."]


def _steps(recorder: Recorder | None) -> int:
    if recorder is None:
        return 0
    recorder.fold()
    return recorder.steps
