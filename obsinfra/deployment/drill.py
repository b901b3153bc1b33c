"""A drill of the main job with real parts: explode, alert, save, kill, resume, and prove it.

Run by `obsinfra demo` and by the end-to-end test. The trainers are processes of their own, started through
the CLI as a person would; everything else is read from the run folder, the journal and the traces.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx

from obsinfra.backup.backup_system import LoadedCheckpoint, create_backup_system
from obsinfra.backup.checkpointer import wait_for_heir
from obsinfra.backup.compare import count_tensors, differences
from obsinfra.control.journal import Journal
from obsinfra.deployment.native_stack import StackInfo
from obsinfra.errors import ObsinfraError
from obsinfra.run.folder import RunFolder, new_run_id

T = TypeVar("T")

EXPLODE_AT = 4_000
"""Late enough that Prometheus, which takes up to 5 s to use a new target, scrapes the run before."""

EXPLODE_STEPS = 3
STEPS_AFTER = 200
"""Steps that the resumed run takes beyond the one at which the trainer was killed."""

ALERT = "GradientExplosion"
PATIENCE_SECONDS = 120.0
"""For what is to happen; where that is a number of steps, for each next sign of one."""

POLL_SECONDS = 0.02
"""Between two looks at what the trainer, another process, has written."""
SHOWN_LINES = 15

# A small real training without pauses: no regular checkpoints, so that only the emergency one can save it.
TRAINING = (
    "--model-name=digits --epochs=1000000 --schedule=constant --threads=1 --precision=fp32 "
    "--validate-every=200 --checkpoint-seconds=0 --checkpoint-epochs=0 --metrics-port=0 "
    f"--log-every-seconds=2 --sample-seconds=0.5 --stack=off --inject=explode@{EXPLODE_AT}x{EXPLODE_STEPS}"
).split()


class DrillFailed(ObsinfraError):
    """A stage of the drill did not come about; the message says which, and what the trainer said last."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened. `at` is epoch seconds."""

    at: float
    what: str


@dataclass(frozen=True, slots=True)
class DrillResult:
    """What a drill showed.

    Attributes:
        timeline: in order; the first is the crossing.
        run: id of the run that was killed and resumed.
        saved_step, killed_step: of the emergency checkpoint and the kill.
        resumed_step: of the checkpoint resumed from: that one, or a newer snapshot that the writer process
            committed after the kill.
        final_step: at which both runs ended.
        tensors: compared between the resumed and the uninterrupted run.
        differing: places where they differ; empty is what is wanted.
        crossing_to_committed_seconds: from the exploding step to the durable checkpoint.
    """

    timeline: tuple[Moment, ...]
    run: str
    saved_step: int
    killed_step: int
    resumed_step: int
    final_step: int
    tensors: int
    differing: tuple[str, ...]
    crossing_to_committed_seconds: float


class Patience:
    """How long something is waited for.

    Args:
        stepping: the run whose steps are waited for: each sign of one begins the wait anew.
    """

    def __init__(self, stepping: RunFolder | None = None) -> None:
        self._stepping = stepping
        self._seen: object = None
        self._deadline = time.monotonic() + PATIENCE_SECONDS

    @property
    def over(self) -> bool:
        """Whether it is at its end."""
        sign = self._stepping.read_progress() if self._stepping is not None else None
        if sign is not None and sign.step != self._seen:
            self._seen = sign.step
            self._deadline = time.monotonic() + PATIENCE_SECONDS
        return time.monotonic() >= self._deadline


class Drill:
    """One drill in one folder.

    Args:
        output_dir: folder of the drill's runs; with a stack, the folder that stack watches.
        stack: the native stack that is up; None lets the trainer evaluate and act by itself.
        say: called with a line before each stage.
    """

    def __init__(self, output_dir: Path, stack: StackInfo | None, say: Callable[[str], None]) -> None:
        self._output_dir = output_dir
        self._stack = stack
        self._say = say
        self._folder = RunFolder(output_dir / new_run_id("drill"))
        self._log = output_dir / f"{self._folder.id}.log"

    def run(self) -> DrillResult:
        """Go through all of it.

        Raises:
            DrillFailed: something did not come about.
        """
        self._say(f"training run {self._folder.id}; gradients explode at step {EXPLODE_AT}")
        with self._trainer(f"--run={self._folder.id}") as trainer:
            timeline = self._until_saved(trainer)
            crossing, committed = timeline[0], timeline[-1]
            saved_step = int(self._span("checkpoint")["attributes"]["obsinfra.step"])  # type: ignore[index]
            killed_step = self._present_step()
            os.kill(trainer.pid, signal.SIGKILL)
            trainer.wait()
            timeline.append(Moment(time.time(), f"trainer killed with SIGKILL at step {killed_step}"))
        if not wait_for_heir(self._folder.checkpoints, PATIENCE_SECONDS):
            raise self._failed("the writer did not end after the trainer")
        last = create_backup_system(self._folder.checkpoints).load().info
        if last.step > saved_step:
            at = datetime.fromisoformat(last.created_at).timestamp()
            timeline.append(Moment(at, f"the writer process commits the last snapshot, of step {last.step}"))
        self._say(f"saved at step {saved_step}, killed; resuming from step {last.step}")
        final_step = killed_step + STEPS_AFTER
        with self._trainer(f"--resume={self._folder.id}", f"--max-steps={final_step}") as trainer:
            started = self._wait(self._resumed_start, trainer, "the resumed start")
            resumed_step = int(started["resumed_from_step"])
            timeline.append(Moment(_moment(started), f"resumed from the checkpoint of step {resumed_step}"))
            self._ended(trainer, self._folder)
        self._say(f"the same {final_step} steps without any interruption, to compare")
        reference = RunFolder(self._output_dir / f"{self._folder.id}-uninterrupted")
        with self._trainer(f"--run={reference.id}", f"--max-steps={final_step}") as trainer:
            self._ended(trainer, reference)
        resumed, whole = (_newest(folder) for folder in (self._folder, reference))
        differing = differences(resumed.state, whole.state)
        return DrillResult(
            tuple(timeline),
            self._folder.id,
            saved_step,
            killed_step,
            resumed_step,
            resumed.info.step,
            count_tensors(whole.state),
            tuple(differing),
            committed.at - crossing.at,
        )

    # ---- the first part: from the crossing to the committed checkpoint -------------------------------

    def _until_saved(self, trainer: subprocess.Popen[bytes]) -> list[Moment]:
        crossing = self._wait(
            lambda: self._logged("training", "fault_injected"),
            trainer,
            f"step {EXPLODE_AT}",
            Patience(self._folder),
        )
        timeline = [
            Moment(_moment(crossing), f"crossing: the gradients of step {crossing['at_step']} explode")
        ]
        self._wait(
            lambda: any((self._folder.checkpoints / "manifests").glob("*-emergency-*.json")),
            trainer,
            "the emergency checkpoint",
        )
        timeline += self._by_sidecar(trainer) if self._stack is not None else self._in_process(trainer)
        command = self._wait(
            lambda: self._span("command emergency_checkpoint"), trainer, "the span of the command"
        )
        saved = self._wait(lambda: self._span("checkpoint"), trainer, "the span of the checkpoint")
        step = saved["attributes"]["obsinfra.step"]
        timeline.append(Moment(command["start_ns"] / 1e9, f"command reaches the loop (before step {step})"))
        timeline.append(Moment(saved["end_ns"] / 1e9, f"emergency checkpoint of step {step} is committed"))
        return timeline

    def _by_sidecar(self, trainer: subprocess.Popen[bytes]) -> list[Moment]:
        assert self._stack is not None
        journal = Journal(self._stack.state_dir / "sidecar" / "journal.sqlite")
        with contextlib.closing(journal):
            entry = self._wait(
                lambda: next(
                    (entry for entry in journal.commands() if entry.command.run == self._folder.id), None
                ),
                trainer,
                "the command in the sidecar's journal",
            )
        return [
            Moment(entry.starts_at, f"alert {entry.alert} fires in Prometheus"),
            Moment(entry.received_at, "Alertmanager's webhook reaches the sidecar"),
        ]

    def _in_process(self, trainer: subprocess.Popen[bytes]) -> list[Moment]:
        fired = self._wait(
            lambda: self._logged("errors", "alert_firing", alert=ALERT), trainer, f"alert {ALERT}"
        )
        return [Moment(_moment(fired), f"alert {ALERT} fires in the trainer's own evaluator")]

    # ---- trainers and what they leave -----------------------------------------------------------------

    @contextlib.contextmanager
    def _trainer(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A trainer as a process of its own, gone at the end of the block whatever happened."""
        self._output_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "obsinfra.cli.main", "train", f"--output-dir={self._output_dir}"]
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [*command, *TRAINING, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _ended(self, trainer: subprocess.Popen[bytes], folder: RunFolder) -> None:
        patience = Patience(folder)
        while trainer.poll() is None:
            if patience.over:
                raise self._failed("the trainer did not reach its last step in time")
            time.sleep(POLL_SECONDS)
        if trainer.returncode != 0:
            raise self._failed(f"the trainer ended with status {trainer.returncode}")

    def _wait(
        self,
        condition: Callable[[], T | None],
        trainer: subprocess.Popen[bytes],
        what: str,
        patience: Patience | None = None,
    ) -> T:
        patience = patience or Patience()
        while not patience.over:
            if found := condition():
                return found
            if trainer.poll() is not None:
                raise self._failed(f"the trainer ended with status {trainer.returncode} before {what}")
            time.sleep(POLL_SECONDS)
        raise self._failed(f"no {what} within {PATIENCE_SECONDS:.0f} s")

    def _failed(self, what: str) -> DrillFailed:
        lines = self._log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        return DrillFailed("\n".join([f"the drill stopped: {what}; the trainer said last:", *lines]))

    def _logged(self, channel: str, event: str, **values: Any) -> dict[str, Any] | None:
        """The newest event of that name in the run's log, with these values."""
        for line in _documents(self._folder.logs / f"{channel}.jsonl")[::-1]:
            wanted = {"event": event, **values}
            if all(line.get(key) == value for key, value in wanted.items()):
                return line
        return None

    def _resumed_start(self) -> dict[str, Any] | None:
        start = self._logged("training", "training")
        return start if start is not None and start["resumed_from_step"] is not None else None

    def _span(self, name: str) -> dict[str, Any] | None:
        """The first span of that name; of a checkpoint, the first that was an emergency's."""
        for span in _documents(self._folder.traces / "spans.jsonl"):
            kind = span["attributes"].get("obsinfra.kind", "emergency")
            if span["name"] == name and kind == "emergency":
                return span
        return None

    def _present_step(self) -> int:
        """The step under way, from the run's own live page."""
        page = self._folder.read_info().metrics_urls["0"].removesuffix("/metrics")
        # Without a proxy from the environment: this asks the machine itself.
        return int(httpx.get(f"{page}/api/live", trust_env=False).json()["progress"]["step"])


def _newest(folder: RunFolder) -> LoadedCheckpoint:
    return create_backup_system(folder.checkpoints).load()


def _documents(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file that may be being written."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    for line in lines:
        with contextlib.suppress(ValueError):
            document = json.loads(line)
            if isinstance(document, dict):
                found.append(document)
    return found


def _moment(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["timestamp"]).timestamp()
