"""Starting trainings through the real CLI in processes of their own, and looking at what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsinfra.backup.backup_system import LoadedCheckpoint, create_backup_system
from obsinfra.backup.compare import differences
from obsinfra.backup.manifest import Manifest
from obsinfra.config.settings import Settings, environment_names
from obsinfra.run.folder import RunFolder

TESTS = Path(__file__).parent
SECONDS = 120


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The present one without anything that would steer a training, the probes on its path."""
    steering = {name for field in Settings.model_fields for name in environment_names(field)}
    clean = {name: value for name, value in os.environ.items() if name not in steering}
    path = os.pathsep.join([str(TESTS), str(TESTS.parents[1])])
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(more or {})}


def cli(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Any command of the CLI, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "obsinfra.cli.main", *map(str, arguments)],
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@dataclass
class Training:
    """A run called `name` below `output`, trained by any number of processes one after the other."""

    output: Path
    name: str
    flags: tuple[str, ...]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.output / self.name)

    @property
    def losses_file(self) -> Path:
        return self.output / f"{self.name}.losses"

    @property
    def mark(self) -> Path:
        """Left by a probe that waits for it to go away."""
        return self.output / f"{self.name}.mark"

    def _command(self, more: tuple[str, ...], resume: str | None) -> list[str]:
        which = ["--resume", resume] if resume else ["--run", self.name]
        common = [
            "--disable-testing",
            "--metrics-port=0",
            "--threads=1",
            "--stack=off",
            f"--output-dir={self.output}",
        ]
        return [sys.executable, "-m", "obsinfra.cli.main", "train", *common, *self.flags, *which, *more]

    def _environment(self, at: str | None) -> dict[str, str]:
        probe = {
            "PROBE_LOSSES": str(self.losses_file),
            "PROBE_MARK": str(self.mark),
            "PROBE_RUN": self.name,
            "PROBE_OUTPUT": str(self.output),
        }
        return environment({**probe, **({"PROBE_AT": at} if at else {})})

    def run(
        self, *more: str, at: str | None = None, resume: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Train to the end; `at` is PROBE_AT."""
        self.output.mkdir(exist_ok=True)
        return subprocess.run(
            self._command(more, resume),
            env=self._environment(at),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def start(self, *more: str, at: str | None = None, resume: str | None = None) -> subprocess.Popen[str]:
        """Start in a process group of its own."""
        self.output.mkdir(exist_ok=True)
        return subprocess.Popen(
            self._command(more, resume),
            env=self._environment(at),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def losses(self) -> list[str]:
        """Exact losses of all micro-batches so far, of all processes."""
        return self.losses_file.read_text().split() if self.losses_file.exists() else []

    def checkpoints(self, kind: str | None = None) -> list[Manifest]:
        """Oldest first; every one of them is sound."""
        backup = create_backup_system(self.folder.checkpoints)
        assert [found for found in backup.verify() if found.problem] == []
        return [found for found in backup.list() if kind in (None, found.kind)]

    def newest(self) -> LoadedCheckpoint:
        """The newest resumable state."""
        return create_backup_system(self.folder.checkpoints).load()

    def state(self) -> tuple[str, str | None]:
        """State and reason as run.json has them."""
        info = self.folder.read_info()
        return info.state, info.reason

    def events(self, channel: str, name: str) -> list[dict[str, Any]]:
        """Log events of one name."""
        lines = (self.folder.logs / f"{channel}.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process to end; exit code and stderr. Kills its group rather than leave anything behind."""
    try:
        _, stderr = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        kill_group(process)
        raise
    return process.returncode, stderr


def kill_group(process: subprocess.Popen[str]) -> None:
    """End a process started by `Training.start` with all its children, at once."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.communicate()


def assert_same(left: LoadedCheckpoint, right: LoadedCheckpoint) -> None:
    """Model, optimizer, schedule, scaler, random states, data position and counters, bit for bit."""
    assert differences(left.state, right.state) == []
    assert (left.info.step, left.info.epoch) == (right.info.step, right.info.epoch)
