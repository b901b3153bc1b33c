"""The generated rules, judged by promtool: valid, committed as generated, right when it matters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from other_conditions import OTHER_CONDITIONS, Change, random_changes
from promtool import needs_promtool, promtool
from stack_versions import StackVersion, each_version

from obsinfra.alerting.dashboard_recordings import DASHBOARD_RECORDINGS
from obsinfra.alerting.prometheus_rules import firing_labels, render_rules, write_rules
from obsinfra.alerting.promql import duration, recordings
from obsinfra.alerting.rule_tests import (
    pace_of,
    render_rule_tests,
    scenes_of,
    series_labels,
    write_rule_tests,
)
from obsinfra.catalog.actions import ACTIONS
from obsinfra.catalog.alert_changes import alert_table, scopes_of
from obsinfra.catalog.alerts import ALERTS, BY_NAME, Alert
from obsinfra.catalog.condition_changes import AGGREGATIONS, aggregation_of, check_threshold
from obsinfra.catalog.conditions import Always, label_names, metrics_of, window_of
from obsinfra.catalog.metrics import METRICS
from obsinfra.catalog.units import UNITS, quantity_of

COMMITTED = Path(__file__).parents[2] / "prometheus/rules/obsinfra.yml"


def test_the_committed_rules_are_what_the_generator_writes() -> None:
    assert COMMITTED.read_text() == render_rules()


def test_only_an_alert_that_asks_for_an_action_has_the_label_action() -> None:
    """A series may have such a label too; the sidecar would act on it, and people be told that it does."""
    for alert, rule in zip(ALERTS, alert_rules(), strict=True):
        own = {name: f"some-{name}" for name in label_names(alert.condition)}
        wanted = alert.action.name if alert.action else None
        assert firing_labels(alert, own).get("action") == wanted
        assert rule["labels"].get("action") == ("" if "action" in own and wanted is None else wanted)
    failing = firing_labels(BY_NAME["DeliveryFailing"], {"action": "stop", "outcome": "failed"})
    assert failing["command"] == "stop" and failing["outcome"] == "failed"


def test_a_users_threshold_reaches_the_expression_in_the_metrics_unit() -> None:
    expressions = {
        rule["alert"]: rule["expr"]
        for rule in alert_rules(alert_table({"memory": 57, "gpu_temperature": 79.5}))
    }
    assert expressions["HighMemory"] == "obsinfra_memory_pressure_ratio > 0.57"
    assert expressions["HighGPUTemperature"].splitlines()[:2] == [
        "obsinfra_gpu_temperature_celsius > 79.5",
        "or obsinfra_gpu_temperature_celsius > 75",
    ]


def test_a_threshold_beyond_the_tables_clearing_threshold_is_where_it_clears() -> None:
    expressions = {rule["alert"]: rule["expr"] for rule in alert_rules(alert_table({"gpu_temperature": 70}))}
    assert expressions["HighGPUTemperature"] == "obsinfra_gpu_temperature_celsius > 70"


def test_high_gpu_utilisation_only_informs() -> None:
    [busy] = [rule for rule in alert_rules() if rule["alert"] == "HighGPUUtilization"]
    assert busy["labels"] == {"severity": "info", "scope": "device"}


def test_the_original_seven_are_as_documented() -> None:
    """Name, expression, wait, severity and action of the table the product began with. What a hot device
    that cools down adds to its expression comes after it."""
    found = {
        rule["alert"]: (
            rule["expr"].splitlines()[0],
            rule.get("for", "0s"),
            rule["labels"]["severity"],
            rule["labels"].get("action"),
        )
        for rule in alert_rules()
    }  # fmt: skip
    wanted = {
        "HighCPU": ("obsinfra_host_cpu_ratio > 0.9", "60s", "warning", None),
        "HighMemory": ("obsinfra_memory_pressure_ratio > 0.85", "15s", "critical", "emergency_checkpoint"),
        "HighGPUUtilization": ("obsinfra_gpu_utilization_ratio > 0.95", "300s", "info", None),
        "HighGPUMemory": ("obsinfra_gpu_memory_ratio > 0.9", "30s", "warning", "checkpoint"),
        "HighGPUTemperature": (
            "obsinfra_gpu_temperature_celsius > 85", "10s", "critical", "emergency_checkpoint"
        ),
        "SlowStep": ("obsinfra_step_time_seconds > 10", "0s", "warning", "checkpoint"),
        "GradientExplosion": ("obsinfra_gradient_norm_peak > 100", "0s", "critical", "emergency_checkpoint"),
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted


def test_every_row_can_be_read_and_acted_on() -> None:
    """An alert has a summary, a description, a runbook, and a severity; its action is one a trainer knows."""
    for rule in alert_rules():
        notes = rule["annotations"]
        assert notes["summary"] and notes["description"].endswith("."), rule["alert"]
        assert notes["runbook_url"].endswith(f"/runbooks/{rule['alert']}")
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert (rule["labels"].get("action") or "stop") in ACTIONS


def test_every_row_is_one_that_a_user_could_write() -> None:
    """Scope, unit and threshold are held to what a change of them is held to."""
    for alert in ALERTS:
        assert alert.scope in scopes_of(alert), alert.name
        units = UNITS[quantity_of(alert.condition)]
        plain = alert.threshold_unit.split(" ")[0]  # as of "× the promise"
        assert units[plain] == pytest.approx(alert.scale), alert.name
        check_threshold(alert, alert.name)


def test_setting_what_the_table_has_changes_nothing() -> None:
    for alert in ALERTS:
        if isinstance(alert.condition, Always):
            continue
        same = {
            "metric": alert.condition.metric.sample_name,
            "aggregation": aggregation_of(alert.condition),
            "comparator": alert.comparator,
            "scope": alert.scope,
        }
        assert [row for row in alert_table({}, {alert.key: same}) if row.key == alert.key] == [alert]


def test_every_metric_of_a_condition_is_one_that_is_exported() -> None:
    for alert in ALERTS:
        for metric in metrics_of(alert.condition):
            assert metric.source == "stack" or metric in METRICS, (alert.name, metric.name)


def test_what_is_switched_off_has_no_rule() -> None:
    rules = alert_rules(alert_table({}, {"gpu_idle": {"enabled": False}, "lost_share": {"enabled": False}}))
    assert BY_NAME.keys() - {rule["alert"] for rule in rules} == {"GPUIdle", "GoodputLow"}
    assert "obsinfra:lost_share:ratio" not in render_rules(
        alert_table({}, {"lost_share": {"enabled": False}})
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(60.0, "60s"), (0.5, "500ms"), (1.25, "1250ms"), (300, "300s")]
)
def test_durations_in_prometheus_notation(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@each_version
def test_promtool_accepts_the_rules(version: StackVersion) -> None:
    checked = version.run("promtool", "check", "rules", "--lint-fatal", COMMITTED)
    assert checked.returncode == 0, checked.stderr
    recorded = {record.name for alert in ALERTS for record in recordings(alert.condition)}
    recorded |= {record.name for record in DASHBOARD_RECORDINGS}
    assert f"{len(ALERTS) + len(recorded)} rules found" in checked.stdout


OWN: dict[str, dict[str, Any]] = {
    "memory": {"threshold": 60.5, "for_seconds": 0, "clear_threshold": 60},
    "cgroup_memory": {"clear_threshold": 80},
    "gpu_idle": {"clear_threshold": 40},
    "gpu_temperature": {"threshold": 70},
    "gpu_throttling": {"clear_threshold": -1},
    "host_down": {"clear_threshold": 2},
    "step_time": {"threshold": 0.25, "for_seconds": 7, "summary": "{{ $labels.run }}: over {threshold} s"},
    "gradient_norm": {"threshold": 1e6},
    "data_share": {"threshold": 12, "window_seconds": 60, "for_seconds": 0},
    "memory_creep": {"threshold": 50, "window_seconds": 600},
    "loss_spike": {"threshold": 4, "window_seconds": 120},
    "nonfinite_loss": {"threshold": 3, "window_seconds": 20, "for_seconds": 5},
    "no_progress": {"threshold": 100},
    "straggler": {"threshold": 2, "for_seconds": 3, "clear_threshold": 1.2},
    "gradient_trend": {"threshold": 2.5, "window_seconds": 300},
    "disk_filling": {"threshold": 20, "window_seconds": 900},
    "pcie_replays": {"threshold": 3, "window_seconds": 60},
}


@each_version
@pytest.mark.parametrize("changes", [{}, OWN, OTHER_CONDITIONS], ids=["default", "own", "other conditions"])
def test_every_alert_fires_and_resolves_as_the_table_says(
    tmp_path: Path, changes: dict[str, dict[str, Any]], version: StackVersion
) -> None:
    tests = write_rule_tests(tmp_path, alert_table({}, changes))
    judged = version.run("promtool", "test", "rules", *tests)
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert len(tests) == len(ALERTS)


def test_every_aggregation_is_played_on_both_sides_of_its_limit() -> None:
    played = {
        (aggregation_of(alert.condition), alert.comparator)
        for alert in (*ALERTS, *alert_table({}, OTHER_CONDITIONS))
    }
    missing = {(name, side) for name in AGGREGATIONS for side in "<>"} - played
    assert missing == set()


@pytest.mark.slow
@each_version
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(change=random_changes())
def test_whatever_alert_the_settings_take_is_tested_and_passes(
    tmp_path: Path, change: tuple[str, Change], version: StackVersion
) -> None:
    key, fields = change
    [alert] = [row for row in alert_table({}, {key: fields}) if row.key == key]
    [test] = write_rule_tests(tmp_path, [alert])
    checked = version.run("promtool", "check", "rules", "--lint-fatal", tmp_path / f"{alert.name}.rules.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    judged = version.run("promtool", "test", "rules", test)
    assert judged.returncode == 0, judged.stdout + judged.stderr


@needs_promtool
def test_alerts_of_a_trainer_keep_the_host_by_which_they_are_held_back_when_it_is_down(
    tmp_path: Path,
) -> None:
    """`/sd` puts the label on each series of a trainer; what is summed up must not lose it."""
    seen = 0
    for alert in ALERTS:
        if isinstance(alert.condition, Always) or any(
            metric.source != "trainer" for metric in metrics_of(alert.condition)
        ):
            continue
        rules, test = (tmp_path / f"{alert.name}.{what}.yml" for what in ("rules", "test"))
        write_rules(rules, [alert])
        document = yaml.safe_load(render_rule_tests(rules.name, alert))
        for scene in document["tests"]:
            for series in scene["input_series"]:
                series["series"] = series["series"].replace("{", '{host="gpu-1", ', 1)
            for look in scene["promql_expr_test"]:
                for firing in look["exp_samples"]:
                    firing["labels"] = firing["labels"].replace("{", '{host="gpu-1", ', 1)
                    seen += 1
        test.write_text(yaml.safe_dump(document, allow_unicode=True))
        judged = promtool("test", "rules", test)
        assert judged.returncode == 0, judged.stdout + judged.stderr
    assert seen > len(ALERTS)


def _wrong(alert: Alert) -> list[dict[str, float]]:
    """Changes of an alert's rule, each of which its tests must notice."""
    wrong = [
        {"threshold": alert.threshold * 1.5 + (1 if alert.comparator == ">" else -2)},
        {"for_seconds": alert.for_seconds + window_of(alert.condition) + 60 * pace_of(alert)},
    ]
    if window_of(alert.condition):
        wrong.append({"window_seconds": 3 * window_of(alert.condition)})
    if alert.clears_at is not None:
        middle = (alert.threshold + alert.clears_at) / 2
        wrong += [{"clear_threshold": value} for value in (alert.threshold, middle, alert.clears_at - 5)]
    return wrong


@needs_promtool
def test_the_generated_tests_notice_a_wrong_rule(tmp_path: Path) -> None:
    """A rule made from another threshold, wait or window fails the tests made from the right table."""
    unnoticed = []
    for alert in ALERTS:
        if isinstance(alert.condition, Always):
            continue  # there is nothing to get wrong
        for number, change in enumerate(_wrong(alert)):
            rules, test = (tmp_path / f"{alert.name}-{number}.{what}.yml" for what in ("rules", "test"))
            write_rules(
                rules, [row for row in alert_table({}, {alert.key: change}) if row.name == alert.name]
            )
            test.write_text(render_rule_tests(rules.name, alert))
            if promtool("test", "rules", test).returncode == 0:
                unnoticed.append((alert.name, change))
    assert unnoticed == []


READS_AS = {
    "HighCPU": (0.905, "CPU above 90 %", "90.5%", "90 %"),
    "HighMemory": (0.8765, "Memory above 85 %", "87.65%", "85 %"),
    "HighGPUUtilization": (1, "GPU some-device busy above 95 %", "100%", "95 %"),
    "HighGPUMemory": (0.999, "GPU some-device memory above 90 %", "99.9%", "90 %"),
    "HighGPUTemperature": (91.23, "GPU some-device hotter than 85 °C", "91.2 °C", "85 °C, until 75 °C"),
    "SlowStep": (75, "A step takes longer than 10 s", "1m 15s", "10 s"),
    "GradientExplosion": (123456, "Gradient norm above 100", "123.5k", "100"),
    "NonFiniteLoss": (3, "The loss is NaN or infinite", "3 within 60 s", "0"),
    "DiskLow": (1.5e9, "Less than 2 GB free where the run folder lies", "1.5GB", "2 GB"),
    "SwapInUse": (3e9, "More than 1 GB of swap in use", "3GB", "1 GB"),
    "RemoteBehind": (
        4000, "A checkpoint has been waiting for its remote copy for more than 900 s", "1h 6m 40s", "900 s"
    ),
    "TrainerGone": (0, "The trainer of some-run died without saying why", "0", "1"),
    "GPUXidError": (1, "GPU some-device reported XID some-xid", "1 within 600 s", "0"),
    "GPUThrottling": (1, "GPU some-device is held down: hw_slowdown", "1", "0"),
}  # fmt: skip
"""Value played → summary, value and threshold as people read them, one alert for each way of writing."""


@each_version
def test_what_people_read(tmp_path: Path, version: StackVersion) -> None:
    """Annotations as Prometheus itself renders them, against what a person would write."""
    write_rules(tmp_path / "rules.yml")
    tests = []
    for name, (value, summary, value_text, threshold) in READS_AS.items():
        alert = BY_NAME[name]
        labels = series_labels(alert)
        [first, *_] = scenes_of(alert)
        [series] = first.series
        own = {"severity": alert.severity, "scope": alert.scope}
        tests.append(
            {
                "interval": "1s",
                "input_series": [
                    {"series": series, "values": f"{value}+0x310"},
                    {"series": f'obsinfra_step{{run="{labels.get("run")}"}}', "values": "1234567+0x310"},
                ],
                "alert_rule_test": [
                    {
                        "alertname": name,
                        "eval_time": f"{alert.for_seconds:.0f}s",
                        "exp_alerts": [
                            {
                                "exp_labels": labels
                                | own
                                | ({"action": alert.action.name} if alert.action else {}),
                                "exp_annotations": {
                                    "summary": summary,
                                    "description": alert.description,
                                    "value": value_text,
                                    "threshold": threshold,
                                    "runbook_url": f"http://127.0.0.1:9465/runbooks/{name}",
                                }
                                | ({"step": "1234567", "outcome": ""} if "run" in labels else {}),
                            }
                        ],
                    }
                ],
            }
        )
    document = {"rule_files": ["rules.yml"], "evaluation_interval": "1s", "tests": tests}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(document, allow_unicode=True))
    judged = version.run("promtool", "test", "rules", tmp_path / "test.yml")
    assert judged.returncode == 0, judged.stdout + judged.stderr


@each_version
def test_an_alert_tells_what_the_sidecar_did_about_it_and_what_came_of_it(
    tmp_path: Path, version: StackVersion
) -> None:
    """Looked up at each evaluation, by run and alert; whatever the run's name, no query is made of it."""
    alert = BY_NAME["GradientExplosion"]
    write_rules(tmp_path / "rules.yml", [alert])
    runs = {
        "saved": "done: emergency_checkpoint, step 60, 0.3 s · under_way: pause, 1.5 s",
        "held": "cool_down: emergency_checkpoint",
        "alone": "",
        'x"} or vector(1) or up{run="\\': "failed: emergency_checkpoint, 2.0 s",
    }

    def series(name: str, value: object, **labels: str) -> dict[str, str]:
        inside = ", ".join(f"{key}={json.dumps(text)}" for key, text in labels.items())
        return {"series": f"{name}{{{inside}}}", "values": f"{value}+0x5"}

    mine = {"alert": "GradientExplosion", "action": "emergency_checkpoint"}
    saved, held, odd = (run for run in runs if run != "alone")
    seconds, step = "obsinfra_sidecar_action_seconds", "obsinfra_sidecar_action_step"
    played = [
        series(seconds, 0.26, run=saved, outcome="done", **mine),
        series(step, 60, run=saved, **mine),
        series(seconds, 1.5, run=saved, outcome="under_way", **mine | {"action": "pause"}),
        series(seconds, 9, run=saved, outcome="done", **mine | {"alert": "SlowStep"}),
        series(seconds, 0, run=held, outcome="cool_down", **mine),
        series(seconds, 2, run=odd, outcome="failed", **mine),
    ]
    for run in runs:
        played.append(series("obsinfra_gradient_norm_peak", 250, run=run))
    test = {
        "interval": "1s",
        "input_series": played,
        "alert_rule_test": [
            {
                "alertname": alert.name,
                "eval_time": "3s",
                "exp_alerts": [
                    {
                        "exp_labels": {
                            "run": run,
                            "severity": "critical",
                            "scope": alert.scope,
                            "action": "emergency_checkpoint",
                        },
                        "exp_annotations": {
                            "summary": "Gradient norm above 100",
                            "description": alert.description,
                            "value": "250",
                            "threshold": "100",
                            "runbook_url": "http://127.0.0.1:9465/runbooks/GradientExplosion",
                            "step": "",
                            "outcome": outcome,
                        },
                    }
                    for run, outcome in runs.items()
                ],
            }
        ],
    }
    document = {"rule_files": ["rules.yml"], "evaluation_interval": "1s", "tests": [test]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(document, allow_unicode=True))
    judged = version.run("promtool", "test", "rules", tmp_path / "test.yml")
    assert judged.returncode == 0, judged.stdout + judged.stderr


def alert_rules(alerts: Sequence[Alert] = ALERTS) -> list[dict[str, Any]]:
    groups = yaml.safe_load(render_rules(alerts))["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]
