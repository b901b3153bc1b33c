"""How an alert's numbers and sentences are written for people, in-process and in Prometheus templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from obsinfra.catalog.alerts import Alert
from obsinfra.catalog.conditions import Always, Increase, Multiple
from obsinfra.catalog.metrics import SIDECAR_ACTION_SECONDS, SIDECAR_ACTION_STEP, STEP
from obsinfra.catalog.units import UNITS, quantity_of_metric


def plain_number(value: float) -> str:
    """The shortest text that is exactly `value` again: `90`, not `90.0`."""
    return repr(float(value)).removesuffix(".0")


def summary_template(alert: Alert) -> str:
    """The summary with the threshold filled in; label templates stay for Prometheus to fill."""
    return alert.summary.replace("{threshold}", plain_number(alert.threshold))


def summary_for_people(alert: Alert, labels: Mapping[str, str]) -> str:
    """The summary with threshold and `{{ $labels.x }}` filled in; an absent label is empty text."""
    return filled(summary_template(alert), labels)


def filled(template: str, labels: Mapping[str, str]) -> str:
    """A template of Prometheus that names labels, `{{ $labels.x }}`, and does nothing else, filled in."""
    return re.sub(r"\{\{\s*\$labels\.(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), template)


def threshold_text(alert: Alert) -> str:
    """The threshold with its unit, as `90 %`."""
    return _with_unit(alert, alert.threshold)


def until_text(alert: Alert) -> str:
    """Where a firing alert clears, if that is not its threshold, as `, until 75 %`; else empty."""
    return "" if alert.clears_at is None else f", until {_with_unit(alert, alert.clears_at)}"


def _with_unit(alert: Alert, value: float) -> str:
    return f"{plain_number(value)} {alert.threshold_unit}".rstrip()


def step_template() -> str:
    """A Prometheus template that looks up the step the alert's run has reached; empty without one."""
    asked = f'query (printf "max({STEP.sample_name}{{run=%q}})" .)'
    answer = '{{ . | first | value | printf "%.0f" }}'
    return f"{{{{ with $labels.run }}}}{{{{ with {asked} }}}}{answer}{{{{ end }}}}{{{{ end }}}}"


def outcome_template(alert: Alert) -> str:
    """A Prometheus template that looks up what the sidecar did about the alert and what came of it.

    As `done: emergency_checkpoint, step 60, 0.3 s · under_way: pause, 1.2 s`; empty where nothing is known.
    """
    name = json.dumps(alert.name)
    done = f"{SIDECAR_ACTION_SECONDS.sample_name}{{run=%q, alert=%q}}"
    step = f"{SIDECAR_ACTION_STEP.sample_name}{{run=%q, alert=%q, action=%q}}"
    return (
        "{{ with $run := $labels.run }}"
        f'{{{{ range $i, $did := query (printf "max by (action, outcome) ({done})" . {name})'
        ' | sortByLabel "action" }}{{ if $i }} · {{ end }}{{ .Labels.outcome }}: {{ .Labels.action }}'
        f'{{{{ with query (printf "max({step})" $run {name} .Labels.action) }}}}'
        ', step {{ . | first | value | printf "%.0f" }}{{ end }}'
        '{{ if .Value }}, {{ .Value | printf "%.1f" }} s{{ end }}{{ end }}{{ end }}'
    )


def value_template(alert: Alert) -> str:
    """A Prometheus template that writes the alert's value in the unit people know it by."""
    match alert.condition:
        case Always():
            return ""
        case Increase(_, window_seconds, _):
            # increase() extrapolates to the edges of the window: one event shows as 1.05.
            counted = _TEMPLATES.get(alert.threshold_unit, '{{ $value | printf "%.0f" }}')
            return f"{counted} within {plain_number(window_seconds)} s"
        case Multiple(metric):  # whose threshold is a factor
            [unit, *_] = UNITS[quantity_of_metric(metric)]
            return _value_template("%" if quantity_of_metric(metric) == "ratio" else unit)
    return _value_template(alert.threshold_unit)


def _value_template(unit: str) -> str:
    if unit in _TEMPLATES:
        return _TEMPLATES[unit]
    if unit:
        return f'{{{{ $value | printf "%.1f" }}}} {unit}'
    return "{{ $value | humanize }}"


_TEMPLATES = {
    "%": "{{ $value | humanizePercentage }}",
    **dict.fromkeys(UNITS["seconds"], "{{ $value | humanizeDuration }}"),
    **dict.fromkeys(UNITS["bytes"], "{{ $value | humanize }}B"),
    **dict.fromkeys(UNITS["bytes a second"], "{{ $value | humanize }}B/s"),
    **dict.fromkeys(UNITS["watts"], "{{ $value | humanize }}W"),
    **dict.fromkeys(UNITS["hertz"], "{{ $value | humanize }}Hz"),
    **dict.fromkeys(UNITS["change a second"], "{{ $value | humanize }}/s"),
}
"""Threshold unit → how a value, which Prometheus has in the base unit, is written."""
