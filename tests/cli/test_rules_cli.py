"""`obsinfra rules` and `obsinfra docs` as typed: exit codes, what is said, and what is left alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stack_versions import StackVersion, each_version
from typer.testing import CliRunner, Result

from obsinfra.catalog.alert_changes import alert_table
from obsinfra.cli.main import app
from obsinfra.errors import UserError

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt install prometheus)"
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_what_is_written_is_up_to_date_until_a_setting_changes(tmp_path: Path) -> None:
    assert run("rules", "check").exit_code == 1  # nothing there yet
    assert run("rules", "write").exit_code == 0
    assert run("rules", "check").exit_code == 0
    assert "is up to date" in run("rules", "diff").stdout
    (tmp_path / "obsinfra.toml").write_text(
        "[thresholds]\ngpu_temperature = 80\n"
        '[alerts.cpu]\nseverity = "info"\n'
        "[alerts.gpu_temperature]\nclear_threshold = 60.5\n"
        "[alerts.gpu_idle]\nenabled = false\n"
        '[alerts.step_time]\nsummary = "{{ $labels.run }}: a step over {threshold} s"\n'
        'description = "Ask Anna."\nrunbook_url = "https://wiki.example.org/slow"\n'
    )
    changed = run("rules", "diff")
    assert changed.exit_code == 1
    for line in (
        "-      obsinfra_gpu_temperature_celsius > 85",
        "+      obsinfra_gpu_temperature_celsius > 80",
        "-      or obsinfra_gpu_temperature_celsius > 75",
        "+      or obsinfra_gpu_temperature_celsius > 60.5",
        "-  - alert: GPUIdle",
        "+      severity: info",
        "+      summary: '{{ $labels.run }}: a step over 10 s'",
        "+      description: Ask Anna.",
        "+      runbook_url: https://wiki.example.org/slow",
    ):
        assert line in changed.stdout
    stale = run("rules", "check")
    assert stale.exit_code == 1 and "obsinfra rules write" in stale.stdout
    run("rules", "write")
    assert run("rules", "check").exit_code == 0


ANOTHER_CONDITION = """\
[alerts.gpu_temperature]
metric = "obsinfra_gpu_power_watts"
aggregation = "average"
comparator = "<"
window_seconds = 300
threshold = 0.2
threshold_unit = "kW"
scope = "rank"
"""


def test_another_condition_is_shown_and_written(tmp_path: Path) -> None:
    run("rules", "write")
    (tmp_path / "obsinfra.toml").write_text(ANOTHER_CONDITION)
    changed = run("rules", "diff")
    assert changed.exit_code == 1
    for line in (
        "-      obsinfra_gpu_temperature_celsius > 85",
        "+      avg_over_time(obsinfra_gpu_power_watts[300s]) < 200",
        "+      and obsinfra_gpu_power_watts",
        "-      scope: device",
        "+      scope: rank",
        "+      threshold: 0.2 kW",
    ):
        assert line in changed.stdout
    assert "below 0.2 kW" in changed.stdout  # not hotter than anything
    assert run("rules", "write").exit_code == 0
    assert run("rules", "check").exit_code == 0
    assert (
        "avg_over_time(obsinfra_gpu_power_watts" in (tmp_path / "prometheus/rules/obsinfra.yml").read_text()
    )


@each_version
def test_another_condition_is_tested(tmp_path: Path, version: StackVersion) -> None:
    [promtool] = version.require("promtool")
    (tmp_path / "obsinfra.toml").write_text(ANOTHER_CONDITION)
    done = run("rules", "test", "--promtool", promtool)
    assert done.exit_code == 0, done.stdout


def test_a_condition_that_cannot_be_is_refused_with_exit_code_2(
    tmp_path: Path,
) -> None:
    (tmp_path / "obsinfra.toml").write_text('[alerts.cpu]\naggregation = "mean"\n')
    done = subprocess.run(
        [sys.executable, "-m", "obsinfra.cli", "rules", "write"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and not (tmp_path / "prometheus").exists()
    for said in (
        "alert cpu.aggregation = mean",
        "expected one of value, average",
        "fix: correct it under [alerts.cpu]",
    ):
        assert said in " ".join(done.stderr.split())


@pytest.mark.parametrize("command", ["write", "check", "diff"])
def test_a_file_that_is_none_is_no_crash(tmp_path: Path, command: str) -> None:
    (tmp_path / "rules.yml").write_bytes(b"\xff")
    folder = run("rules", command, "--file", "/")
    assert isinstance(folder.exception, UserError) if command == "write" else folder.exit_code == 1
    bytes_ = run("rules", command, "--file", "rules.yml")
    assert bytes_.exit_code == (0 if command == "write" else 1)
    assert isinstance(bytes_.exception, SystemExit | None)


@needs_promtool
def test_the_rules_of_the_users_settings_are_tested(tmp_path: Path) -> None:
    (tmp_path / "obsinfra.toml").write_text("[alerts.watchdog]\nenabled = false\n[thresholds]\ncpu = 42\n")
    done = run("rules", "test")
    assert done.exit_code == 0, done.stdout
    enabled = len(alert_table({}, {"watchdog": {"enabled": False}}))
    assert f"{enabled} alerts: rules valid, each fires, waits and resolves (promtool, version" in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "obsinfra.toml"]


def test_a_promtool_that_refuses_is_reported(tmp_path: Path) -> None:
    refusing = tmp_path / "promtool"
    refusing.write_text("#!/bin/sh\necho 'rule 3 [is] wrong' >&2\nexit 3\n")
    refusing.chmod(0o755)
    done = run("rules", "test", "--promtool", str(refusing))
    assert done.exit_code == 1 and "rule 3 [is] wrong" in done.stdout


def test_pages_are_written_and_a_stale_one_is_named(tmp_path: Path) -> None:
    assert run("docs", "check").exit_code == 1
    assert run("docs", "write").exit_code == 0
    assert run("docs", "check").exit_code == 0
    page = tmp_path / "docs" / "alerts.md"
    page.write_text(page.read_text() + "more")
    stale = run("docs", "check")
    assert stale.exit_code == 1 and "alerts.md" in stale.stdout and "metrics.md" not in stale.stdout
