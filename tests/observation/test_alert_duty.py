"""Who acts on an alert: the sidecar while its heartbeat is fresh, else this process, and never twice."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from obsinfra.alerting.evaluator import AlertStatus
from obsinfra.catalog.actions import CHECKPOINT, PAUSE
from obsinfra.catalog.alerts import BY_NAME
from obsinfra.control.command import Command
from obsinfra.observation.alert_duty import AlertDuty
from obsinfra.run.folder import HEARTBEAT_STALE_SECONDS, RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path / "run")
    found.create()
    return found


def firing(name: str, since: float = 100.0, **labels: str) -> AlertStatus:
    return AlertStatus(BY_NAME[name], labels, 1e6, "firing", since, since)


@pytest.fixture
def duty(folder: RunFolder) -> tuple[AlertDuty, list[Command]]:
    commands: list[Command] = []
    return AlertDuty(folder, commands.append), commands


Duty = tuple[AlertDuty, list[Command]]


def test_without_a_sidecar_a_firing_alert_becomes_its_action_once(duty: Duty) -> None:
    watch, commands = duty
    assert watch.mode() == "in-process"
    for _ in range(3):
        watch.consider([firing("GradientExplosion")])
    (command,) = commands
    assert (command.action, command.source, command.run) == ("emergency_checkpoint", "in-process", "run")
    assert command.reason == "alert GradientExplosion"


def test_a_pause_that_nobody_here_undoes_is_for_a_person_to_end(duty: Duty) -> None:
    """The trainer takes a pause with the argument `alert` for one that the end of an alert may end."""
    watch, commands = duty
    watch.consider([replace(firing("HighCPU"), alert=replace(BY_NAME["HighCPU"], action=PAUSE))])
    watch.consider([replace(firing("HighMemory"), alert=replace(BY_NAME["HighMemory"], action=CHECKPOINT))])
    assert [(command.action, dict(command.args)) for command in commands] == [
        ("pause", {}),
        ("checkpoint", {"alert": "HighMemory"}),
    ]


def test_an_alert_that_fires_anew_is_acted_on_anew(duty: Duty) -> None:
    watch, commands = duty
    watch.consider([firing("GradientExplosion", since=100.0)])
    watch.consider([])
    watch.consider([firing("GradientExplosion", since=200.0)])
    assert len({command.id for command in commands}) == 2


def test_pending_alerts_and_those_that_only_inform_are_not_acted_on(duty: Duty) -> None:
    watch, commands = duty
    pending = AlertStatus(BY_NAME["HighMemory"], {}, 1.0, "pending", 100.0, None)
    watch.consider([pending, firing("HighCPU")])
    assert commands == []


def test_an_alert_of_several_devices_at_one_moment_is_one_command(duty: Duty) -> None:
    """One id, which the channel obeys once; a device that follows later is a command of its own."""
    watch, commands = duty
    alerts = [firing("HighGPUTemperature", device="0"), firing("HighGPUTemperature", device="1")]
    watch.consider(alerts)
    assert len({command.id for command in commands}) == 1
    watch.consider([*alerts, firing("HighGPUTemperature", since=101.0, device="2")])
    assert len({command.id for command in commands}) == 2


def test_a_live_sidecar_acts_alone(folder: RunFolder, duty: Duty) -> None:
    watch, commands = duty
    folder.beat(time.time())
    watch.consider([firing("GradientExplosion")])
    assert watch.mode() == "sidecar"
    assert commands == []


def test_when_the_sidecar_dies_what_still_fires_is_acted_on_here(folder: RunFolder, duty: Duty) -> None:
    watch, commands = duty
    folder.beat(time.time())
    watch.consider([firing("GradientExplosion")])
    folder.beat(time.time() - HEARTBEAT_STALE_SECONDS - 1)
    for _ in range(2):
        watch.consider([firing("GradientExplosion")])
    assert [command.reason for command in commands] == ["alert GradientExplosion"]


def test_an_unreadable_heartbeat_is_no_sidecar(folder: RunFolder, duty: Duty) -> None:
    watch, commands = duty
    folder.heartbeat.write_text("{")
    watch.consider([firing("GradientExplosion")])
    assert len(commands) == 1
