"""Settings: precedence, origins, and one clear message for each impossible value."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsinfra.config.resolve import dump_toml, resolve
from obsinfra.config.settings import Settings
from obsinfra.errors import ConfigError


def test_a_flag_beats_the_environment_beats_the_file_beats_the_run_beats_the_default(tmp_path: Path) -> None:
    file, run_config = tmp_path / "my.toml", tmp_path / "config.toml"
    run_config.write_text("batch_size = 1\nseed = 1\nepochs = 1\nlearning_rate = 1.0\n")
    file.write_text("batch_size = 2\nseed = 2\nepochs = 2\n")
    environ = {"BATCH_SIZE": "3", "OBSINFRA_SEED": "3"}

    resolved = resolve({"batch_size": "4"}, file=file, environ=environ, run_config=run_config)

    settings = resolved.settings
    assert (settings.batch_size, settings.seed, settings.epochs, settings.learning_rate) == (4, 3, 2, 1.0)
    assert resolved.origins["batch_size"] == "flag --batch-size"
    assert resolved.origins["seed"] == "env OBSINFRA_SEED"
    assert resolved.origins["epochs"] == f"file {file}"
    assert resolved.origins["learning_rate"].startswith("run ")
    assert resolved.origins["clip_norm"] == "default"


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("MODEL_NAME", "digits", "model_name", "digits"),
        ("BATCH_SIZE", "8", "batch_size", 8),
        ("LEARNING_RATE", "0.5", "learning_rate", 0.5),
        ("NUM_EPOCHS", "9", "epochs", 9),
        ("DISABLE_GPU", "1", "disable_gpu", True),
        ("DISABLE_MONITORING", "true", "disable_monitoring", True),
        ("DISABLE_BACKUPS", "yes", "disable_backups", True),
        ("DISABLE_TESTING", "on", "disable_testing", True),
        ("LOG_LEVEL", "debug", "log_level", "debug"),
        ("OUTPUT_DIR", "/x", "output_dir", Path("/x")),
        (
            "OBSINFRA_THRESHOLDS",
            "gpu_temperature=80,cpu=70",
            "thresholds",
            {"gpu_temperature": 80, "cpu": 70},
        ),
        (
            "OBSINFRA_ALERTS",
            "gpu_idle.enabled=false,cpu.severity=info,memory.for_seconds=2.5",
            "alerts",
            {"gpu_idle": {"enabled": False}, "cpu": {"severity": "info"}, "memory": {"for_seconds": 2.5}},
        ),
        ("OBSINFRA_STOP_SIGNALS", "SIGTERM,SIGUSR1", "stop_signals", ("SIGTERM", "SIGUSR1")),
    ],
)
def test_the_documented_environment_variables_are_read(
    variable: str, value: str, field: str, expected: object
) -> None:
    resolved = resolve({}, environ={variable: value})
    assert getattr(resolved.settings, field) == expected
    assert resolved.origins[field] == f"env {variable}"


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"batch_size": "0"}, ["batch_size", "0", "greater than or equal to 1"]),
        ({"learning_rate": "-1"}, ["learning_rate", "-1", "greater than 0"]),
        ({"learning_rate": "nan"}, ["learning_rate", "nan"]),
        ({"epochs": "many"}, ["epochs", "many", "integer"]),
        ({"precision": "fp8"}, ["precision", "fp8", "bf16"]),
        ({"stop_signals": "SIGKILL"}, ["SIGKILL"]),
        ({"thresholds": "gpu_heat=3"}, ["gpu_heat", "gpu_temperature"]),
        ({"alerts": {"cpu": {"for": 3}}}, ["unknown field 'for'", "for_seconds"]),
        ({"alerts": {"gpu_heat": {"threshold": 3}}}, ["unknown alert 'gpu_heat'", "gpu_temperature"]),
        ({"alerts": {"cpu": 3}}, ["alerts.cpu = 3", "a table"]),
        ({"alerts": {"cpu": {"severity": "loud"}}}, ["cpu.severity = loud", "info, warning, critical"]),
        ({"alerts": {"cpu": {"window_seconds": 60}}}, ["cpu.window_seconds", "no window", "average"]),
        ({"alerts": {"data_share": {"window_seconds": 0}}}, ["data_share.window_seconds = 0", "from 10 to"]),
        (
            {"thresholds": {"cpu": 70}, "alerts": {"cpu": {"clear_threshold": 80}}},
            ["cpu.clear_threshold = 80", "at most the threshold, 70"],
        ),
        (
            {"alerts": {"gpu_idle": {"clear_threshold": 5, "threshold": 6}}},
            ["gpu_idle.clear_threshold = 5", "at least the threshold, 6"],
        ),
        ({"alerts": {"cpu": {"clear_threshold": "low"}}}, ["cpu.clear_threshold = low", "a finite number"]),
        (
            {"alerts": {"no_progress": {"clear_threshold": 3}}},
            ["no_progress.clear_threshold", "moves", "cpu"],
        ),
        (
            {"alerts": {"cpu": {"metric": "gpu_temperature"}}},
            ["cpu.metric = gpu_temperature", "docs/metrics.md", "perhaps obsinfra_gpu_temperature_celsius"],
        ),
        (
            {"alerts": {"cpu": {"metric": "obsinfra_step_duration_seconds"}}},
            ["cpu.metric = obsinfra_step_duration_seconds", "histogram", "a gauge or a counter"],
        ),
        (
            {"alerts": {"cpu": {"aggregation": "mean"}}},
            ["cpu.aggregation = mean", "average", "[alerts.cpu]"],
        ),
        ({"alerts": {"cpu": {"comparator": ">="}}}, ["cpu.comparator = >=", "one of >, <"]),
        ({"alerts": {"cpu": {"scope": "cluster"}}}, ["cpu.scope = cluster", "one of run, rank, device"]),
        ({"alerts": {"cpu": {"scope": "device"}}}, ["cpu.scope = device", "one of run, rank, host"]),
        ({"alerts": {"cpu": {"scope": "stack"}}}, ["cpu.scope = stack", "one of run, rank, host"]),
        ({"alerts": {"host_down": {"scope": "run"}}}, ["host_down.scope = run", "host, stack", "job, host"]),
        (
            {"alerts": {"host_down": {"action": "checkpoint"}}},
            ["host_down.action", "none", "speaks of no run"],
        ),
        (
            {"alerts": {"gpu_temperature": {"metric": "obsinfra_host_cpu_ratio", "threshold": 1}}},
            ["gpu_temperature.scope = device", "one of run, rank, host", "set scope"],
        ),
        (
            {"alerts": {"gpu_temperature": {"metric": "obsinfra_gpu_power_watts"}}},
            ["gpu_temperature", "the threshold is the table's, 85", "a threshold in W", "add threshold"],
        ),
        (
            {"alerts": {"cpu": {"aggregation": "increase", "window_seconds": 60}}},
            ["cpu.aggregation = increase", "with the gauge obsinfra_host_cpu_ratio", "average"],
        ),
        (
            {"alerts": {"nonfinite_loss": {"aggregation": "slope"}}},
            ["nonfinite_loss.aggregation = slope", "with the counter obsinfra_nonfinite_losses_total"],
        ),
        (
            {"alerts": {"cpu": {"aggregation": "average"}}},
            ["cpu.window_seconds", "a number from 1", "[alerts.cpu]"],
        ),
        (
            {"alerts": {"cpu": {"aggregation": "slope", "window_seconds": 5}}},
            ["cpu.window_seconds = 5", "a number from 10"],
        ),
        (
            {"alerts": {"cpu": {"aggregation": "ratio"}}},
            ["cpu.over", "the name of a metric"],
        ),
        (
            {"alerts": {"cpu": {"aggregation": "ratio", "over": "obsinfra_gpu_power_watts"}}},
            ["cpu.over", "the labels of obsinfra_host_cpu_ratio", "run, model, rank"],
        ),
        (
            {"alerts": {"cpu": {"aggregation": "ratio", "over": "obsinfra_host_cpu_ratio"}}},
            ["cpu.over", "another metric"],
        ),
        ({"alerts": {"cpu": {"floor": 3}}}, ["cpu.floor = 3", "no floor here", "multiple"]),
        ({"alerts": {"cpu": {"where": {"device": "0"}}}}, ["cpu.where", "none"]),
        (
            {"alerts": {"gpu_throttling": {"where": {"reason": 'a"} or up{x="'}}}},
            ["gpu_throttling.where", "letters, digits"],
        ),
        (
            {"alerts": {"data_share": {"where": {"run": "r1"}}}},
            ["data_share.where", "labels of obsinfra_phase_seconds_total: phase", "every run"],
        ),
        (
            {"alerts": {"data_share": {"metric": "obsinfra_phase_seconds", "where": {}}}},
            ["data_share.where", "labels of the part"],
        ),
        (
            {"alerts": {"sidecar_gone": {"aggregation": "against_peers", "threshold": 2}}},
            ["sidecar_gone.aggregation", "a metric of trainers", "up has no rank"],
        ),
        (
            {"alerts": {"sidecar_gone": {"where": {"job": "elsewhere"}}}},
            ["sidecar_gone.where", "trainers, hosts, sidecar"],
        ),
        ({"alerts": {"watchdog": {"metric": "obsinfra_step"}}}, ["watchdog.metric", "always fires"]),
        ({"alerts": {"disk_free": {"threshold_unit": "%"}}}, ["disk_free.threshold_unit = %", "MB, GB"]),
        (
            {"alerts": {"disk_free": {"threshold_unit": "MB"}}},
            ["the threshold is the table's, 2", "a threshold in MB"],
        ),
        (
            {"alerts": {"gradient_trend": {"recent_seconds": 900}}},
            ["gradient_trend.recent_seconds = 900", "less than the window of 900 s"],
        ),
        (
            {"thresholds": {"gradient_trend": 0.5}},
            ["threshold gradient_trend = 0.5", "against_past", "a number of 1 or more", "comparator"],
        ),
        (
            {"alerts": {"checkpoint_failures": {"threshold": -1}}},
            ["checkpoint_failures.threshold = -1", "a number of 0 or more"],
        ),
        ({"alerts": {"data_share": {"threshold": 120}}}, ["data_share.threshold = 120", "less than 100"]),
        ({"alerts": {"cpu": {"for_seconds": -1}}}, ["cpu.for_seconds = -1", "from 0 to"]),
        ({"alerts": {"cpu": {"action": "reboot"}}}, ["cpu.action = reboot", "none", "emergency_checkpoint"]),
        ({"alerts": {"cpu": {"enabled": "maybe"}}}, ["cpu.enabled = maybe", "true or false"]),
        ({"alerts": {"cpu": {"for_seconds": 1e12}}}, ["cpu.for_seconds", "from 0 to 3.16224e+07"]),
        ({"alerts": {"cpu": {"threshold": 10**400}}}, ["cpu.threshold", "a finite number"]),
        ({"thresholds": {"watchdog": 3}}, ["threshold watchdog = 3", "always fires"]),
        (
            {"alerts": {"cpu": {"action": "set_threshold"}}},
            ["cpu.action", "[policy.alerts.HighCPU]", "without key"],
        ),
        ({"alerts": {"sidecar_gone": {"action": "stop"}}}, ["sidecar_gone.action", "speaks of no run"]),
        ({"alerts": {"cpu": {"summary": ""}}}, ["cpu.summary", "text on one line"]),
        ({"alerts": {"cpu": {"summary": "a {{ $value }}"}}}, ["cpu.summary = a {{ $value }}", "$labels.run"]),
        ({"alerts": {"cpu": {"description": "x" * 401}}}, ["cpu.description", "1 to 400 characters"]),
        ({"alerts": {"cpu": {"runbook_url": "wiki/cpu"}}}, ["cpu.runbook_url = wiki/cpu", "https://"]),
        ({"alerts": {"cpu": {"runbook_url": 3}}}, ["cpu.runbook_url = 3", "https://"]),
        ({"metrics_port": "70000"}, ["metrics_port", "70000"]),
    ],
)
def test_an_impossible_value_is_named_with_its_origin_and_what_was_expected(
    flags: dict[str, str], names: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(flags, environ={})
    for name in names:
        assert name in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unknown_key_in_the_file_is_named_with_the_known_ones(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("batchsize = 3\n")
    with pytest.raises(ConfigError, match=r"unknown setting 'batchsize' in .*my\.toml.*batch_size"):
        resolve({}, file=file, environ={})


@pytest.mark.parametrize("content", [b"batch_size = [", b"\xff\xfe\x00"])
def test_a_malformed_file_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "my.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"my\.toml"):
        resolve({}, file=file, environ={})


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        resolve({}, file=tmp_path / "none.toml", environ={})


@given(
    st.builds(
        Settings,
        run=st.none() | st.text(max_size=20),
        data_path=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        seed=st.integers(0, 2**63 - 1),
        clip_norm=st.floats(0, 1e30),
        thresholds=st.dictionaries(st.sampled_from(["cpu", "memory"]), st.floats(-1e9, 1e9)),
        alerts=st.dictionaries(
            st.sampled_from(["data_share", "gpu_xid"]),
            st.fixed_dictionaries(
                {"enabled": st.booleans()},
                optional={
                    "window_seconds": st.floats(10, 1e6),
                    "severity": st.sampled_from(["info", "critical"]),
                },
            ),
        ),
        deterministic=st.booleans(),
    )
)
def test_config_toml_reads_back_to_the_same_settings(settings: Settings) -> None:
    assert Settings(**tomllib.loads(dump_toml(settings))) == settings


def test_a_resumed_run_does_not_take_over_where_it_was(tmp_path: Path) -> None:
    """It may have been in a container: another folder of runs, another address."""
    before = tmp_path / "config.toml"
    before.write_text('output_dir = "/runs"\nmetrics_host = "trainer"\nbatch_size = 7\n')
    settings = resolve({}, run_config=before, environ={}).settings
    assert settings.batch_size == 7
    assert (settings.output_dir, settings.metrics_host) == (Path("runs"), "127.0.0.1")


def test_a_clearing_threshold_is_held_against_the_threshold_that_is_set() -> None:
    settings = resolve(
        {"thresholds": {"gpu_temperature": 95}, "alerts": {"gpu_temperature": {"clear_threshold": 90}}},
        environ={},
    ).settings
    [hot] = [alert for alert in settings.alert_table() if alert.key == "gpu_temperature"]
    assert (hot.threshold, hot.clears_at) == (95, 90)
