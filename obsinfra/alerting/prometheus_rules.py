"""The alert table as Prometheus rules.

Called by `obsinfra rules`, the native stack and the tests. Knows nothing of files but the one it writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from obsinfra.alerting.dashboard_recordings import DASHBOARD_RECORDINGS
from obsinfra.alerting.dashboard_recordings import GROUP as DASHBOARDS_GROUP
from obsinfra.alerting.promql import duration, expression, recordings, rule_labels
from obsinfra.alerting.wording import (
    filled,
    outcome_template,
    step_template,
    summary_template,
    threshold_text,
    until_text,
    value_template,
)
from obsinfra.catalog.alerts import ALERTS, Alert
from obsinfra.run.files import write_atomic

GROUP = "obsinfra"

RUNBOOKS = "http://127.0.0.1:9465/runbooks"
"""Where the sidecar serves the runbooks by default; people open it in a browser."""

HEADER = """\
# Generated from obsinfra/catalog/alerts.py by 'obsinfra rules write'; do not edit by hand.
# Other thresholds: set [thresholds] or [alerts] in obsinfra.toml, then run that command again.
"""


def render_rules(alerts: Sequence[Alert] = ALERTS, runbooks: str = RUNBOOKS) -> str:
    """The rules file, the same text for the same table: what is recorded first, then the alerts, and as a
    group of its own what is recorded for the dashboards.

    Severity, action (where there is one) and scope become labels; what people read becomes annotations. The
    groups have no interval of their own, so the global evaluation interval holds.

    Args:
        alerts: the table, the user's settings applied.
        runbooks: URL under which each alert's runbook is read by its name, where it names none of its own.
    """
    recorded = {record.name: record.expression for alert in alerts for record in recordings(alert.condition)}
    rules = [{"record": name, "expr": text} for name, text in recorded.items()]
    shown = [{"record": record.name, "expr": record.expression} for record in DASHBOARD_RECORDINGS]
    document = {
        "groups": [
            {"name": GROUP, "rules": rules + [_rule(alert, runbooks) for alert in alerts]},
            {"name": DASHBOARDS_GROUP, "rules": shown},
        ]
    }
    return HEADER + yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def write_rules(path: Path, alerts: Sequence[Alert] = ALERTS, runbooks: str = RUNBOOKS) -> None:
    """Write the rules file, whole or not at all. Its folder must exist."""
    write_atomic(path, render_rules(alerts, runbooks), mode=0o644)


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, as a person would."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _rule(alert: Alert, runbooks: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"alert": alert.name, "expr": expression(alert)}
    if alert.for_seconds:
        rule["for"] = duration(alert.for_seconds)
    rule["labels"] = rule_labels(alert)
    rule["annotations"] = {
        "summary": summary_template(alert),
        "description": alert.description,
        "value": value_template(alert),
        "threshold": threshold_text(alert) + until_text(alert),
        "runbook_url": alert.runbook_url or f"{runbooks}/{alert.name}",
    }
    if alert.scope != "stack":
        rule["annotations"] |= {"step": step_template(), "outcome": outcome_template(alert)}
    return rule


def firing_labels(alert: Alert, series: Mapping[str, str]) -> dict[str, str]:
    """The labels of a firing, its name apart, for a series with these labels."""
    own = {name: filled(text, series) for name, text in rule_labels(alert).items()}
    return {name: value for name, value in {**series, **own}.items() if value}
