"""The native stack with the real Prometheus, Alertmanager and sidecar on free loopback ports."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil
import pytest
from stack_tools import get_json, needs_stack, processes_naming
from waiting import wait_for

from obsinfra.catalog.alert_changes import alert_table
from obsinfra.catalog.alerts import ALERTS
from obsinfra.control.alertmanager import Alertmanager, AlertmanagerError
from obsinfra.deployment import native_stack
from obsinfra.deployment.native_stack import NativeStack, StackInfo
from obsinfra.deployment.ports import StackPorts
from obsinfra.deployment.stack_state import StackUnavailable
from obsinfra.errors import ConfigError, ObsinfraError, UserError

ANY_PORTS = StackPorts(0, 0, 0)

pytestmark = [pytest.mark.stack]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def stack(runs: Path) -> Iterator[NativeStack]:
    """A stack that is down, and will be down again whatever the test did."""
    stack = NativeStack(runs / ".stack")
    yield stack
    stack.down()
    assert processes_naming(runs) == []


def up(stack: NativeStack, runs: Path, **options: object) -> StackInfo:
    return stack.up(runs, ports=ANY_PORTS, scrape_interval="1s", **options)  # type: ignore[arg-type]


@needs_stack
def test_up_brings_rules_targets_and_alertmanager_together(stack: NativeStack, runs: Path) -> None:
    info = up(stack, runs)
    groups = get_json(f"{info.prometheus_url}/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert [rule["name"] for rule in rules if rule["type"] == "alerting"] == [alert.name for alert in ALERTS]
    assert {group["name"]: group["interval"] for group in groups} == {
        "obsinfra": 0.5,
        "obsinfra-dashboards": 0.5,
    }
    known = wait_for(
        lambda: get_json(f"{info.prometheus_url}/api/v1/alertmanagers")["data"]["activeAlertmanagers"],
        "Prometheus knows its Alertmanager",
    )
    assert [one["url"] for one in known] == [f"{info.alertmanager_url}/api/v2/alerts"]

    def all_scraped() -> bool:
        targets = get_json(f"{info.prometheus_url}/api/v1/targets")["data"]["activeTargets"]
        healthy = {target["labels"]["job"] for target in targets if target["health"] == "up"}
        return healthy == {"sidecar", "prometheus", "alertmanager"}

    wait_for(all_scraped, "Prometheus scrapes the sidecar, itself and Alertmanager")

    def asked(query: str) -> list[dict[str, Any]]:
        url = f"{info.prometheus_url}/api/v1/query?{urlencode({'query': query})}"
        found: list[dict[str, Any]] = get_json(url)["data"]["result"]
        return found

    born = [info.children[name].process for name in ("alertmanager", "prometheus")]
    assert None not in born and born == sorted(born, key=lambda process: process.created)
    wait_for(
        lambda: asked("count_over_time(prometheus_notifications_errors_total[1m]) >= 3"),
        "Prometheus knows its Alertmanager and has looked at its own counters since",
    )
    assert not asked('ALERTS{alertname="PrometheusDroppingAlerts"}')


@needs_stack
def test_everything_listens_on_loopback_only(stack: NativeStack, runs: Path) -> None:
    info = up(stack, runs)
    for name, child in info.children.items():
        assert child.process is not None
        heard = {
            connection.laddr
            for connection in psutil.Process(child.process.pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        assert heard == {("127.0.0.1", child.port)}, name


@needs_stack
def test_secrets_are_for_the_owner_alone(stack: NativeStack, runs: Path) -> None:
    info = up(stack, runs)
    assert info.token_file.stat().st_mode & 0o777 == 0o600
    assert info.state_dir.stat().st_mode & 0o777 == 0o700
    assert len(info.token_file.read_text().strip()) >= 32


@needs_stack
def test_up_twice_is_one_stack_and_down_leaves_nothing(stack: NativeStack, runs: Path) -> None:
    first = up(stack, runs)
    second = up(stack, runs)
    assert (first.already_up, second.already_up) == (False, True)
    assert second == first
    assert second.children == first.children
    assert sorted(stack.down()) == ["alertmanager", "prometheus", "sidecar", "supervisor"]
    assert stack.status() is None
    assert processes_naming(runs) == []
    assert stack.down() == []


@needs_stack
def test_two_at_once_start_one_stack(stack: NativeStack, runs: Path) -> None:
    found: list[StackInfo] = []
    threads = [
        threading.Thread(target=lambda: found.append(up(NativeStack(stack.state_dir), runs)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert sorted(info.already_up for info in found) == [False, True]


@needs_stack
def test_data_and_token_outlive_a_restart_of_the_stack(stack: NativeStack, runs: Path) -> None:
    token = up(stack, runs).token_file.read_text()
    stack.down()
    assert (stack.state_dir / "prometheus/data").is_dir()
    info = up(stack, runs)
    assert not info.already_up
    assert info.token_file.read_text() == token


@needs_stack
def test_alertmanager_is_soon_told_what_fires_since_the_first_moment(stack: NativeStack, runs: Path) -> None:
    """Prometheus knows no Alertmanager in its first seconds, and a killed Alertmanager has forgotten all."""
    info = up(stack, runs)
    asked = Alertmanager(info.alertmanager_url)

    def told() -> bool:
        with suppress(AlertmanagerError):
            return "Watchdog" in {alert.labels["alertname"] for alert in asked.alerts()}
        return False

    wait_for(told, "Alertmanager is told of what fires always", 40)
    running = info.children["alertmanager"].process
    assert running is not None
    os.kill(running.pid, signal.SIGKILL)
    wait_for(lambda: not told(), "it is gone")
    wait_for(told, "it is told again", 40)


@needs_stack
@pytest.mark.parametrize("name", ["sidecar", "alertmanager", "prometheus"])
def test_a_program_that_dies_is_started_again(stack: NativeStack, runs: Path, name: str) -> None:
    before = up(stack, runs).children[name]
    assert before.process is not None
    os.kill(before.process.pid, signal.SIGKILL)

    def restarted() -> bool:
        info = stack.status()
        assert info is not None
        after = info.children[name]
        return after.restarts == 1 and after.process is not None and after.process != before.process

    wait_for(restarted, f"{name} runs again")
    paths = {"sidecar": "/healthz", "alertmanager": "/-/ready", "prometheus": "/-/ready"}

    def answers() -> bool:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", before.port)) != 0:
                return False
            client.sendall(f"GET {paths[name]} HTTP/1.0\r\n\r\n".encode())
            return b" 200 " in client.recv(64)

    wait_for(answers, f"{name} answers on its old port")


@needs_stack
def test_a_taken_port_gives_way_to_the_next_free_one(stack: NativeStack, runs: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = int(other.getsockname()[1])
        info = stack.up(runs, ports=StackPorts(prometheus=taken, alertmanager=0, sidecar=taken))
        assert len({taken, info.ports.prometheus, info.ports.sidecar, info.ports.alertmanager}) == 4
        assert info.prometheus_url == f"http://127.0.0.1:{info.ports.prometheus}"
        groups = get_json(f"{info.prometheus_url}/api/v1/rules")["data"]["groups"]
        assert [group["name"] for group in groups] == ["obsinfra", "obsinfra-dashboards"]


@needs_stack
def test_children_do_not_outlive_a_killed_supervisor(stack: NativeStack, runs: Path) -> None:
    up(stack, runs)
    [supervisor] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "obsinfra.deployment.supervisor" in (process.info["cmdline"] or ())
        and str(stack.state_dir) in process.info["cmdline"]
    ]
    supervisor.kill()
    wait_for(lambda: processes_naming(runs) == [], "nothing of the stack is left")
    assert stack.status() is None
    assert not up(stack, runs).already_up


@needs_stack
def test_up_removes_children_that_a_killed_supervisor_left(
    stack: NativeStack, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel does not end them, the recorded processes are ended by the next up or down."""
    monkeypatch.setattr(native_stack, "DOWN_SECONDS", 1.0)
    info = up(stack, runs)
    prometheus = info.children["prometheus"].process
    assert prometheus is not None
    os.kill(prometheus.pid, signal.SIGSTOP)  # a stopped process does not hear SIGTERM
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or ()
        if "obsinfra.deployment.supervisor" in command and str(stack.state_dir) in command:
            process.kill()
    wait_for(lambda: stack.status() is None, "the supervisor is gone")
    assert prometheus.alive()
    again = up(stack, runs)
    assert not prometheus.alive()
    assert again.children["prometheus"].process != prometheus


@needs_stack
def test_a_users_thresholds_reach_prometheus(stack: NativeStack, runs: Path) -> None:
    info = up(stack, runs, alerts=alert_table({"gradient_norm": 7.5}))
    [group, _] = get_json(f"{info.prometheus_url}/api/v1/rules")["data"]["groups"]
    queries = {rule["name"]: rule["query"] for rule in group["rules"]}
    assert queries["GradientExplosion"] == "obsinfra_gradient_norm_peak > 7.5"


def test_missing_binaries_are_named_with_the_fix(
    stack: NativeStack, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StackUnavailable) as caught:
        up(stack, runs)
    assert "Prometheus and Alertmanager not found on PATH" in str(caught.value)
    assert "apt install prometheus prometheus-alertmanager" in str(caught.value)
    assert caught.value.exit_code == 2
    assert stack.status() is None


@needs_stack
def test_a_program_that_does_not_start_is_shown_with_its_last_words(
    stack: NativeStack, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "bin" / "prometheus"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'the disk of this Prometheus is on fire' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(StackUnavailable) as caught:
        up(stack, runs)
    assert "prometheus did not become ready" in str(caught.value)
    assert "the disk of this Prometheus is on fire" in str(caught.value)
    assert processes_naming(runs) == []


@pytest.mark.parametrize("interval", ["", "0s", "5", "fast", "-1s", "1h30"])
def test_an_impossible_interval_is_refused_before_anything_starts(
    stack: NativeStack, runs: Path, interval: str
) -> None:
    with pytest.raises(UserError, match="scrape interval"):
        stack.up(runs, scrape_interval=interval)
    assert not runs.exists()


@needs_stack
@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_an_address_that_is_not_this_machines_is_refused(stack: NativeStack, runs: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        up(stack, runs, host=host)


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match="cannot use"):
        NativeStack(tmp_path / "runs" / ".stack").up(tmp_path / "runs")


def test_down_without_any_stack_does_nothing(tmp_path: Path) -> None:
    assert NativeStack(tmp_path / ".stack").down() == []
    assert list(tmp_path.iterdir()) == []


def test_down_never_stops_a_process_that_inherited_a_recorded_pid(tmp_path: Path) -> None:
    """The test's own pid with another creation time, as after a reboot: it must survive `down`."""
    state = tmp_path / ".stack"
    state.mkdir()
    stranger = {"pid": os.getpid(), "created": 1.0}
    child = {"process": stranger, "restarts": 0, "port": 1, "url": "http://127.0.0.1:1"}
    plan = {"state_dir": str(state), "output_dir": str(tmp_path), "started": "", "programs": []}
    document = {"version": 1, "plan": plan, "supervisor": stranger, "children": {"prometheus": child}}
    (state / "stack.json").write_text(json.dumps(document))
    assert NativeStack(state).down() == []


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 1}', '{"plan": 3, "supervisor": {}, "children": {}}']
)
def test_a_damaged_state_file_is_named_and_stops_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "stack.json").write_text(content)
    for ask in (NativeStack(tmp_path).status, NativeStack(tmp_path).down):
        with pytest.raises(ObsinfraError, match=r"stack\.json is not what a supervisor wrote"):
            ask()
