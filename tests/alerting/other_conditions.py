"""Changes of what alerts look at, one for each aggregation on either side of its limit, and random ones."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from obsinfra.catalog import stack_metrics
from obsinfra.catalog.alert_changes import scopes_of
from obsinfra.catalog.alerts import ALERTS, Alert
from obsinfra.catalog.condition_changes import AGGREGATIONS, with_condition
from obsinfra.catalog.metrics import METRICS, Metric
from obsinfra.catalog.units import UNITS, quantity_of

Change = dict[str, Any]

LOW: Change = {"comparator": "<"}
RATE = "obsinfra_samples_per_second"
THROUGHPUT: Change = {"metric": RATE, "scope": "run", "window_seconds": 60}

OTHER_CONDITIONS: dict[str, Change] = {
    "cpu": LOW | {"metric": "obsinfra_mfu_ratio", "threshold": 20, "scope": "rank", "for_seconds": 7},
    "swap": {"aggregation": "ratio", "over": "obsinfra_host_memory_total_bytes", "threshold": 7,
             "threshold_unit": "%"},
    "cgroup_memory": LOW | {"threshold": 10, "for_seconds": 0},
    "memory": LOW | {"aggregation": "average", "window_seconds": 30, "threshold": 40},
    "gpu_temperature": {"aggregation": "average", "window_seconds": 60, "for_seconds": 0},
    "gpu_utilization": LOW | {"aggregation": "highest", "window_seconds": 30, "threshold": 5,
                              "for_seconds": 12},
    "gpu_memory": {"aggregation": "highest", "window_seconds": 20},
    "gpu_idle": {"metric": "obsinfra_gpu_power_watts", "aggregation": "lowest", "comparator": ">",
                 "window_seconds": 25, "threshold": 0.6, "threshold_unit": "kW", "for_seconds": 0},
    "gpu_throttling": LOW | {"metric": "obsinfra_gpu_clock_hertz", "where": {"clock": "sm"},
                             "aggregation": "lowest", "window_seconds": 15, "threshold": 1.2,
                             "threshold_unit": "GHz"},
    "nonfinite_loss": LOW | {"metric": "obsinfra_steps", "threshold": 1, "window_seconds": 60},
    "gpu_xid": {"where": {"xid": ["79", "48"]}, "threshold": 2, "for_seconds": 3, "window_seconds": 60},
    "nvlink_errors": LOW | {"threshold": 4, "for_seconds": 5, "window_seconds": 40},
    "pcie_replays": {"metric": "obsinfra_gpu_ecc_errors", "where": {"type": "corrected"}, "threshold": 0.3,
                     "window_seconds": 40},
    "memory_creep": LOW | {"metric": RATE, "threshold": -2, "threshold_unit": "/min", "window_seconds": 60,
                           "for_seconds": 5},
    "memory_forecast": {"metric": "obsinfra_process_resident_memory_bytes", "aggregation": "forecast",
                        "comparator": ">", "window_seconds": 120, "ahead_seconds": 900, "threshold": 20,
                        "threshold_unit": "GB"},
    "disk_filling": {"ahead_seconds": 3600, "threshold": 50},
    "data_share": LOW | {"where": {"phase": ["forward", "backward"]}, "threshold": 25, "window_seconds": 60},
    "lost_share": {"where": {"cause": ["data"]}, "threshold": 4, "window_seconds": 60},
    "no_progress": LOW | {"threshold": 0.5, "floor": 0},
    "step_time": {"aggregation": "multiple", "of": "obsinfra_step_median_seconds", "floor": 0.5,
                  "threshold": 3},
    "loss_spike": LOW | {"metric": RATE, "sample": RATE, "threshold": -5, "window_seconds": 120},
    "gradient_norm": {"aggregation": "robust_z", "sample": "obsinfra_gradient_norm", "window_seconds": 60,
                      "threshold": 6},
    "gradient_trend": LOW | THROUGHPUT | {"threshold": 0.5, "recent_seconds": 15, "for_seconds": 0},
    "straggler": LOW | {"threshold": 0.7, "for_seconds": 3},
    "remote_lag": {"aggregation": "slope", "threshold": 0.5, "window_seconds": 60},
    "checkpoint_age": {"metric": "obsinfra_growing_tensor_bytes", "over": "obsinfra_checkpoint_bytes",
                       "threshold": 2},
    "host_down": {"scope": "host", "action": "checkpoint"},
    "sidecar_gone": {"where": {"job": "prometheus"}},
    "trainer_gone": LOW | {"metric": "up", "where": {"job": "trainers"}, "scope": "rank"},
    "rule_failures": LOW | {"metric": "obsinfra_sidecar_webhooks", "where": {"outcome": "accepted"},
                            "threshold": 1, "window_seconds": 60},
}  # fmt: skip
"""Alert → what is set under `[alerts.<key>]`."""


def random_changes() -> st.SearchStrategy[tuple[str, Change]]:
    """An alert's key and a change of its condition that the settings take, of any aggregation and metric."""
    return st.builds(
        _change,
        st.sampled_from([alert for alert in ALERTS if alert.metric is not None]),
        st.sampled_from(sorted(AGGREGATIONS)),
        st.sampled_from("<>"),
        st.randoms(use_true_random=False),
        st.sampled_from([12, 20, 45, 90, 400]),
        st.sampled_from([0, 1, 6, 40]),
        st.floats(0.05, 40.0),
    )


def _change(
    alert: Alert, aggregation: str, comparator: str, random: Any, window: int, hold: int, size: float
) -> tuple[str, Change]:
    row = AGGREGATIONS[aggregation]
    trainers_only = aggregation in ("share", "against_peers")
    known = [*METRICS, *(metric for metric in vars(stack_metrics).values() if isinstance(metric, Metric))]
    metric = random.choice(
        [
            metric
            for metric in known
            if metric.kind in (("gauge", "counter") if row.kind == "any" else (row.kind,))
            and (metric.source == "trainer" or not trainers_only)
            and metric.name != "up"
        ]
    )
    change: Change = {"metric": metric.name, "aggregation": aggregation, "comparator": comparator}
    beside = [
        other.name
        for other in METRICS
        if (other is not metric or aggregation == "robust_z")
        and set(other.label_names) == set(metric.label_names)
        and other.source == metric.source
        and other.kind == ("gauge" if aggregation == "robust_z" else metric.kind)
    ]
    if aggregation in ("ratio", "multiple") and not beside:
        return _change(alert, "value", comparator, random, window, hold, size)
    wanted = (*row.needs, *row.optional)
    if "window_seconds" in wanted:
        change["window_seconds"] = window
    change |= {name: random.choice(beside or [metric.name]) for name in ("of", "sample") if name in wanted}
    if "over" in wanted:
        counters = [other.name for other in METRICS if other.kind == "counter" and other.source == "trainer"]
        change["over"] = random.choice(counters if aggregation == "share" else beside or [metric.name])
    if "floor" in wanted:
        change["floor"] = random.choice([0, 0.25, 30])
    if "ahead_seconds" in wanted:
        change["ahead_seconds"] = random.choice([30, 900, 86_400])
    if "recent_seconds" in wanted:
        change["recent_seconds"] = window // 4
    own = list(metric.labels)
    if own and (change.get("over") == metric.name or random.random() < 0.5):
        change["where"] = {random.choice(own): random.choice(["a", ["b.c", "d+e"], ["f"]])}
    if change.get("over") == metric.name and not own:
        change["over"] = next(name for name in ("obsinfra_steps", "obsinfra_samples") if name != metric.name)
    thresholds = {
        ("share", ">"): min(size / 41, 0.95),
        ("share", "<"): min(size / 41, 0.95),
        ("robust_z", "<"): -size,
        ("against_past", ">"): 1 + size,
        ("against_past", "<"): min(1.0, size / 40),
        ("against_peers", ">"): 1 + size,
        ("against_peers", "<"): min(1.0, size / 40),
    }
    signed = size if row.least is not None or random.random() < 0.7 else -size
    limit = thresholds.get((aggregation, comparator), signed)
    looks = with_condition(alert, change)
    unit = random.choice(list(UNITS[quantity_of(looks.condition)]))
    scale = UNITS[quantity_of(looks.condition)][unit]
    change |= {
        "threshold_unit": unit,
        "threshold": limit / scale if aggregation.startswith(("share", "against")) else limit,
        "for_seconds": hold,
        "scope": random.choice(scopes_of(looks)),
    }
    if change["scope"] == "stack":
        change["action"] = "none"
    return alert.key, change
