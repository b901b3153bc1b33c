"""Prometheus, Alertmanager and sidecar killed at random under a firing alert, with a real trainer.

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
from contextlib import closing, contextmanager, suppress
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
CHAOS_SECONDS = 60.0
PROGRAMS = ("sidecar", "alertmanager", "prometheus")

# Prometheus's threshold is so low that the alert fires all the time; the trainer's own is the usual one, so
# that it never acts by itself. No checkpoints but those that are asked for.
THRESHOLDS = {"gradient_norm": 1e-9}
TRAINING = [
    *("--run=chaos", "--model-name=digits", "--epochs=1000000", "--schedule=constant", "--validate-every=0"),
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
def trainer(runs: Path, stack: NativeStack) -> Iterator[subprocess.Popen[bytes]]:
    with training(runs) as process:
        yield process


@contextmanager
def training(runs: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real trainer, killed at the end."""
    with (runs / "trainer.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "obsinfra.cli.main", "train", f"--output-dir={runs}", *TRAINING, *more],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


class Story:
    """What the sidecar's journal and the run's own log say."""

    def __init__(self, runs: Path) -> None:
        self._journal = runs / ".stack" / "sidecar" / "journal.sqlite"
        self.folder = RunFolder(runs / "chaos")

    def heard(self) -> list[AlertEntry]:
        with closing(Journal(self._journal)) as journal:
            return [entry for entry in journal.alerts(100_000, run="chaos") if entry.name == ALERT]

    def firings(self) -> set[tuple[str, float]]:
        """Each firing by fingerprint and start; Prometheus may begin one anew when it was killed."""
        return {(entry.fingerprint, entry.starts_at) for entry in self.heard() if entry.status == "firing"}

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
    runs: Path, stack: NativeStack, trainer: subprocess.Popen[bytes]
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
        present = stack.status()
        process = present.children[name].process if present is not None else None
        if process is not None:
            with suppress(ProcessLookupError, psutil.Error):
                os.kill(process.pid, signal.SIGKILL)
                kills[name] += 1
        wanted = story.step() + chance.randrange(1, 100)
        wait_for(lambda: story.step() >= wanted, "training goes on")  # noqa: B023
        assert trainer.poll() is None

    # All of them come back.
    programs = (info.prometheus_url, info.alertmanager_url)
    wait_for(lambda: all(answers(f"{url}/-/ready") for url in programs), "ready")
    wait_for(lambda: answers(f"{info.sidecar_url}/healthz"), "the sidecar answers")
    query = f'{info.prometheus_url}/api/v1/query?query=ALERTS{{alertname="{ALERT}",alertstate="firing"}}'
    wait_for(lambda: get_json(query)["data"]["result"], "Prometheus says that it fires")
    ask = [sys.executable, "-m", "obsinfra.cli.main", "signal", "chaos", "checkpoint", f"--output-dir={runs}"]
    assert subprocess.run(ask, timeout=60, check=False).returncode == 0  # nobody hangs

    def settled() -> bool:
        outcomes = story.outcomes()
        return len(outcomes) == len(story.firings()) and None not in outcomes.values()

    wait_for(settled, "each firing has its command, and each command its outcome", 400)
    print(f"kills {dict(kills)}, {len(story.firings())} firings", file=sys.stderr)

    assert set(kills) == set(PROGRAMS)
    assert set(story.outcomes().values()) == {"done"}
    executed = story.executed()
    assert {id: executed[id] for id in story.outcomes()} == dict.fromkeys(story.outcomes(), 1)
    assert [id for id in executed if id.startswith("inproc-")] == []


def test_with_an_alertmanager_that_hangs_the_trainer_acts_for_itself(runs: Path, stack: NativeStack) -> None:
    """Prometheus asks for targets and fires, the sidecar is well; what fires would reach nobody."""
    present = stack.status()
    assert present is not None
    alertmanager = present.children["alertmanager"].process
    assert alertmanager is not None
    os.kill(alertmanager.pid, signal.SIGSTOP)
    low = f"--thresholds=gradient_norm={THRESHOLDS['gradient_norm']}"
    with training(runs, low) as process:
        story = Story(runs)
        try:
            own = f"inproc-{ALERT}-"
            wait_for(lambda: any(id.startswith(own) for id in story.executed()), "it acts", 120)
            assert story.outcomes() == {} and process.poll() is None
        finally:
            os.kill(alertmanager.pid, signal.SIGCONT)
        wait_for(lambda: "done" in story.outcomes().values(), "the sidecar acts again", 120)


def answers(url: str) -> bool:
    with suppress(OSError), _direct.open(url, timeout=5):
        return True
    return False
