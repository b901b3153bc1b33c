"""Real faults in a real trainer, seen by a real Prometheus: the run is saved, and people get a mail."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from people import MailServer, mail_server
from stack_tools import needs_stack
from waiting import wait_for

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.manifest import Manifest
from obsinfra.catalog.alert_changes import alert_table
from obsinfra.config.notify import Email, Notify
from obsinfra.control.journal import Journal
from obsinfra.deployment.native_stack import NativeStack, StackInfo
from obsinfra.deployment.ports import StackPorts
from obsinfra.run.folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.stack, needs_stack, pytest.mark.timeout(400)]

CHANGES = {
    "step_time": {"threshold": 3},
    "memory_creep": {"threshold": 3000, "window_seconds": 10, "for_seconds": 0, "action": "checkpoint"},
    "cpu": {"enabled": False},
    "memory": {"enabled": False},
}
"""Waits and windows short enough for a test; the conditions are the table's own."""

DISK_CHANGES = CHANGES | {
    "disk_filling": {"window_seconds": 10, "for_seconds": 0, "action": "emergency_checkpoint"},
}
"""For a stack of its own: within so short a window whatever else writes to this disk makes the alert fire,
and a run that was just saved because of it is not saved again because of another.
"""

POLICY = {
    "cool_down": {"checkpoint": 0},
    "alerts": {
        "HighGPUTemperature": {
            "escalate": [
                {"action": "pause", "after_minutes": 0.02, "undo": True},
                {"action": "stop", "after_minutes": 60},
            ]
        }
    },
}
"""A pause that comes soon; the stop after it does not. And no cool-down: on a busy machine a trainer's memory
still grows after seconds, MemoryCreep has it saved, and SlowStep would have to content itself with that.
"""

PASSWORD = "only for this test"


@dataclass
class Scene:
    """The stack that is up, where its runs are, and the mail server its people have."""

    info: StackInfo
    runs: Path
    mail: MailServer

    def mailed(self, alert: str, run: str) -> str | None:
        """The text of the first mail about an alert of a run."""
        for mail in list(self.mail.mails):
            body = mail.get_body(("plain",))
            text = body.get_content() if body is not None else ""
            if run in text and alert in f"{mail['subject']} {text}":
                return text
        return None

    def value(self, query: str) -> float:
        """What Prometheus answers to a query for one number; 0 where there is none."""
        asked = httpx.get(
            f"{self.info.prometheus_url}/api/v1/query", params={"query": query}, trust_env=False
        ).raise_for_status()
        found = asked.json()["data"]["result"]
        return float(found[0]["value"][1]) if found else 0.0

    def commanded(self, alert: str, run: str) -> list[str]:
        """Actions the sidecar had done for an alert of a run, newest first."""
        journal = Journal(self.info.state_dir / "sidecar" / "journal.sqlite")
        with contextlib.closing(journal):
            return [
                entry.command.action
                for entry in journal.commands()
                if entry.command.run == run and entry.alert == alert and entry.outcome == "done"
            ]

    def await_commanded(self, alert: str, run: str, actions: list[str]) -> None:
        """The journal learns of an outcome after the disk has what was done."""
        wait_for(lambda: len(self.commanded(alert, run)) >= len(actions), f"outcomes of {actions}")
        assert self.commanded(alert, run) == actions


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with stack_with_people(tmp_path_factory.mktemp("alerts"), CHANGES) as up:
        yield up


@pytest.fixture
def disk_scene(tmp_path: Path) -> Iterator[Scene]:
    with stack_with_people(tmp_path, DISK_CHANGES) as up:
        yield up


@contextlib.contextmanager
def stack_with_people(place: Path, changes: dict[str, dict[str, Any]]) -> Iterator[Scene]:
    """The native stack with a changed table, and a mail server for those it tells."""
    runs, secret = place / "runs", place / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o600)
    with mail_server(place / "mail", "stack", PASSWORD) as mail:
        people = Notify(
            email=Email(
                smarthost=f"localhost:{mail.port}",
                **{"from": "stack@example.org"},
                to=("people@example.org",),
                auth_username="stack",
                auth_password_file=secret,
                ca_file=mail.certificate,
                severities=("critical", "warning", "info"),
            ),
            group_wait="1s",
            group_interval="1s",
        )
        native = NativeStack(runs / ".stack")
        info = native.up(
            runs,
            ports=StackPorts(0, 0, 0),
            scrape_interval="1s",
            alerts=alert_table({}, changes),
            notify=people,
            policy=POLICY,
        )
        try:
            yield Scene(info, runs, mail)
        finally:
            native.down()


@contextlib.contextmanager
def trainer(scene: Scene, run: str, *flags: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """A trainer as users start it, gone at the end of the block."""
    scene.runs.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "obsinfra.cli.main", "train", "--model-name=digits", f"--run={run}"]
    command += [f"--output-dir={scene.runs}", "--epochs=100000", "--threads=1", "--stack=off", *flags]
    with (scene.runs.parent / f"{run}.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **environ}
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="module", autouse=True)
def hung(scene: Scene) -> Iterator[str]:
    """A run that hangs: it needs a minute to be found out, and no processor meanwhile."""
    flags = ("--inject=hang@500", "--snapshot-seconds=0.1", "--grace-seconds=2")
    with trainer(scene, "hung", *flags):
        yield "hung"


def checkpoints(scene: Scene, run: str, kind: str) -> list[Manifest]:
    folder = RunFolder(scene.runs / run).checkpoints
    found = create_backup_system(folder).list() if folder.is_dir() else []
    return [manifest for manifest in found if manifest.kind == kind]


def saved_because_of(scene: Scene, alert: str, run: str, kind: str = "emergency") -> Manifest:
    def look() -> Manifest | None:
        wanted = f"alert {alert}"
        return next((m for m in checkpoints(scene, run, kind) if wanted in (m.reason or "")), None)

    return wait_for(look, f"the {kind} checkpoint that {alert} asked for", seconds=120)


def told_of(scene: Scene, alert: str, run: str) -> str:
    return wait_for(lambda: scene.mailed(alert, run), f"a mail about {alert}", seconds=60)


@pytest.mark.parametrize(
    ("alert", "inject", "flags"),
    [
        ("GradientExplosion", "explode@300", ()),
        ("NonFiniteLoss", "nan@300", ("--on-nonfinite=continue",)),
    ],
)
def test_a_loss_or_gradient_gone_wrong(scene: Scene, alert: str, inject: str, flags: tuple[str, ...]) -> None:
    run = alert.lower()
    with trainer(scene, run, f"--inject={inject}", *flags):
        saved = saved_because_of(scene, alert, run)
        text = told_of(scene, alert, run)
    assert saved.step >= 300
    assert create_backup_system(RunFolder(scene.runs / run).checkpoints).verify(saved.path)
    scene.await_commanded(alert, run, ["emergency_checkpoint"])
    assert "emergency_checkpoint" in text and f"/runbooks/{alert}" in text
    told = re.search(r"step (\d+)", text)
    assert told is not None and int(told[1]) >= 300


def test_a_step_that_takes_too_long(scene: Scene) -> None:
    with trainer(scene, "slow", "--inject=slow@300x100"):
        saved_because_of(scene, "SlowStep", "slow", "regular")
        told_of(scene, "SlowStep", "slow")
        wait_for(lambda: scene.commanded("SlowStep", "slow"), "the journal to have its outcome")
    assert set(scene.commanded("SlowStep", "slow")) == {"checkpoint"}


def test_memory_that_creeps(scene: Scene) -> None:
    with trainer(scene, "leaky", "--inject=leak@200x1000", "--batch-size=512"):
        saved_because_of(scene, "MemoryCreep", "leaky", "regular")
        text = told_of(scene, "MemoryCreep", "leaky")
    assert "slope over 10 s: above 3000 MB/h" in text


def test_a_trainer_killed_outright(scene: Scene) -> None:
    """Nobody is left to command, so people are told; and the writer has saved the last snapshot."""
    with trainer(scene, "killed", "--snapshot-seconds=0.1") as process:
        wait_for(lambda: checkpoints_or_progress(scene, "killed"), "the run to be under way", seconds=60)
        process.kill()
        process.wait()
        text = told_of(scene, "TrainerGone", "killed")
    assert "killed" in text
    folder = RunFolder(scene.runs / "killed").checkpoints
    wait_for(lambda: folder.is_dir() and create_backup_system(folder).list(), "the writer's last commit")


def checkpoints_or_progress(scene: Scene, run: str) -> bool:
    progress = scene.runs / run / "progress.json"
    return progress.exists() and time.time() - progress.stat().st_mtime < 5


def test_a_disk_that_fills(disk_scene: Scene) -> None:
    """A neighbour writes to the run folder's file system, fast enough to fill it within four hours."""
    free = shutil.disk_usage(disk_scene.runs).free
    a_second = max(free // 3600, 2**20)  # full within an hour, at this rate
    if a_second * 60 > free // 4:
        pytest.skip("too little free space to fill a part of it")
    filler = disk_scene.runs.parent / "filler"
    with trainer(disk_scene, "filling") as process, filler.open("wb") as out:
        began, written = time.monotonic(), 0

        def seen() -> Manifest | None:
            nonlocal written
            assert process.poll() is None
            due = int((time.monotonic() - began) * a_second) - written
            written += out.write(b"\1" * due)
            out.flush()
            found = checkpoints(disk_scene, "filling", "emergency")
            return next((m for m in found if "alert DiskFilling" in (m.reason or "")), None)

        try:
            wait_for(seen, "the checkpoint that DiskFilling asked for", seconds=120)
            told_of(disk_scene, "DiskFilling", "filling")
        finally:
            filler.unlink()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc builds the NVML stand-in (apt install gcc)")
def test_a_hot_gpu(scene: Scene, tmp_path: Path) -> None:
    """A library that speaks NVML, loaded as pynvml loads NVIDIA's: its GPU gets hot while the run trains."""
    source = Path(__file__).parents[1] / "monitoring" / "fake_nvml" / "fake_nvml.c"
    library = tmp_path / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True, timeout=120)
    state = tmp_path / "state"

    def gpu(celsius: int) -> None:
        new = state.with_suffix(".new")
        readings: Mapping[str, object] = {
            "count": 1,
            "0.uuid": "GPU-aaaaaaaa-0000",
            "0.name": "A GPU",
            "0.memory.total": 80 * 2**30,
            "0.memory.used": 2**30,
            "0.utilization": 50,
            "0.temperature": celsius,
        }
        new.write_text("".join(f"{key} {value}\n" for key, value in readings.items()))
        new.replace(state)

    gpu(60)
    environ = {"LD_LIBRARY_PATH": str(tmp_path), "FAKE_NVML_STATE": str(state)}
    with trainer(scene, "hot", "--device=cpu", **environ):
        wait_for(lambda: checkpoints_or_progress(scene, "hot"), "the run to be under way", seconds=60)
        assert not checkpoints(scene, "hot", "emergency")
        gpu(91)
        saved_because_of(scene, "HighGPUTemperature", "hot")
        text = told_of(scene, "HighGPUTemperature", "hot")
        folder = RunFolder(scene.runs / "hot")
        wait_for(lambda: folder.read_info().state == "paused", "the pause of a run that stays hot")
        gpu(80)  # below the threshold, and not yet cool
        series = 'obsinfra_gpu_temperature_celsius{run="hot"}'
        wait_for(lambda: scene.value(f"count_over_time(({series} == 80)[1m:1s])") >= 5, "80 °C to be seen")
        assert scene.value('count(ALERTS{alertname="HighGPUTemperature", alertstate="firing"})') == 1
        assert folder.read_info().state == "paused"
        gpu(75)
        wait_for(lambda: folder.read_info().state == "running", "the cool device's run to go on")
        # Before the trainer is killed: it goes on before it says so.
        scene.await_commanded("HighGPUTemperature", "hot", ["resume", "pause", "emergency_checkpoint"])
    assert "91" in text and "85 °C, until 75 °C" in text


def test_a_hang_is_saved_without_the_loop(scene: Scene, hung: str) -> None:
    """The loop never comes round again: the last snapshot is committed all the same."""
    saved = saved_because_of(scene, "NoProgress", hung)
    told_of(scene, "NoProgress", hung)
    assert 0 < saved.step <= 500
