"""The user's changes of the alert table: `[thresholds]` and `[alerts]` of the settings, checked and applied.

Settings, monitor and generators get the table they work with from here. Knows the table, no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast, get_args

from obsinfra.catalog.actions import ACTIONS
from obsinfra.catalog.alerts import ALERTS, BY_KEY, Alert, Scope, Severity
from obsinfra.catalog.condition_changes import (
    CONDITION_FIELDS,
    check_threshold,
    needs_threshold,
    with_condition,
)
from obsinfra.catalog.conditions import Always, clears_apart, label_names
from obsinfra.catalog.setting_values import number, one_of, seconds, text, truth, url
from obsinfra.errors import ConfigError


def alert_table(
    thresholds: Mapping[str, float] | None = None, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Alert, ...]:
    """The table with the user's settings applied, what they disabled left out.

    Args:
        thresholds: `[thresholds]`: key → value in that alert's `threshold_unit`.
        changes: `[alerts.<key>]`: key → field → value, for fields in `FIELDS`.

    Raises:
        ConfigError: an unknown key or field, or a value that does not fit, alone or with others; names it,
            and what would.
    """
    table = dict(BY_KEY)
    thresholds, changes = thresholds or {}, changes or {}
    for key in thresholds:
        _check_key(key, "thresholds")
    for key, fields in changes.items():
        if not isinstance(fields, Mapping):
            raise ConfigError(f"alerts.{key} = {fields!r}", f"a table [alerts.{key}]", "write it as a table")
        _check_key(key, "alerts")
        for field in fields:
            _check_field(field, f"[alerts.{key}]")
    for key in {**thresholds, **changes}:
        table[key] = _changed(table[key], key in thresholds, thresholds.get(key), changes.get(key, {}))
    return tuple(alert for alert in table.values() if alert.enabled)


def _changed(alert: Alert, has_threshold: bool, threshold: Any, fields: Mapping[str, Any]) -> Alert:
    """One row as the user wants it: first what is looked at, then what is held against it."""
    own, where = alert, f"[alerts.{alert.key}]"
    alert = with_condition(alert, {field: fields[field] for field in CONDITION_FIELDS if field in fields})
    if needs_threshold(own, alert) and not has_threshold and "threshold" not in fields:
        unit = f" in {alert.threshold_unit}" if alert.threshold_unit else ""
        raise ConfigError(
            f"alert {alert.key} looks at another number, and the threshold is the table's, {own.threshold:g}",
            f"a threshold{unit} for it",
            f"add threshold under {where}",
        )
    if has_threshold:
        name = f"threshold {alert.key}"
        alert = _with(alert, "threshold", threshold, name, "[thresholds]")
        if "threshold" not in fields:
            check_threshold(alert, name)
    for field in CHANGEABLE:
        if field in fields:
            alert = _with(alert, field, fields[field], f"alert {alert.key}.{field}", where)
    if "threshold" in fields or any(field in fields for field in CONDITION_FIELDS):
        check_threshold(alert, f"alert {alert.key}.threshold")
    if "clear_threshold" in fields:
        _check_clears(alert)
    _check_scope(alert, fields)
    return alert


def _with(alert: Alert, field: str, value: Any, name: str, where: str) -> Alert:
    try:
        return CHANGEABLE[field](alert, value)
    except ValueError as error:
        raise ConfigError(f"{name} = {value}", str(error), f"correct it under {where}") from None


def _check_key(key: str, where: str) -> None:
    if key not in BY_KEY:
        what = "threshold" if where == "thresholds" else "alert"
        raise ConfigError(
            f"unknown {what} {key!r}", f"one of {', '.join(BY_KEY)}", f"correct it under [{where}]"
        )


def _check_field(field: str, where: str) -> None:
    if field not in FIELDS:
        raise ConfigError(
            f"unknown field {field!r} under {where}",
            f"one of {', '.join(FIELDS)}",
            f"correct it under {where}",
        )


def scopes_of(alert: Alert) -> tuple[Scope, ...]:
    """What one firing can speak of, by the labels that its series have.

    The sidecar gives an alert with a label `run` to that run, and one about a host that has none to every
    run on it; so nothing else may claim to be about runs, nor anything about a run to be about none.
    """
    names = label_names(alert.condition)
    if "run" not in names:
        return ("host", "stack") if "host" in names else ("stack",)
    found: list[Scope] = ["run"]
    if "rank" in names:
        found += ["rank", "host"]  # whose host is known
    if "device" in names:
        found.append("device")
    return tuple(found)


def _check_scope(alert: Alert, fields: Mapping[str, Any]) -> None:
    allowed = scopes_of(alert)
    if alert.scope not in allowed and ("scope" in fields or "metric" in fields or "aggregation" in fields):
        has = ", ".join(label_names(alert.condition)) or "none"
        raise ConfigError(
            f"alert {alert.key}.scope = {alert.scope}",
            f"one of {', '.join(allowed)}, as its series have the labels {has}",
            f"set scope under [alerts.{alert.key}]",
        )
    if alert.scope == "stack" and alert.action is not None and fields:
        raise ConfigError(
            f"alert {alert.key}.action = {alert.action.name} with scope stack",
            "none: this alert speaks of no run that could be told to do something",
            f"set action under [alerts.{alert.key}]",
        )


def _check_clears(alert: Alert) -> None:
    """See that the clearing threshold that was set lies where an alert that fires no longer would.

    The table's own gives way to a threshold set beyond it.
    """
    if alert.clears_at is None and alert.clear_threshold != alert.threshold:
        side = "most" if alert.comparator == ">" else "least"
        raise ConfigError(
            f"alert {alert.key}.clear_threshold = {alert.clear_threshold:g}",
            f"at {side} the threshold, {alert.threshold:g}",
            f"correct it under [alerts.{alert.key}]",
        )


def _with_threshold(alert: Alert, value: Any) -> Alert:
    if isinstance(alert.condition, Always):
        raise ValueError("no threshold here: this alert always fires")
    threshold = number(value)
    if not math.isfinite(threshold * alert.scale):
        raise ValueError("a finite number")
    return replace(alert, threshold=threshold)


def _with_clear_threshold(alert: Alert, value: Any) -> Alert:
    if not clears_apart(alert.condition):
        keys = ", ".join(alert.key for alert in ALERTS if clears_apart(alert.condition))
        raise ValueError(
            "no clearing threshold here: this alert looks at a window of time or at a number that moves; "
            f"with one: {keys}"
        )
    return replace(alert, clear_threshold=number(value))


def _with_action(alert: Alert, value: Any) -> Alert:
    name = one_of(value, ("none", *ACTIONS))
    if name != "none" and alert.scope == "stack":
        raise ValueError("none: this alert speaks of no run that could be told to do something")
    if name != "none" and (problem := ACTIONS[name].problem({})) is not None:
        raise ValueError(
            f"an action that needs no argument, or this one in [policy.alerts.{alert.name}]: {problem}"
        )
    return replace(alert, action=None if name == "none" else ACTIONS[name])


def _scope(alert: Alert, value: Any) -> Alert:
    return replace(alert, scope=cast(Scope, one_of(value, get_args(Scope))))


def _severity(alert: Alert, value: Any) -> Alert:
    return replace(alert, severity=cast(Severity, one_of(value, get_args(Severity))))


CHANGEABLE: dict[str, Callable[[Alert, Any], Alert]] = {
    "threshold": _with_threshold,
    "clear_threshold": _with_clear_threshold,
    "for_seconds": lambda alert, value: replace(alert, for_seconds=seconds(value, 0.0)),
    "severity": _severity,
    "scope": _scope,
    "action": _with_action,
    "summary": lambda alert, value: replace(alert, summary=text(value)),
    "description": lambda alert, value: replace(alert, description=text(value)),
    "runbook_url": lambda alert, value: replace(alert, runbook_url=url(value)),
    "enabled": lambda alert, value: replace(alert, enabled=truth(value)),
}
"""Fields a user may set under `[alerts.<key>]` besides the condition's, and what setting one does, in the
order in which they are set."""

FIELDS = (*CONDITION_FIELDS, *CHANGEABLE)
"""All that a user may set under `[alerts.<key>]`."""
