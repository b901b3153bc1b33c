"""Prometheus, Alertmanager, sidecar and trainer killed at random under a firing alert.

The emergency checkpoint happens once for each firing, nobody hangs, and training goes on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from stack_tools import get_json, needs_stack
from waiting import wait_for

from obsinfra.catalog.alert_changes import alert_table
from obsinfra.control.journal import AlertEntry, Journal
from obsinfra.deployment.native_stack import NativeStack
from obsinfra.deployment.ports import StackPorts
from obsinfra.run.folder import RunFolder

ALERT = "GradientExplosion"
CHAOS_SECONDS = 120.0
PROGRAMS = ("sidecar", "alertmanager", "prometheus", "trainer")

# Prometheus's threshold is so low that the alert fires all the time; the trainer's own is the usual one, so
# that it never acts by itself. No checkpoints but those that are asked for.
THRESHOLDS = {"gradient_norm": 1e-9}
TRAINING = [
    *(
        "--run=chaos",
        "--resume=auto",
        "--model-name=digits",
        "--epochs=1000000",
        "--schedule=constant",
        "--validate-every=0",
    ),
    *("--checkpoint-seconds=0", "--checkpoint-epochs=0", "--threads=1", "--precision=fp32"),
    *("--metrics-port=0", "--sample-seconds=1", "--stack=off"),
]

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

pytestmark = [pytest.mark.slow, pytest.mark.stack, needs_stack]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def stack(runs: Path) -> Iterator[NativeStack]:
    native = NativeStack(runs / ".stack")
    native.up(
        runs,
        ports=StackPorts(0, 0, 0),
        scrape_interval="1s",
        alerts=alert_table(THRESHOLDS),
        policy={"cool_down_seconds": 0},
    )
    yield native
    native.down()


@pytest.fixture
def trainer(runs: Path, stack: NativeStack) -> Iterator[Trainer]:
    with Trainer(runs) as trainer:
        yield trainer


class Trainer:
    """A real trainer, killed at the end of the block."""

    def __init__(self, runs: Path, *more: str) -> None:
        self._log = runs / "trainer.log"
        self._command = [sys.executable, "-m", "obsinfra.cli.main", "train", f"--output-dir={runs}"]
        self._command += [*TRAINING, *more]

    def __enter__(self) -> Trainer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Begin the run, or go on with it."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def lives(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.wait()


class Story:
    """What the sidecar's journal and the run's own log say."""

    def __init__(self, runs: Path) -> None:
        self._journal = runs / ".stack" / "sidecar" / "journal.sqlite"
        self.folder = RunFolder(runs / "chaos")

    def heard(self) -> list[AlertEntry]:
        with closing(Journal(self._journal)) as journal:
            return [entry for entry in journal.alerts(100_000, run="chaos") if entry.name == ALERT]

    def firings(self) -> dict[tuple[str, float], set[str]]:
        """Each firing by fingerprint and start → what was decided about it.

        Prometheus may begin one anew when it, or the trainer, was killed.
        """
        found: dict[tuple[str, float], set[str]] = {}
        for entry in self.heard():
            if entry.status == "firing":
                found.setdefault((entry.fingerprint, entry.starts_at), set()).add(entry.decision)
        return found

    def outcomes(self) -> dict[str, str | None]:
        """Command id → outcome, of the emergency checkpoints for the alert."""
        with closing(Journal(self._journal)) as journal:
            return {
                entry.command.id: entry.outcome
                for entry in journal.commands(100_000, run="chaos")
                if entry.alert == ALERT and entry.command.action == "emergency_checkpoint"
            }

    def executed(self) -> Counter[str]:
        """Command id → how often the trainer says that it carried it out."""
        lines: list[str] = []
        with suppress(FileNotFoundError):
            lines = (self.folder.logs / "system.jsonl").read_text().splitlines()
        events: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return Counter(event["id"] for event in events if event["event"] == "command")

    def step(self) -> int:
        with suppress(OSError, ValueError):
            return int(json.loads((self.folder.root / "progress.json").read_text())["step"])
        return 0


@pytest.mark.timeout(600)
def test_the_emergency_checkpoint_happens_once_for_each_firing(
    runs: Path, stack: NativeStack, trainer: Trainer
) -> None:
    chance = random.Random(os.environ.get("OBSINFRA_CHAOS_SEED", "1"))
    story = Story(runs)
    info = stack.status()
    assert info is not None
    wait_for(lambda: "done" in story.outcomes().values(), "the first emergency checkpoint", 120)

    kills: Counter[str] = Counter()
    end = time.monotonic() + CHAOS_SECONDS
    order: list[str] = []
    while time.monotonic() < end or order:
        order = order or chance.sample(PROGRAMS, len(PROGRAMS))
        name = order.pop()
        if name == "trainer":
            trainer.kill()
            kills[name] += 1
            trainer.start()
        else:
            present = stack.status()
            process = present.children[name].process if present is not None else None
            if process is not None:
                with suppress(ProcessLookupError, psutil.Error):
                    os.kill(process.pid, signal.SIGKILL)
                    kills[name] += 1
        wanted = story.step() + chance.randrange(1, 800)
        wait_for(lambda: story.step() >= wanted, "training goes on", 120)  # noqa: B023
        assert trainer.lives()

    # All of them come back.
    programs = (info.prometheus_url, info.alertmanager_url)
    wait_for(lambda: all(answers(f"{url}/-/ready") for url in programs), "ready")
    wait_for(lambda: answers(f"{info.sidecar_url}/healthz"), "the sidecar answers")
    query = f'{info.prometheus_url}/api/v1/query?query=ALERTS{{alertname="{ALERT}",alertstate="firing"}}'
    wait_for(lambda: get_json(query)["data"]["result"], "Prometheus says that it fires")
    ask = [sys.executable, "-m", "obsinfra.cli.main", "signal", "chaos", "checkpoint", f"--output-dir={runs}"]
    assert subprocess.run(ask, timeout=60, check=False).returncode == 0  # nobody hangs

    def settled() -> bool:
        firings, outcomes = story.firings(), story.outcomes()
        # One that was heard of while the trainer was dead had nobody to be told to.
        told = [decisions for decisions in firings.values() if "accepted" in decisions]
        left = [decisions for decisions in firings.values() if "accepted" not in decisions]
        assert all(decisions <= {"run_ended", "resolved"} for decisions in left)
        return "accepted" in firings[max(firings, key=lambda firing: firing[1])] and (
            len(outcomes) == len(told) and None not in outcomes.values()
        )

    wait_for(settled, "each firing has its command, and each command its outcome", 400)
    outcomes, executed = story.outcomes(), story.executed()
    print(
        f"kills {dict(kills)}, {len(story.firings())} firings, {Counter(outcomes.values())}", file=sys.stderr
    )

    assert set(kills) == set(PROGRAMS)
    done = {id for id, outcome in outcomes.items() if outcome == "done"}
    assert {id: executed[id] for id in done} == dict.fromkeys(done, 1)
    # The others are those that a killed trainer was at; none of them is done a second time.
    others = outcomes.keys() - done
    assert len(others) <= kills["trainer"] and all(executed[id] <= 1 for id in others)
    assert [id for id in executed if id.startswith("inproc-")] == []


def test_with_an_alertmanager_that_hangs_the_trainer_acts_for_itself(runs: Path, stack: NativeStack) -> None:
    """Prometheus asks for targets and fires, the sidecar is well; what fires would reach nobody."""
    present = stack.status()
    assert present is not None
    alertmanager = present.children["alertmanager"].process
    assert alertmanager is not None
    os.kill(alertmanager.pid, signal.SIGSTOP)
    low = f"--thresholds=gradient_norm={THRESHOLDS['gradient_norm']}"
    with Trainer(runs, low) as trainer:
        story = Story(runs)
        try:
            own = f"inproc-{ALERT}-"
            wait_for(lambda: any(id.startswith(own) for id in story.executed()), "it acts", 120)
            assert story.outcomes() == {} and trainer.lives()
        finally:
            os.kill(alertmanager.pid, signal.SIGCONT)
        wait_for(lambda: "done" in story.outcomes().values(), "the sidecar acts again", 120)


def answers(url: str) -> bool:
    with suppress(OSError), _direct.open(url, timeout=5):
        return True
    return False
