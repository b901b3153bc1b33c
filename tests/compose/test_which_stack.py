"""Containers or processes: what `obsinfra up` chooses, and what it says where the choice cannot be had."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from terminal import Terminal

from obsinfra.config.notify import Notify
from obsinfra.config.settings import Settings
from obsinfra.deployment import which_stack
from obsinfra.deployment.compose_stack import ComposeStack, engine_problem
from obsinfra.deployment.native_stack import NativeStack
from obsinfra.deployment.ports import DEFAULT_COMPOSE_PORTS, wanted_ports
from obsinfra.deployment.stack_state import StackUnavailable
from obsinfra.deployment.which_stack import WhichStack, reachable_settings
from obsinfra.errors import ConfigError, ObsinfraError, UserError


def put_docker(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A `docker` that answers as the script does, and nothing else on PATH but the shell's own programs."""
    (folder / "bin").mkdir()
    (folder / "bin/docker").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin/docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")


DEAD_ENGINE = "echo 'Cannot connect to the Docker daemon at unix:///x.sock' >&2; exit 1"
NO_COMPOSE = (
    'if [ "$1" = version ]; then echo 28.0; else echo "unknown command: docker compose" >&2; exit 1; fi'
)
ALL_IS_WELL = 'case "$1" in version) echo 28.0;; compose) echo 2.40.3;; esac'


@pytest.mark.parametrize(
    ("script", "way", "why"),
    [
        (DEAD_ENGINE, "native", "no Docker engine answers (Cannot connect to the Docker daemon"),
        (NO_COMPOSE, "native", "docker has no Compose plugin"),
        (ALL_IS_WELL, "compose", "a Docker engine answers"),
    ],
    ids=["dead-engine", "no-compose", "all-well"],
)
def test_containers_where_an_engine_with_compose_answers_processes_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, way: str, why: str
) -> None:
    put_docker(tmp_path, monkeypatch, script)
    stack = WhichStack(tmp_path / "runs")
    chosen, reason = stack.choose()
    assert chosen == way and why in reason
    assert stack.choose("native")[0] == "native" and stack.choose("compose")[0] == "compose"


def test_without_docker_it_is_native_and_forcing_containers_says_what_is_missing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert engine_problem() == "docker not found on PATH"
    assert WhichStack(tmp_path / "runs").choose()[0] == "native"
    up = Terminal("up", capsys, monkeypatch)
    refused = up("--compose", "--output-dir", tmp_path / "runs")
    assert refused.code == 2 and "docker not found on PATH" in refused.err and "--native" in refused.err
    refused = up("--native", "--profile", "dev", "--output-dir", tmp_path / "runs")
    assert refused.code == 2 and "profile 'dev' without containers" in refused.err
    assert not (tmp_path / "runs").exists()


def test_a_running_stack_is_not_joined_by_one_of_the_other_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sidecars over one folder of runs would both act."""
    stack = WhichStack(tmp_path / "runs")
    monkeypatch.setattr(which_stack.NativeStack, "status", lambda self: object())
    assert stack.choose() == ("native", "it runs already")
    with pytest.raises(UserError, match=r"runs already, natively.*obsinfra down"):
        stack.up("compose")


def test_nothing_is_up_and_down_has_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--output-dir", tmp_path)
    assert (
        "nothing is up" in (shown := Terminal("stack", capsys, monkeypatch)(*where)).out and shown.code == 1
    )
    assert "nothing was up" in Terminal("down", capsys, monkeypatch)(*where).out
    assert not (tmp_path / ".stack").exists()


def recorded(output_dir: Path, trainer_host: str | None) -> ComposeStack:
    stack = ComposeStack(output_dir / ".stack")
    stack.folder.mkdir(parents=True)
    document = {
        "project": "obsinfra-x",
        "output_dir": str(output_dir),
        "started": "2026-01-01T00:00:00.000Z",
        "files": "/nowhere",
        "profiles": [],
        "ports": {},
        "trainer_host": trainer_host,
    }
    (stack.folder / "compose.json").write_text(json.dumps(document))
    return stack


def test_a_trainer_listens_where_the_started_containers_reach_it_unless_told_otherwise(
    tmp_path: Path,
) -> None:
    recorded(tmp_path, "127.0.0.2")
    settings = Settings(output_dir=tmp_path)
    assert reachable_settings(settings).metrics_host == "127.0.0.2"
    chosen = Settings(output_dir=tmp_path, metrics_host="127.0.0.3")
    assert reachable_settings(chosen) is chosen
    elsewhere = Settings(output_dir=tmp_path / "other")
    assert reachable_settings(elsewhere) is elsewhere


def test_what_asks_the_stack_asks_one_in_containers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_docker(tmp_path, monkeypatch, """echo '{"Service": "alertmanager", "State": "running"}'""")
    stack = recorded(tmp_path / "runs", None)
    record = json.loads((stack.folder / "compose.json").read_text())
    record["ports"] = {"alertmanager": 1, "prometheus": 2}
    (stack.folder / "compose.json").write_text(json.dumps(record))
    alerts = Terminal("alerts", capsys, monkeypatch)
    for command, address in (("list", "127.0.0.1:1"), ("test", "127.0.0.1:1"), ("history", "127.0.0.1:2")):
        asked = alerts(command, "--output-dir", tmp_path / "runs")
        assert asked.code == 2 and f"no answer from {'Pro' if command == 'history' else 'Al'}" in asked.err
        assert address in asked.err


@pytest.mark.parametrize("host", [None, "192.0.2.1"], ids=["docker-desktop", "bridge-is-gone"])
def test_a_trainer_stays_on_loopback_where_no_bridge_is(tmp_path: Path, host: str | None) -> None:
    recorded(tmp_path, host)
    settings = Settings(output_dir=tmp_path)
    assert reachable_settings(settings) is settings


def test_a_record_whose_engine_is_gone_counts_as_down_but_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_docker(tmp_path, monkeypatch, DEAD_ENGINE)
    stack = recorded(tmp_path / "runs", None)
    assert stack.status() is None
    with pytest.raises(StackUnavailable, match="Cannot connect to the Docker daemon"):
        stack.down()
    assert stack.recorded()


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    stack = recorded(tmp_path, None)
    (stack.folder / "compose.json").write_text("[]")
    with pytest.raises(ObsinfraError, match=r"compose\.json is not what 'obsinfra up' wrote"):
        stack.status()


def test_when_compose_fails_its_own_words_are_shown_and_what_had_started_is_taken_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    script = f"""
echo "$*" >> {calls}
case "$*" in
  version*) echo 28.0 ;;
  "compose version"*) echo 2.40.3 ;;
  network*) exit 1 ;;
  *" up "*) echo 'pull access denied for grafana/grafana' >&2; exit 1 ;;
  *" ps "*) echo '{{"Service": "grafana", "State": "exited", "Health": ""}}' ;;
  *" logs "*) echo 'panic: no such dashboard' ;;
esac"""
    put_docker(tmp_path, monkeypatch, script)
    stack = ComposeStack(tmp_path / "runs/.stack")
    with pytest.raises(StackUnavailable) as failed:
        stack.up(tmp_path / "runs", services=["grafana"])
    assert "pull access denied" in str(failed.value) and "panic: no such dashboard" in str(failed.value)
    assert " down " in calls.read_text().splitlines()[-1]
    assert not stack.recorded()
    assert NativeStack(tmp_path / "runs/.stack").status() is None


def test_a_port_taken_meanwhile_gives_way_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding a port free and a container listening on it are seconds."""
    calls = tmp_path / "calls"
    script = f"""
case "$*" in
  *" up "*)
    echo up >> {calls}
    [ "$(wc -l < {calls})" -gt 1 ] || {{ echo 'Bind failed: port is already allocated' >&2; exit 1; }} ;;
  *" ps "*) echo '{{"Service": "prometheus", "State": "running", "Health": "healthy"}}' ;;
  *) echo "{{}}" ;;
esac"""
    put_docker(tmp_path, monkeypatch, script)
    people = Notify.model_validate({"webhook": {"url": "http://127.0.0.1:1/hook"}})
    info = ComposeStack(tmp_path / "runs/.stack").up(tmp_path / "runs", notify=people)
    # A message leads to this stack's own Grafana and Jaeger, wherever they listen now.
    messages = (tmp_path / "runs/.stack/compose/alertmanager/templates/obsinfra-slack.tmpl").read_text()
    for port, path in (
        (info.ports.grafana, "d/obsinfra-run?"),
        (info.ports.jaeger, "search?service=obsinfra"),
    ):
        assert f"<http://127.0.0.1:{port}/{path}" in messages
    assert info.services == {"prometheus": "running, healthy"} and not info.already_up
    assert calls.read_text().count("up") == 2
    assert ComposeStack(tmp_path / "runs/.stack").up(tmp_path / "runs").already_up


def test_ports_begin_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBSINFRA_PORT_GRAFANA", "13000")
    monkeypatch.setenv("OBSINFRA_PORT_JAEGER", "")
    assert wanted_ports(DEFAULT_COMPOSE_PORTS) == replace(DEFAULT_COMPOSE_PORTS, grafana=13_000)
    monkeypatch.setenv("OBSINFRA_PORT_GRAFANA", "70000")
    with pytest.raises(ConfigError, match=r"OBSINFRA_PORT_GRAFANA='70000'"):
        wanted_ports(DEFAULT_COMPOSE_PORTS)


def test_what_it_writes_is_private_as_a_whole_and_readable_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's user is another one; on the host the folder above lets nobody in."""
    put_docker(tmp_path, monkeypatch, 'case "$*" in *" up "*) exit 1;; *" ps "*) ;; *) echo "{}";; esac')
    secret = tmp_path / "password"
    secret.write_text("s3cret")
    settings = Settings(
        notify={
            "email": {
                "smarthost": "mail.example.org:587",
                "from": "a@example.org",
                "to": "b@example.org",
                "auth_username": "a",
                "auth_password_file": str(secret),
            }
        }
    )
    stack = ComposeStack(tmp_path / "runs/.stack")
    with pytest.raises(StackUnavailable):
        stack.up(tmp_path / "runs", notify=settings.notify)
    assert stack.folder.stat().st_mode & 0o777 == 0o700
    routes = (stack.folder / "alertmanager/alertmanager.yml").read_text()
    assert str(secret) not in routes and "/run/notify/notify.email.auth_password_file" in routes
    assert "http://sidecar:9465/webhook" in routes and "s3cret" not in routes
    copied = stack.folder / "notify/notify.email.auth_password_file"
    assert copied.read_text() == "s3cret"
    for path in stack.folder.glob("*/**/*"):
        assert path.stat().st_mode & 0o777 == (
            0o755 if path.is_dir() else 0o444 if path.parent.name in ("secrets", "notify") else 0o644
        ), path
    environment = (stack.folder / "stack.env").read_text()
    assert "s3cret" not in environment and "OBSINFRA_UID=" in environment
