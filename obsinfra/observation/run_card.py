"""What a run's folder says of it while it runs: run.json, config.toml and progress.json.

Written for `ObservedRun`; read by the CLI, the sidecar and the next process of the run.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from obsinfra.config.resolve import dump_toml
from obsinfra.config.settings import Settings
from obsinfra.errors import ObsinfraError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.observation.ranks import Ranks
from obsinfra.observation.resume import ResumePlan
from obsinfra.run.files import write_atomic
from obsinfra.run.folder import ENDED_STATES, RunFolder, RunInfo
from obsinfra.run.process import ProcessId

PROGRESS_SECONDS = 2.0
"""How often the step reached is noted, to know after a crash how many steps are done again."""


class RunCard:
    """Keeps the folder's account of one run, and tells the monitor the state as well.

    Args:
        revision: of the code in use, if it is a checkout.
    """

    def __init__(
        self, folder: RunFolder, monitor: TrainingMonitor, settings: Settings, revision: str | None
    ) -> None:
        self._folder, self._monitor, self._settings, self._revision = folder, monitor, settings, revision
        self._progress_due = 0.0
        self._log = get_logger("system")

    def introduce(self, plan: ResumePlan, ranks: Ranks) -> None:
        """Write run.json and config.toml at the start of a process, or have rank 0 do it for all."""
        me = ProcessId.current()
        url = f"{self._monitor.url}/metrics" if self._monitor.url else None
        members = ranks.gather("members", {"pid": me.pid, "created": me.created, "url": url})
        ranks.share("run.json", lambda: self._write(plan, members))

    def _write(self, plan: ResumePlan, members: Sequence[Mapping[str, Any]]) -> None:
        process = {
            str(rank): {"pid": member["pid"], "created": member["created"]}
            for rank, member in enumerate(members)
        }
        urls = {str(rank): member["url"] for rank, member in enumerate(members) if member["url"]}
        if plan.continues:
            self._folder.update_info(
                state="starting",
                host=socket.gethostname(),
                world_size=len(members),
                processes=process,
                metrics_urls=urls,
                restarts=self._folder.read_info().restarts + 1,
                ended=None,
                reason=None,
            )
        else:
            self._folder.write_info(
                RunInfo(
                    self._folder.id,
                    self._monitor.model,
                    world_size=len(members),
                    processes=process,
                    metrics_urls=urls,
                    git_revision=self._revision,
                    epochs=self._settings.epochs or 0,
                    parent=plan.parent,
                )
            )
        write_atomic(self._folder.config_toml, dump_toml(self._settings))

    def show_state(self, state: str, reason: str | None = None) -> None:
        """Tell the run's state, one of `RUN_STATES`, to the metrics, the page and run.json."""
        self._monitor.set_state(state)
        changes: dict[str, Any] = {"state": state, "reason": reason}
        if state in ENDED_STATES:
            changes["ended"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            self._folder.update_info(**changes)
        except (OSError, ObsinfraError) as error:
            self._log.error("run_json_not_written", error=str(error))

    def keep_progress(self, step: int, epoch: int) -> None:
        """Note the step reached when that is due."""
        if time.monotonic() >= self._progress_due:
            self._progress_due = time.monotonic() + PROGRESS_SECONDS
            self.note_progress(step, epoch)

    def note_progress(self, step: int, epoch: int) -> None:
        """Note the step reached now."""
        try:
            self._folder.write_progress(step, epoch)
        except OSError as error:
            self._log.warning("progress_not_written", error=str(error))

    def steps_reached(self) -> int:
        """The step noted last; 0 when none is."""
        progress = self._folder.read_progress()
        return (progress.step or 0) if progress is not None else 0


def git_revision() -> str | None:
    """Revision of the checkout in the working folder, if it is one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=2, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
