"""The alert table as Prometheus rules.

Called by `obsinfra rules`, the native stack and the tests. Knows nothing of files but the one it writes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from obsinfra.alerting.wording import plain_number, summary_template, threshold_text, value_template
from obsinfra.catalog.alerts import ALERTS, Alert
from obsinfra.run.files import write_atomic

GROUP = "obsinfra"

HEADER = """\
# Generated from obsinfra/catalog/alerts.py by 'obsinfra rules write'; do not edit by hand.
# Other thresholds: set [thresholds] in obsinfra.toml, then run that command again.
"""


def duration(seconds: float) -> str:
    """Seconds as a Prometheus duration, to the millisecond: `60s`, `1500ms`."""
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


def expression(alert: Alert) -> str:
    """The condition in PromQL.

    An increase has three ways to be seen. `increase` needs two samples in its window and is blind to what
    came before the first; so the value is also compared with the one a window ago, and a series that did not
    exist then, or restarted since, counts in full, because every counter of this package begins at zero with
    its process. Thus an event is seen at the first evaluation after the scrape that carries it, even when
    that scrape is the very first. `increase` extrapolates to the window's edges: exact for a limit of 0, a
    few percent high for others.
    """
    name = alert.metric.sample_name
    beyond = f"{alert.comparator} {plain_number(alert.limit)}"
    if not alert.increase_seconds:
        return f"{name} {beyond}"
    window = duration(alert.increase_seconds)
    ways = (
        f"increase({name}[{window}])",
        f"({name} - {name} offset {window})",
        f"({name} unless {name} >= {name} offset {window})",
    )
    return "\nor ".join(f"{way} {beyond}" for way in ways)


def render_rules(alerts: Sequence[Alert] = ALERTS) -> str:
    """The rules file, the same text for the same table.

    Severity, action (where there is one) and scope become labels; what people read becomes annotations. The
    group has no interval of its own, so the global evaluation interval holds.
    """
    document = {"groups": [{"name": GROUP, "rules": [_rule(alert) for alert in alerts]}]}
    return HEADER + yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def write_rules(path: Path, alerts: Sequence[Alert] = ALERTS) -> None:
    """Write the rules file, whole or not at all. Its folder must exist."""
    write_atomic(path, render_rules(alerts), mode=0o644)


def check_rules(path: Path, alerts: Sequence[Alert] = ALERTS) -> str | None:
    """None when `path` holds what `write_rules` would write, else the difference as a unified diff."""
    found = path.read_text() if path.exists() else ""
    wanted = render_rules(alerts)
    if found == wanted:
        return None
    return "".join(
        difflib.unified_diff(
            found.splitlines(keepends=True), wanted.splitlines(keepends=True), str(path), "generated"
        )
    )


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block, as a person would."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _rule(alert: Alert) -> dict[str, Any]:
    rule: dict[str, Any] = {"alert": alert.name, "expr": expression(alert)}
    if alert.for_seconds:
        rule["for"] = duration(alert.for_seconds)
    rule["labels"] = rule_labels(alert)
    rule["annotations"] = {
        "summary": summary_template(alert),
        "description": alert.description,
        "value": value_template(alert),
        "threshold": threshold_text(alert),
    }
    return rule


def rule_labels(alert: Alert) -> dict[str, str]:
    """The labels a firing carries on top of its series' own."""
    labels: dict[str, str] = {"severity": alert.severity, "scope": alert.scope}
    if alert.action is not None:
        labels["action"] = alert.action.name
    return labels
