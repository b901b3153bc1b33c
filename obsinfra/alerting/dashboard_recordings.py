"""What Prometheus records for the dashboards: the panels that would be slow with many ranks or long ranges.

Called by the generator of the rules; the dashboards name these series. They are a group of their own, so that
no alert waits for them.
"""

from __future__ import annotations

from obsinfra.alerting.promql import Recording
from obsinfra.catalog import metrics

GROUP = "obsinfra-dashboards"
WINDOW = "1m"
"""Over how long rates are taken: twelve scrapes by default, and two at least up to 30 seconds apart."""

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def _quantile(name: str, q: float) -> Recording:
    buckets = f"{metrics.STEP_DURATION_SECONDS.name}_bucket"
    return Recording(
        f"obsinfra:step_duration_seconds:{name}",
        f"histogram_quantile({q}, sum by (run, model, le) (rate({buckets}[{WINDOW}])))",
    )


STEP_QUANTILES = {name: _quantile(name, q) for name, q in QUANTILES.items()}
"""Step time over all ranks of a run, seconds."""

PHASES = Recording(
    "obsinfra:phase_seconds:rate1m",
    f"sum by (run, model, phase) (rate({metrics.PHASE_SECONDS.sample_name}[{WINDOW}]))",
)
"""Seconds per second and phase, over all ranks of a run."""

LOST = Recording(
    "obsinfra:lost_seconds:rate1m",
    f"sum by (run, model, cause) (rate({metrics.LOST_SECONDS.sample_name}[{WINDOW}]))",
)
"""Seconds lost per second and cause, over all ranks of a run."""

WALL = Recording(
    "obsinfra:wall_seconds:max",
    f"max by (run, model) (sum by (run, model, rank, instance) ({metrics.PHASE_SECONDS.sample_name}))",
)
"""Seconds since the run's process began, the oldest rank's."""

GPUS = Recording(
    "obsinfra:gpus:count",
    "count by (run, model) (count by (run, model, host, device) "
    f"({metrics.GPU_MEMORY_TOTAL_BYTES.sample_name}))",
)
"""Different GPUs that a run's processes see; absent where there are none."""

GOODPUT = Recording(
    "obsinfra:goodput:ratio",
    f"avg by (run, model) ({metrics.GOODPUT_RATIO.sample_name})",
)
"""Productive share of a run's time since its processes began, over its ranks."""

THROUGHPUT = Recording(
    "obsinfra:samples_per_second:sum",
    f"sum by (run, model) ({metrics.SAMPLES_PER_SECOND.sample_name})",
)
"""Samples a second of a run, all ranks together."""

DASHBOARD_RECORDINGS: tuple[Recording, ...] = (
    *STEP_QUANTILES.values(),
    PHASES,
    LOST,
    WALL,
    GPUS,
    GOODPUT,
    THROUGHPUT,
)
