"""The sidecar killed at random instants while alerts arrive: nothing is lost, nothing is done twice."""

from __future__ import annotations

import contextlib
import random
import signal
import sqlite3
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest
from sidecar_tools import Json, SidecarProcess, alert, notification, sidecar
from trainer_double import run_folder, trainer
from waiting import wait_for

from obsinfra.control.journal import Journal

POLICY = """
[policy]
cool_down_seconds = 0
emergency_checkpoints_per_hour = 3600
[policy.alerts.GradientExplosion]
escalate = [{ after_minutes = 0.01, action = "checkpoint" }]
"""


class PatientAlertmanager:
    """Sends each notification again and again until it is answered with 2xx, as Alertmanager does."""

    def __init__(self, process: SidecarProcess, alerts: list[Json]) -> None:
        self.process, self.alerts = process, alerts
        self.posts = 0
        self.thread = threading.Thread(target=self.send, name="patient-alertmanager")
        self.gave_up = threading.Event()

    def send(self) -> None:
        with httpx.Client(trust_env=False, timeout=5) as client:
            for one in self.alerts:
                while not self.gave_up.is_set():
                    self.posts += 1
                    try:
                        answer = client.post(
                            f"{self.process.url}/webhook",
                            json=notification(one),
                            headers=dict(self.process.client.headers),
                        )
                    except httpx.HTTPError:
                        continue
                    if answer.status_code == 200:
                        break


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_each_alert_is_acted_on_once_whenever_the_sidecar_is_killed(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    runs = ["r1", "r2", "r3"]
    alerts = [alert(run=chance.choice(runs), fingerprint=f"f{number}") for number in range(150)]
    with (
        trainer(run_folder(tmp_path, "r1")) as one,
        trainer(run_folder(tmp_path, "r2")) as two,
        trainer(run_folder(tmp_path, "r3")) as three,
        sidecar(tmp_path, f"--policy={policy}") as process,
    ):
        sender = PatientAlertmanager(process, alerts)
        sender.thread.start()
        try:
            kills = 0
            while sender.thread.is_alive():
                before = sender.posts
                wanted = before + chance.randrange(1, 25)
                wait_for(lambda: sender.posts >= wanted or not sender.thread.is_alive(), "it went on")  # noqa: B023
                # Somewhere in the handling of that one: a spin of no known length, rather than a sleep.
                for _ in range(chance.randrange(30_000)):
                    pass
                process.end(signal.SIGKILL)
                kills += 1
                process.start()
        finally:
            sender.gave_up.set()
            sender.thread.join()
        journal = Journal(process.state_dir / "journal.sqlite")
        try:
            # The escalation too: a second step for each firing, taken by whichever sidecar was alive then.
            wait_for(
                lambda: (
                    len(journal.commands(1_000)) == 2 * len(alerts)
                    and all(entry.outcome for entry in journal.commands(1_000))
                ),
                "everything is settled",
                120,
            )
            entries = journal.commands(1_000)
            executed = [*one, *two, *three]
        finally:
            journal.close()
    assert kills >= 5
    assert Counter(entry.outcome for entry in entries) == {"done": 2 * len(alerts)}
    done = Counter(command.id for command in executed)
    assert set(done.values()) == {1} and done.keys() == {entry.command.id for entry in entries}
    wanted_first = Counter(one["labels"]["run"] for one in alerts)
    for action in ("emergency_checkpoint", "checkpoint"):
        assert Counter(command.run for command in executed if command.action == action) == wanted_first


def test_a_kill_in_the_middle_of_a_commit_leaves_all_of_a_notification_or_nothing(tmp_path: Path) -> None:
    """Big notifications, so that the kill falls into the transaction now and then."""
    run_folder(tmp_path)
    chance = random.Random(7)
    with sidecar(tmp_path) as process:
        for round_ in range(6):
            many = [alert(action=None, fingerprint=f"{round_}-{number}") for number in range(400)]

            def send(client: httpx.Client, many: list[Json] = many) -> None:
                try:
                    client.post("/webhook", json=notification(*many))
                except httpx.HTTPError:
                    return

            thread = threading.Thread(target=send, args=(process.client,))
            thread.start()
            for _ in range(chance.randrange(600_000)):
                pass
            process.end(signal.SIGKILL)
            thread.join()
            process.start()
    journal = Journal(process.state_dir / "journal.sqlite")
    kept = Counter(entry.fingerprint.partition("-")[0] for entry in journal.alerts(10_000))
    journal.close()
    assert set(kept.values()) <= {400}
    with contextlib.closing(sqlite3.connect(process.state_dir / "journal.sqlite")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
