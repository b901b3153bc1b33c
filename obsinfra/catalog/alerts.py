"""The alert table: every threshold, once.

The in-process evaluator, `prometheus/rules/obsinfra.yml`, the sidecar's policy and the settings under
`[thresholds]` all come from here, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from obsinfra.catalog import actions, metrics
from obsinfra.catalog.actions import Action
from obsinfra.catalog.metrics import Metric
from obsinfra.errors import ConfigError

Severity = Literal["info", "warning", "critical"]
Scope = Literal["run", "rank", "device", "host"]


@dataclass(frozen=True, slots=True)
class Alert:
    """One row of the table: `metric comparator threshold`, held for `for_seconds`.

    Attributes:
        name: CamelCase alert name, the `alertname` label.
        key: the name a user writes under `[thresholds]`.
        metric: the gauge or counter compared.
        increase_seconds: 0 compares the metric's value; otherwise its increase over that many seconds
            (for counters of events that must not be missed between two scrapes).
        comparator: `>` or `<`.
        threshold: in the unit of `threshold_unit`, as a person writes it (90 for 90 %).
        threshold_unit: unit of `threshold`, for messages.
        scale: factor from `threshold_unit` to the metric's base unit (0.01 for percent → ratio).
        for_seconds: how long the condition must hold before the alert fires.
        severity: `info`, `warning` or `critical`.
        scope: what one firing speaks of: the run, a rank, a device or the host.
        action: what the trainer is told to do when it fires; None only informs.
        summary, description: what people read; `{{ $value }}` and labels as in Prometheus templates.
    """

    name: str
    key: str
    metric: Metric
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
    increase_seconds: float = 0.0

    @property
    def limit(self) -> float:
        """The threshold in the metric's own base unit, free of the product's last-digit noise."""
        return float(f"{self.threshold * self.scale:.12g}")

    def crossed(self, value: float) -> bool:
        """Whether `value`, in the metric's base unit, is beyond the threshold. NaN never is."""
        return value > self.limit if self.comparator == ">" else value < self.limit


ALERTS: tuple[Alert, ...] = (
    Alert(
        name="HighCPU",
        key="cpu",
        metric=metrics.HOST_CPU_RATIO,
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
        metric=metrics.MEMORY_PRESSURE_RATIO,
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
        name="HighGPUUtilization",
        key="gpu_utilization",
        metric=metrics.GPU_UTILIZATION_RATIO,
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
        name="HighGPUMemory",
        key="gpu_memory",
        metric=metrics.GPU_MEMORY_RATIO,
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
        metric=metrics.GPU_TEMPERATURE_CELSIUS,
        threshold=85.0,
        threshold_unit="°C",
        for_seconds=10.0,
        severity="critical",
        scope="device",
        action=actions.EMERGENCY_CHECKPOINT,
        summary="GPU {{ $labels.device }} hotter than {threshold} °C",
        description="The device will throttle and may fall off the bus; check cooling and power.",
    ),
    Alert(
        name="SlowStep",
        key="step_time",
        metric=metrics.STEP_TIME_SECONDS,
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
        name="GradientExplosion",
        key="gradient_norm",
        metric=metrics.GRADIENT_NORM_PEAK,
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
        name="NonFiniteLoss",
        key="nonfinite_loss",
        metric=metrics.NONFINITE_LOSSES,
        threshold=0.0,
        threshold_unit="",
        for_seconds=0.0,
        increase_seconds=60.0,
        severity="critical",
        scope="run",
        action=actions.EMERGENCY_CHECKPOINT,
        summary="The loss is NaN or infinite",
        description="A step produced a loss that is no finite number. The last good state gets saved.",
    ),
)

BY_NAME: dict[str, Alert] = {alert.name: alert for alert in ALERTS}
THRESHOLD_KEYS: dict[str, Alert] = {alert.key: alert for alert in ALERTS}


def with_thresholds(overrides: Mapping[str, float]) -> tuple[Alert, ...]:
    """The table with the user's `[thresholds]` applied.

    Args:
        overrides: threshold key → value in that alert's `threshold_unit`.

    Raises:
        ConfigError: an unknown key, or a value that is not a finite number.
    """
    for key, value in overrides.items():
        if key not in THRESHOLD_KEYS:
            raise ConfigError(
                f"unknown threshold {key!r}",
                f"one of {', '.join(THRESHOLD_KEYS)}",
                "correct it under [thresholds]",
            )
        if not (value == value and abs(value) != float("inf")):
            raise ConfigError(
                f"threshold {key} = {value}", "a finite number", "correct it under [thresholds]"
            )
    return tuple(replace(alert, threshold=overrides.get(alert.key, alert.threshold)) for alert in ALERTS)
