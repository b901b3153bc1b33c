"""The user's changes of the alert table: `[thresholds]` and `[alerts]` of the settings, checked and applied.

Settings, monitor and generators get the table they work with from here. Knows the table, no files.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args
from urllib.parse import urlsplit

from obsinfra.catalog.actions import ACTIONS
from obsinfra.catalog.alerts import ALERTS, BY_KEY, Alert, Severity
from obsinfra.catalog.conditions import Always, clears_apart, window_of, with_window
from obsinfra.errors import ConfigError

LONGEST_SECONDS = 366 * 86_400.0
"""Nobody waits longer; and Prometheus knows no duration of some centuries."""

_LEAST, _MOST = -sys.float_info.max, sys.float_info.max

LONGEST_TEXT = 400
"""Of a summary or description: what a message has room for."""

_LABEL = re.compile(r"\{\{\s*\$labels\.\w+\s*\}\}")


def alert_table(
    thresholds: Mapping[str, float] | None = None, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Alert, ...]:
    """The table with the user's settings applied, what they disabled left out.

    Args:
        thresholds: `[thresholds]`: key → value in that alert's `threshold_unit`.
        changes: `[alerts.<key>]`: key → field → value, for `CHANGEABLE` fields.

    Raises:
        ConfigError: an unknown key or field, or a value that does not fit; names it, and what would.
    """
    table = dict(BY_KEY)
    for key, value in (thresholds or {}).items():
        table[key] = _changed(_row(table, key, "thresholds"), "threshold", value, "[thresholds]")
    for key, fields in (changes or {}).items():
        where = f"[alerts.{key}]"
        if not isinstance(fields, Mapping):
            raise ConfigError(f"alerts.{key} = {fields!r}", f"a table {where}", "write it as a table")
        for field, value in fields.items():
            table[key] = _changed(_row(table, key, "alerts"), field, value, where)
        if "clear_threshold" in fields:
            _check_clears(table[key])
    return tuple(alert for alert in table.values() if alert.enabled)


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


def _row(table: Mapping[str, Alert], key: str, where: str) -> Alert:
    if key not in table:
        what = "threshold" if where == "thresholds" else "alert"
        raise ConfigError(
            f"unknown {what} {key!r}", f"one of {', '.join(BY_KEY)}", f"correct it under [{where}]"
        )
    return table[key]


def _changed(alert: Alert, field: str, value: Any, where: str) -> Alert:
    if field not in CHANGEABLE:
        raise ConfigError(
            f"unknown field {field!r} under {where}",
            f"one of {', '.join(CHANGEABLE)}",
            f"correct it under {where}",
        )
    try:
        return CHANGEABLE[field](alert, value)
    except ValueError as error:
        name = f"{alert.key}" if where == "[thresholds]" else f"{alert.key}.{field}"
        what = "threshold" if where == "[thresholds]" else "alert"
        raise ConfigError(f"{what} {name} = {value}", str(error), f"correct it under {where}") from None


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not _LEAST <= value <= _MOST:
        raise ValueError("a finite number")
    return float(value)


def _seconds(value: Any, least: float) -> float:
    try:
        seconds = _number(value)
    except ValueError:
        seconds = math.inf
    if not least <= seconds <= LONGEST_SECONDS:
        raise ValueError(f"a number from {least:g} to {LONGEST_SECONDS:g}")
    return seconds


def _with_threshold(alert: Alert, value: Any) -> Alert:
    if isinstance(alert.condition, Always):
        raise ValueError("no threshold here: this alert always fires")
    return replace(alert, threshold=_number(value))


def _with_clear_threshold(alert: Alert, value: Any) -> Alert:
    if not clears_apart(alert.condition):
        keys = ", ".join(alert.key for alert in ALERTS if clears_apart(alert.condition))
        raise ValueError(
            "no clearing threshold here: this alert looks at a window of time or at a number that moves; "
            f"with one: {keys}"
        )
    return replace(alert, clear_threshold=_number(value))


def _one_of(value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"one of {', '.join(allowed)}")
    return value


def _with_window(alert: Alert, value: Any) -> Alert:
    if not window_of(alert.condition):
        keys = ", ".join(alert.key for alert in ALERTS if window_of(alert.condition))
        raise ValueError(f"no window here: this alert looks at the present; with a window: {keys}")
    return replace(alert, condition=with_window(alert.condition, _seconds(value, 1.0)))


def _with_action(alert: Alert, value: Any) -> Alert:
    name = _one_of(value, ("none", *ACTIONS))
    if name != "none" and alert.scope == "stack":
        raise ValueError("none: this alert speaks of no run that could be told to do something")
    if name != "none" and (problem := ACTIONS[name].problem({})) is not None:
        raise ValueError(
            f"an action that needs no argument, or this one in [policy.alerts.{alert.name}]: {problem}"
        )
    return replace(alert, action=None if name == "none" else ACTIONS[name])


def _text(value: Any) -> str:
    plain = _LABEL.sub("", value) if isinstance(value, str) else ""
    if not plain.strip() or len(value) > LONGEST_TEXT or not plain.isprintable() or "{{" in plain:
        raise ValueError(
            f"text on one line of 1 to {LONGEST_TEXT} characters, with no template but {{{{ $labels.run }}}}"
        )
    return str(value)


def _url(value: Any) -> str:
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s{}<>\"|\\^`]", value):
        raise ValueError("an http or https URL, as https://wiki.example.org/slow-step")
    return str(value)


def _enabled(alert: Alert, value: Any) -> Alert:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return replace(alert, enabled=value)


CHANGEABLE: dict[str, Callable[[Alert, Any], Alert]] = {
    "threshold": _with_threshold,
    "clear_threshold": _with_clear_threshold,
    "for_seconds": lambda alert, value: replace(alert, for_seconds=_seconds(value, 0.0)),
    "window_seconds": _with_window,
    "severity": lambda alert, value: replace(alert, severity=_one_of(value, get_args(Severity))),
    "action": _with_action,
    "summary": lambda alert, value: replace(alert, summary=_text(value)),
    "description": lambda alert, value: replace(alert, description=_text(value)),
    "runbook_url": lambda alert, value: replace(alert, runbook_url=_url(value)),
    "enabled": _enabled,
}
"""Fields a user may set under `[alerts.<key>]`, and what setting one does."""
