"""Grafana's datasources by their fixed uids, and the links between them: metric → trace → log and back.

Called by the boards and the provisioning. Addresses are the service names of the container network.
"""

from __future__ import annotations

from typing import Any

from obsinfra.catalog import metrics
from obsinfra.dashboards.queries import of

PROMETHEUS_NAME, PROMETHEUS_UID, PROMETHEUS_URL = (
    "Prometheus",
    "obsinfra-prometheus",
    "http://prometheus:9090",
)
TRACES_NAME, TRACES_UID, TRACES_URL = "Traces", "obsinfra-traces", "http://jaeger:16686"
LOGS_NAME, LOGS_UID, LOGS_URL = "Logs", "obsinfra-logs", "http://loki:3100"

SCRAPE_INTERVAL = "5s"
"""As prometheus/prometheus.yml has it; Grafana never asks for finer steps."""

TRACE_LABEL = "trace_id"
"""What exemplars, log lines and spans call the id of a trace."""


def prometheus() -> dict[str, Any]:
    """Metrics; an exemplar's trace opens in the trace store."""
    return _datasource(
        PROMETHEUS_NAME,
        PROMETHEUS_UID,
        "prometheus",
        PROMETHEUS_URL,
        {
            "httpMethod": "POST",
            "timeInterval": SCRAPE_INTERVAL,
            "prometheusType": "Prometheus",
            "exemplarTraceIdDestinations": [
                {"name": TRACE_LABEL, "datasourceUid": TRACES_UID, "urlDisplayLabel": "Open the trace"}
            ],
        },
    ) | {"isDefault": True}


def traces() -> dict[str, Any]:
    """Traces; from a span to the log lines of its trace, and to the metrics of its run."""
    return _datasource(
        TRACES_NAME,
        TRACES_UID,
        "jaeger",
        TRACES_URL,
        {
            "tracesToLogsV2": {
                "datasourceUid": LOGS_UID,
                "spanStartTimeShift": "-1m",
                "spanEndTimeShift": "1m",
                "customQuery": True,
                "query": f'{{service_name="obsinfra"}} | json | {TRACE_LABEL}="${{__trace.traceId}}"',
            },
            "tracesToMetrics": {
                "datasourceUid": PROMETHEUS_UID,
                "spanStartTimeShift": "-5m",
                "spanEndTimeShift": "5m",
                "tags": [{"key": "obsinfra.run", "value": "run"}, {"key": "obsinfra.rank", "value": "rank"}],
                "queries": [
                    {"name": "Step time", "query": f"{of(metrics.STEP_TIME_SECONDS)}{{$__tags}}"},
                    {"name": "Loss", "query": f"{of(metrics.TRAIN_LOSS)}{{$__tags}}"},
                    {
                        "name": "Phases",
                        "query": f"sum by (phase) (rate({of(metrics.PHASE_SECONDS)}{{$__tags}}[1m]))",
                    },
                ],
            },
            "nodeGraph": {"enabled": False},
            "traceQuery": {
                "timeShiftEnabled": True,
                "spanStartTimeShift": "-1h",
                "spanEndTimeShift": "1h",
            },
        },
    )


def logs() -> dict[str, Any]:
    """Log lines, where a Loki runs; a line's trace opens in the trace store."""
    return _datasource(
        LOGS_NAME,
        LOGS_UID,
        "loki",
        LOGS_URL,
        {
            "maxLines": 1000,
            "derivedFields": [
                {
                    "name": TRACE_LABEL,
                    "matcherRegex": f'"{TRACE_LABEL}":\\s*"([0-9a-f]{{32}})"',
                    "url": "${__value.raw}",
                    "datasourceUid": TRACES_UID,
                    "urlDisplayLabel": "Open the trace",
                }
            ],
        },
    )


def _datasource(name: str, uid: str, kind: str, url: str, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "uid": uid,
        "type": kind,
        "access": "proxy",
        "url": url,
        "editable": False,
        "jsonData": options,
    }
