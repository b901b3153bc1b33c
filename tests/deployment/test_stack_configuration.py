"""The committed configuration: valid for the real tools, routed as meant, and only its values replaced."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from stack_tools import needs_tool

from obsinfra.deployment.native_stack import RESEND
from obsinfra.deployment.stack_configuration import (
    SERVICES,
    TOKEN_PATH,
    ensure_token,
    find_stack_files,
    replaced,
    write_configuration,
)
from obsinfra.monitoring.recorder import WINDOW_SECONDS

TOP = Path(__file__).parents[2]
ADDRESSES = {"prometheus": "127.0.0.1:1", "alertmanager": "127.0.0.1:2", "sidecar": "[::1]:3"}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, check=False, cwd=TOP
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A state folder with the configuration written for `ADDRESSES`."""
    (tmp_path / "token").write_text("secret")
    write_configuration(tmp_path, ADDRESSES, tmp_path / "token", scrape_interval="1s")
    return tmp_path


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_repositorys_own_files_are_used() -> None:
    assert find_stack_files() == TOP


@needs_tool("promtool")
def test_promtool_accepts_the_committed_and_the_written_configuration(written: Path) -> None:
    for folder in (TOP, written):
        checked = run("promtool", "check", "config", folder / "prometheus/prometheus.yml")
        assert checked.returncode == 0, checked.stderr
        rules = sum(len(group["rules"]) for group in load(folder / "prometheus/rules/obsinfra.yml")["groups"])
        assert rules > 40 and f"SUCCESS: {rules} rules found" in checked.stdout


@needs_tool("amtool")
def test_amtool_accepts_the_committed_and_the_written_configuration(written: Path) -> None:
    for folder in (TOP, written):
        checked = run("amtool", "check-config", folder / "alertmanager/alertmanager.yml")
        assert checked.returncode == 0, checked.stderr


@needs_tool("amtool")
@pytest.mark.parametrize(
    "labels",
    [
        ["alertname=GradientExplosion", "severity=critical", "action=emergency_checkpoint", "run=r"],
        ["alertname=HighCPU", "severity=warning", "run=r"],
        ["alertname=HighGPUUtilization", "severity=info"],
    ],
    ids=["acts", "warns", "informs"],
)
def test_every_alert_reaches_the_sidecar_and_nobody_else_unless_set_up(labels: list[str]) -> None:
    routed = run("amtool", "config", "routes", "test", "--config.file=alertmanager/alertmanager.yml", *labels)
    assert routed.stdout.strip() == "sidecar", routed.stderr


def test_an_alert_that_asks_for_an_action_waits_for_nothing() -> None:
    [acting] = [
        route
        for route in load(TOP / "alertmanager/alertmanager.yml")["route"]["routes"]
        if route.get("matchers") == ['action!=""']
    ]
    assert (acting["receiver"], acting["group_wait"]) == ("sidecar", "0s")


def test_every_service_address_is_replaced_and_nothing_else(written: Path) -> None:
    """Replacing the values back gives the committed documents again, so nothing else can have changed."""
    back = {address: SERVICES[name] for name, address in ADDRESSES.items()}
    back[str(written / "token")] = TOKEN_PATH
    for name in ("prometheus/prometheus.yml", "alertmanager/alertmanager.yml"):
        text = (written / name).read_text()
        assert not any(address in text for address in (*SERVICES.values(), TOKEN_PATH)), name
        document = replaced(load(written / name), back)
        if name.startswith("prometheus"):
            assert document["global"] == {"scrape_interval": "1s", "evaluation_interval": "500ms"}
            assert document["scrape_configs"][0]["http_sd_configs"][0]["refresh_interval"] == "1s"
            document["global"] = load(TOP / name)["global"]
            document["scrape_configs"][0]["http_sd_configs"][0]["refresh_interval"] = "5s"
        assert document == load(TOP / name)
    rules = "prometheus/rules/obsinfra.yml"
    here = (written / rules).read_text().replace(f"http://{ADDRESSES['sidecar']}/", "http://127.0.0.1:9465/")
    assert here == (TOP / rules).read_text()  # the runbooks are where this stack's sidecar is


def test_without_an_interval_the_files_own_holds(tmp_path: Path) -> None:
    write_configuration(tmp_path, ADDRESSES, tmp_path / "token")
    assert (
        load(tmp_path / "prometheus/prometheus.yml")["global"]
        == load(TOP / "prometheus/prometheus.yml")["global"]
    )


@pytest.mark.parametrize(
    ("scrape", "evaluation"), [("1s", "500ms"), ("250ms", "125ms"), ("1m", "30000ms"), ("1ms", "1ms")]
)
def test_rules_are_evaluated_twice_as_often_as_values_are_scraped(
    tmp_path: Path, scrape: str, evaluation: str
) -> None:
    write_configuration(tmp_path, ADDRESSES, tmp_path / "token", scrape_interval=scrape)
    found = load(tmp_path / "prometheus/prometheus.yml")["global"]
    assert found == {"scrape_interval": scrape, "evaluation_interval": evaluation}


def test_peoples_first_message_waits_for_the_repetition_and_not_beyond_a_peak() -> None:
    """The repetition has what the sidecar did; what is over before the message is told to nobody."""
    intervals = load(TOP / "prometheus/prometheus.yml")["global"]
    scrape = float(intervals["scrape_interval"].removesuffix("s"))
    every = float(intervals["evaluation_interval"].removesuffix("ms")) / 1e3
    repeated = (int(RESEND.removesuffix("s")) // every + 1) * every  # at the first evaluation after that
    waits = load(TOP / "alertmanager/alertmanager.yml")["route"]["group_wait"]
    assert 2 * scrape <= repeated < int(waits.removesuffix("s")) < WINDOW_SECONDS
    command = load(TOP / "docker-compose.yml")["services"]["prometheus"]["command"]
    assert f"--rules.alert.resend-delay={RESEND}" in command


def test_only_whole_addresses_are_replaced() -> None:
    values = {"sidecar:9465": "127.0.0.1:7", TOKEN_PATH: "/secret"}
    document = {
        "url": "http://sidecar:9465/sd?x=sidecar:9465",
        "target": ["sidecar:9465", "my-sidecar:9465", "sidecar:94650", 9465],
        "other": "http://elsewhere:9465/sidecar:9465",
        "token": [TOKEN_PATH, TOKEN_PATH + ".bak"],
    }
    assert replaced(document, values) == {
        "url": "http://127.0.0.1:7/sd?x=sidecar:9465",
        "target": ["127.0.0.1:7", "my-sidecar:9465", "sidecar:94650", 9465],
        "other": "http://elsewhere:9465/sidecar:9465",
        "token": ["/secret", TOKEN_PATH + ".bak"],
    }


def test_rules_of_an_older_version_do_not_stay(tmp_path: Path) -> None:
    stale = tmp_path / "prometheus/rules/old.yml"
    stale.parent.mkdir(parents=True)
    stale.write_text("groups: []")
    write_configuration(tmp_path, ADDRESSES, tmp_path / "token")
    assert [path.name for path in stale.parent.iterdir()] == ["obsinfra.yml"]


def test_a_token_is_made_once_for_the_owner_alone(tmp_path: Path) -> None:
    path = ensure_token(tmp_path / "token")
    first = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert ensure_token(path).read_text() == first
    assert ensure_token(tmp_path / "another").read_text() != first
