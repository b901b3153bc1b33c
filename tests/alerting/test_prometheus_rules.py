"""The generated rules, judged by promtool: valid, committed as generated, right when it matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from promtool import needs_promtool, promtool

from obsinfra.alerting.prometheus_rules import check_rules, duration, render_rules, write_rules
from obsinfra.alerting.rule_tests import render_rule_tests, series_labels
from obsinfra.catalog.alerts import ALERTS, BY_NAME, Alert, with_thresholds

COMMITTED = Path(__file__).parents[2] / "prometheus/rules/obsinfra.yml"


def test_the_committed_rules_are_what_the_generator_writes() -> None:
    assert check_rules(COMMITTED) is None


def test_a_difference_is_shown_as_a_diff(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yml"
    assert check_rules(rules) is not None
    write_rules(rules)
    assert check_rules(rules) is None
    rules.write_text(rules.read_text().replace("> 0.9\n", "> 0.8\n"))
    difference = check_rules(rules)
    assert difference is not None
    assert (
        "-    expr: obsinfra_host_cpu_ratio > 0.8\n+    expr: obsinfra_host_cpu_ratio > 0.9\n" in difference
    )


def test_a_users_threshold_reaches_the_expression_in_the_metrics_unit() -> None:
    rules = yaml.safe_load(render_rules(with_thresholds({"memory": 57, "gpu_temperature": 79.5})))
    expressions = {rule["alert"]: rule["expr"] for rule in rules["groups"][0]["rules"]}
    assert expressions["HighMemory"] == "obsinfra_memory_pressure_ratio > 0.57"
    assert expressions["HighGPUTemperature"] == "obsinfra_gpu_temperature_celsius > 79.5"


def test_high_gpu_utilisation_only_informs() -> None:
    rules = yaml.safe_load(render_rules())["groups"][0]["rules"]
    [busy] = [rule for rule in rules if rule["alert"] == "HighGPUUtilization"]
    assert busy["labels"] == {"severity": "info", "scope": "device"}
    assert {rule["alert"] for rule in rules if "action" in rule["labels"]} == {
        "HighMemory", "HighGPUMemory", "HighGPUTemperature", "SlowStep", "GradientExplosion", "NonFiniteLoss",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"), [(60.0, "60s"), (0.5, "500ms"), (1.25, "1250ms"), (300, "300s")]
)
def test_durations_in_prometheus_notation(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    checked = promtool("check", "rules", "--lint-fatal", COMMITTED)
    assert checked.returncode == 0, checked.stderr
    assert f"{len(ALERTS)} rules found" in checked.stdout


@needs_promtool
@pytest.mark.parametrize(
    "overrides", [{}, {"memory": 60.5, "step_time": 0.25, "gradient_norm": 1e6}], ids=["default", "own"]
)
def test_every_alert_fires_and_resolves_as_the_table_says(
    tmp_path: Path, overrides: dict[str, float]
) -> None:
    table = with_thresholds(overrides)
    write_rules(tmp_path / "rules.yml", table)
    (tmp_path / "test.yml").write_text(render_rule_tests("rules.yml", table))
    judged = promtool("test", "rules", tmp_path / "test.yml")
    assert judged.returncode == 0, judged.stdout + judged.stderr


@needs_promtool
@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_the_generated_tests_notice_a_wrong_rule(tmp_path: Path, alert: Alert) -> None:
    """A rule made from another threshold or another wait fails the tests made from the right table."""
    other = with_thresholds({alert.key: alert.threshold * 1.5 + 1})
    write_rules(tmp_path / "rules.yml", other)
    (tmp_path / "test.yml").write_text(render_rule_tests("rules.yml", [alert]))
    assert promtool("test", "rules", tmp_path / "test.yml").returncode != 0


READS_AS = {
    "HighCPU": (0.905, "CPU above 90 %", "90.5%", "90 %"),
    "HighMemory": (0.8765, "Memory above 85 %", "87.65%", "85 %"),
    "HighGPUUtilization": (1, "GPU some-device busy above 95 %", "100%", "95 %"),
    "HighGPUMemory": (0.999, "GPU some-device memory above 90 %", "99.9%", "90 %"),
    "HighGPUTemperature": (91.23, "GPU some-device hotter than 85 °C", "91.2 °C", "85 °C"),
    "SlowStep": (75, "A step takes longer than 10 s", "1m 15s", "10 s"),
    "GradientExplosion": (123456, "Gradient norm above 100", "123.5k", "100"),
    "NonFiniteLoss": (3, "The loss is NaN or infinite", "3 within 60 s", "0"),
}  # fmt: skip


@needs_promtool
def test_what_people_read(tmp_path: Path) -> None:
    """Each alert's annotations as Prometheus itself renders them, against what a person would write."""
    assert READS_AS.keys() == BY_NAME.keys()
    write_rules(tmp_path / "rules.yml")
    tests = []
    for alert in ALERTS:
        value, summary, value_text, threshold = READS_AS[alert.name]
        labels = series_labels(alert)
        selector = ", ".join(f'{name}="{label}"' for name, label in labels.items())
        own = {"severity": alert.severity, "scope": alert.scope}
        tests.append(
            {
                "interval": "1s",
                "input_series": [
                    {"series": f"{alert.metric.sample_name}{{{selector}}}", "values": f"{value}+0x310"}
                ],
                "alert_rule_test": [
                    {
                        "alertname": alert.name,
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
                                },
                            }
                        ],
                    }
                ],
            }
        )
    document = {"rule_files": ["rules.yml"], "evaluation_interval": "1s", "tests": tests}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(document, allow_unicode=True))
    judged = promtool("test", "rules", tmp_path / "test.yml")
    assert judged.returncode == 0, judged.stdout + judged.stderr
