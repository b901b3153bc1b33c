"""Trainings on several ranks through the real CLI and torchrun, and looking at what they leave."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from training_runs import environment
from waiting import wait_for

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.manifest import Manifest
from obsinfra.run.folder import RunFolder, RunInfo

LIVE = ("starting", "running", "paused", "stopping")


class RankedRun:
    """A run called `name` below `output`, by any number of launches one after the other."""

    def __init__(self, output: Path, name: str, *flags: object) -> None:
        self.output, self.name = output, name
        self.folder = RunFolder(output / name)
        self.flags = [
            "--output-dir",
            output,
            "--run",
            name,
            "--precision",
            "fp32",
            "--metrics-port",
            0,
            *flags,
        ]

    def command(self, *more: object) -> list[str]:
        return [sys.executable, "-m", "obsinfra.cli.main", "train", *map(str, [*self.flags, *more])]

    @contextmanager
    def launched(
        self, *more: object, env: Mapping[str, str] | None = None, inside: Sequence[str] = ()
    ) -> Iterator[subprocess.Popen[str]]:
        """The launcher, which is gone with all ranks afterwards; started by the command `inside`, if any."""
        process = subprocess.Popen(
            [*inside, *self.command(*more)],
            env=environment(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for member in [*family, process]:
                with suppress(psutil.NoSuchProcess):
                    member.send_signal(signal.SIGKILL)
            process.communicate()

    def info(self) -> RunInfo | None:
        return self.folder.read_info() if self.folder.run_json.exists() else None

    def running(self, ranks: int, *, restarts: int = 0, step: int = 1) -> RunInfo:
        """Wait until it runs on so many ranks and has come to a step."""

        def found() -> RunInfo | None:
            info, progress = self.info(), self.folder.read_progress()
            there = info and info.state == "running" and info.world_size == ranks
            far = progress is not None and (progress.step or 0) >= step
            return info if info and there and info.restarts == restarts and far else None

        return wait_for(found, f"{self.name} runs on {ranks} ranks", seconds=100)

    def events(self, rank: int, channel: str, name: str) -> list[dict[str, Any]]:
        """Events of one rank's log, oldest first."""
        path = self.folder.logs / f"{channel}{f'-rank{rank}' if rank else ''}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def checkpoints(self, kind: str | None = None) -> list[Manifest]:
        found = create_backup_system(self.folder.checkpoints).list()
        return [manifest for manifest in found if kind in (None, manifest.kind)]
