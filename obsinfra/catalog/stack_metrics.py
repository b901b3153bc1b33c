"""Metrics of Prometheus and Alertmanager themselves that alerts look at. They are theirs; here only named.

Source: their own /metrics pages (Prometheus 2.42 and 3.5, Alertmanager 0.25 and 0.33 have all of them).
"""

from __future__ import annotations

from obsinfra.catalog.metrics import Kind, Metric


def _stack(name: str, kind: Kind, help: str, *labels: str) -> Metric:
    return Metric(name, kind, help, labels, source="stack")


TRAINER_UP = _stack(
    "up", "gauge", "1 when the last scrape of this rank succeeded.", "job", "run", "model", "rank"
)
SERVICE_UP = _stack("up", "gauge", "1 when the last scrape of this service succeeded.", "job", "instance")
HOST_UP = _stack(
    "up", "gauge", "1 when the last scrape of this host's node exporter succeeded.", "job", "host"
)
RULE_FAILURES = _stack(
    "prometheus_rule_evaluation_failures", "counter", "Rules that could not be evaluated.", "rule_group"
)
ALERTMANAGERS = _stack(
    "prometheus_notifications_alertmanagers_discovered", "gauge", "Alertmanagers that Prometheus knows."
)
NOTIFICATIONS_DROPPED = _stack(
    "prometheus_notifications_dropped",
    "counter",
    "Alerts that no Alertmanager took: in a Prometheus's first seconds, before it knows of one, too.",
)
NOTIFICATION_ERRORS = _stack(
    "prometheus_notifications_errors",
    "counter",
    "Failures to hand alerts to an Alertmanager.",
    "alertmanager",
)
PROMETHEUS_RELOADED = _stack(
    "prometheus_config_last_reload_successful",
    "gauge",
    "1 when the last load of its configuration succeeded.",
)
ALERTMANAGER_RELOADED = _stack(
    "alertmanager_config_last_reload_successful",
    "gauge",
    "1 when the last load of its configuration succeeded.",
)
NOTIFICATIONS_FAILED = _stack(
    "alertmanager_notifications_failed", "counter", "Notifications that failed for good.", "integration"
)
