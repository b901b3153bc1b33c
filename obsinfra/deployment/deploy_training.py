"""One training with its stack, from Python: start, look, stop. For scripts and notebooks that deploy a run.

What it starts is `obsinfra train` in a process of its own, and the stack as `obsinfra up` would; it adds
nothing to either.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import obsinfra
from obsinfra.config.resolve import dump_toml, resolve
from obsinfra.config.settings import Settings
from obsinfra.deployment.compose_stack import ComposeInfo
from obsinfra.deployment.native_stack import StackInfo
from obsinfra.deployment.which_stack import Way, WhichStack
from obsinfra.errors import ConfigError, ObsinfraError
from obsinfra.run.files import write_atomic
from obsinfra.run.folder import RunFolder, check_run_id, new_run_id

START_SECONDS = 120.0
POLL_SECONDS = 0.05
"""Between two looks at the run folder, which the trainer makes in a process of its own."""
SHOWN_LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class DeploymentConfig:
    """What to deploy.

    Attributes:
        model_name: a built-in workload, or `your.module:factory`.
        output_dir: the folder of runs.
        run: the run's name; None makes one from the model and the time.
        stack: `auto` (containers where an engine answers, else processes), `compose`, `native`, or `off`.
        resume: go on with the run of that name if it was interrupted.
        settings: any other setting by name, as `{"epochs": 3, "batch_size": 64}`; see `obsinfra config show`.
    """

    model_name: str = "tactical_mappo"
    output_dir: Path = Path("runs")
    run: str | None = None
    stack: Literal["auto", "compose", "native", "off"] = "auto"
    resume: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


class TrainingDeployment:
    """A training and its stack. As a context manager it stops the training at the end, and leaves the stack.

    Args:
        config: what to deploy.

    Raises:
        ConfigError: a setting is unknown or out of bounds, or the run's name is none.
    """

    def __init__(self, config: DeploymentConfig = DeploymentConfig()) -> None:
        self.config = config
        unknown = sorted(set(config.settings) - set(Settings.model_fields))
        if unknown:
            raise ConfigError(
                f"unknown setting {unknown[0]!r}",
                f"one of {', '.join(Settings.model_fields)}",
                "see 'obsinfra config show'",
            )
        run = check_run_id(config.run or new_run_id(config.model_name.rpartition(":")[2]))
        output_dir = config.output_dir.absolute()
        named = {"model_name": config.model_name, "output_dir": output_dir, "run": run}
        self.settings = resolve({**config.settings, **named}).settings
        self.folder = RunFolder(output_dir / run)
        self.stack = WhichStack(config.output_dir)
        self._process: subprocess.Popen[bytes] | None = None

    def start_stack(self) -> StackInfo | ComposeInfo | None:
        """Start the stack if it is not up; None when the configuration wants none.

        Raises:
            UserError: it cannot run here, and was not left to `auto`.
        """
        if self.config.stack == "off":
            return None
        ways: dict[str, Way] = {"compose": "compose", "native": "native"}
        return self.stack.up(
            ways.get(self.config.stack),
            alerts=self.settings.alert_table(),
            notify=self.settings.notify,
            policy=self.settings.policy,
        )

    def start(self) -> TrainingDeployment:
        """Start stack and training; returns once the training runs.

        Raises:
            UserError: the stack cannot run here.
            ObsinfraError: the training ended before it ran, or does not run in time; its last words are in
                the message.
        """
        if self._process is not None and self._process.poll() is None:
            return self
        self.start_stack()
        self.config.output_dir.mkdir(parents=True, exist_ok=True)
        settings = self._file(".toml")
        write_atomic(settings, dump_toml(self.settings))
        arguments = [sys.executable, "-m", "obsinfra.cli.main", "train", f"--config={settings}"]
        if self.config.resume:
            arguments.append("--resume=auto")
        with self._file(".log").open("ab") as output:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": _package_path()},
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._ours():
            if self._process.poll() is not None:
                if self._process.returncode == 0:
                    return self  # shorter than a look at it
                raise ObsinfraError(f"the training did not start:\n{self._last_lines()}")
            if time.monotonic() > deadline:
                self.stop(seconds=0)
                raise ObsinfraError(f"no training within {START_SECONDS:.0f} s:\n{self._last_lines()}")
            time.sleep(POLL_SECONDS)
        return self

    def state(self) -> str:
        """What run.json says, `dead` when its trainer went without a word, `new` before the first start."""
        if not self.folder.run_json.exists():
            return "new"
        return self.folder.present_state(self.folder.read_info())

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for the end of the training; its exit code, None if it has not ended or was not started."""
        if self._process is None:
            return None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, seconds: float = 60.0) -> int | None:
        """Have the training checkpoint and stop; its exit code. It is killed if that takes over `seconds`."""
        if self._process is None or self._process.poll() is not None:
            return self.wait(0)
        self._process.send_signal(signal.SIGTERM)
        code = self.wait(seconds)
        if code is None:
            self._process.kill()
            code = self._process.wait()
        return code

    def down(self, *, volumes: bool = False) -> list[str]:
        """Stop the training, then the stack; returns the names of what was stopped of the stack."""
        self.stop()
        return self.stack.down(volumes=volumes)

    def __enter__(self) -> TrainingDeployment:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _file(self, ending: str) -> Path:
        """Beside the run's folder, which the trainer makes itself."""
        return self.config.output_dir.absolute() / f".{self.folder.id}{ending}"

    def _ours(self) -> bool:
        """Whether run.json is of the process that was started, and says that it trains."""
        if self._process is None or not self.folder.run_json.exists():
            return False
        info = self.folder.read_info()
        pids = [int(process["pid"]) for process in info.processes.values()]
        return self._process.pid in pids and info.state != "starting"

    def _last_lines(self) -> str:
        lines = self._file(".log").read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-SHOWN_LOG_LINES:])


def _package_path() -> str:
    """The same package as this one, also when it runs from a folder that is not the child's."""
    package = str(Path(obsinfra.__file__).parents[1])
    return os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
