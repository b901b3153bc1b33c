"""Prometheus, Alertmanager and the sidecar as child processes on this machine: up, status, down.

Called by the CLI and the demo. Everything lives in one state folder; `down` stops exactly what `up` started.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obsinfra
from obsinfra.alerting.messages import StackLinks
from obsinfra.alerting.routes import check_secret_files
from obsinfra.catalog.alerts import ALERTS, Alert
from obsinfra.config.notify import Notify
from obsinfra.config.resolve import dump_toml
from obsinfra.config.settings import Settings
from obsinfra.deployment.ports import DEFAULT_PORTS, StackPorts, free_ports, in_url
from obsinfra.deployment.readiness import answers
from obsinfra.deployment.stack_configuration import check_interval, ensure_token, write_configuration
from obsinfra.deployment.stack_state import (
    Child,
    Plan,
    Program,
    StackState,
    StackUnavailable,
    state_locked,
)
from obsinfra.deployment.stopping import signal_process, stop_processes, wait_gone
from obsinfra.errors import ConfigError
from obsinfra.run.files import write_atomic

BINARIES = {
    "Prometheus": ("prometheus",),
    "Alertmanager": ("alertmanager", "prometheus-alertmanager"),
}
"""Names on PATH: upstream's and Debian's."""

INSTALL_HINT = (
    "on Debian or Ubuntu: apt install prometheus prometheus-alertmanager; elsewhere unpack the releases from "
    "https://prometheus.io/download/ into a folder on PATH"
)

RETENTION = "15d"
RESEND = "9s"
"""How often Prometheus repeats to Alertmanager what fires: at the first evaluation that is later than this
after the last time, so that it is every 10 s with evaluations each 2.5 s. People's first message waits for a
repetition, which has the outcome (docs/notifications.md). What fires in its first seconds, in which it knows
no Alertmanager, is heard with the repetition; so is all that a killed Alertmanager has forgotten. An alert
counts as resolved once it was not repeated for four times as long."""
READY_SECONDS = 60.0
READY_POLL_SECONDS = 0.05
"""Between two looks at whether the programs answer: the supervisor tells by its state file alone."""
GIVE_UP_RESTARTS = 3
DOWN_SECONDS = 20.0
SHOWN_LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class StackInfo:
    """A stack that is up.

    Attributes:
        prometheus_url, alertmanager_url, sidecar_url: `http://host:port`, without a slash at the end.
        ports: the ports in use.
        state_dir: plan, state, data, token and `logs/`.
        output_dir: the folder of runs the sidecar watches.
        started: ISO 8601, UTC.
        token_file: the sidecar's bearer token.
        children: name → process, restarts, port and address as of now; not compared.
        already_up: whether `up` found it running; not compared.
    """

    prometheus_url: str
    alertmanager_url: str
    sidecar_url: str
    ports: StackPorts
    state_dir: Path
    output_dir: Path
    started: str
    token_file: Path
    children: Mapping[str, Child] = field(compare=False)
    already_up: bool = field(default=False, compare=False)


class NativeStack:
    """The stack whose state is in one folder.

    Args:
        state_dir: usually `<output folder>/.stack`; made by `up`.
    """

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir.absolute()

    def up(
        self,
        output_dir: Path,
        *,
        ports: StackPorts = DEFAULT_PORTS,
        scrape_interval: str | None = None,
        host: str = "127.0.0.1",
        alerts: Sequence[Alert] = ALERTS,
        notify: Notify | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> StackInfo:
        """Start the stack and wait until all of it is ready; if it is up already, return what is.

        Args:
            output_dir: the folder of runs; made if missing.
            ports: where to begin looking for free ports.
            scrape_interval: Prometheus duration for scraping and rule evaluation; None keeps the file's.
            host: address everything listens on.
            alerts: the table Prometheus's rules are made from.
            notify: the user's `[notify]`, for Alertmanager; None keeps the committed routes.
            policy: the user's `[policy]`, for the sidecar.

        Raises:
            StackUnavailable: Prometheus or Alertmanager is not installed, or a program did not get ready; its
                last log lines are in the message, and what had started is stopped again.
            UserError: `scrape_interval` is no duration.
            ConfigError: the state folder is not writable, or a file with a secret that `notify` names is
                missing, unreadable or empty.
        """
        if scrape_interval is not None:
            check_interval(scrape_interval)
        with state_locked(self.state_dir, create=True):
            info = self.status()
            if info is not None:
                return replace(info, already_up=True)
            prometheus, alertmanager = (_binary(name) for name in BINARIES)
            if notify is not None:
                check_secret_files(notify)
                _check_can_read_urls(alertmanager, notify)
            self._stop_leftovers()
            output_dir = output_dir.absolute()
            output_dir.mkdir(parents=True, exist_ok=True)
            free = free_ports(host, ports)
            token_file = ensure_token(self.state_dir / "token")
            write_configuration(
                self.state_dir,
                {name: f"{in_url(host)}:{port}" for name, port in asdict(free).items()},
                token_file,
                scrape_interval=scrape_interval,
                alerts=alerts,
                notify=notify,
                links=StackLinks(slow_steps=f"http://{in_url(host)}:{free.sidecar}/?run={{run}}#slow-steps"),
                policy=policy,
            )
            # A whole config.toml, of which the sidecar reads the one table.
            write_atomic(self.state_dir / "policy.toml", dump_toml(Settings(policy=dict(policy or {}))))
            programs = self._programs(host, free, prometheus, alertmanager, output_dir, token_file)
            started = datetime.now(UTC).isoformat(timespec="milliseconds")
            Plan(str(self.state_dir), str(output_dir), started, programs).write()
            self._start_supervisor()
            try:
                return self._when_ready()
            except BaseException:
                self._down()
                raise

    def status(self) -> StackInfo | None:
        """What is up; None when nothing is."""
        state = StackState.read(self.state_dir)
        if state is None or not state.supervisor.alive():
            return None
        children = state.children
        return StackInfo(
            prometheus_url=children["prometheus"].url,
            alertmanager_url=children["alertmanager"].url,
            sidecar_url=children["sidecar"].url,
            ports=StackPorts(**{name: child.port for name, child in children.items()}),
            state_dir=self.state_dir,
            output_dir=Path(state.plan.output_dir),
            started=state.plan.started,
            token_file=(self.state_dir / "token").resolve(),
            children=children,
        )

    def down(self) -> list[str]:
        """Stop what `up` started and wait until it is gone; returns the names of what was stopped.

        Data, logs and token stay. Called twice, or with nothing up, it returns an empty list.
        """
        if not self.state_dir.is_dir():
            return []
        with state_locked(self.state_dir):
            return self._down()

    def _down(self) -> list[str]:
        state = StackState.read(self.state_dir)
        if state is None:
            return []
        running = {name: process for name, process in state.processes().items() if process.alive()}
        if "supervisor" in running:
            signal_process(running["supervisor"], kill=False)
            wait_gone(running, DOWN_SECONDS)
            # A child restarted since stack.json was read is named only in the newer one.
            state = StackState.read(self.state_dir) or state
        stop_processes(running | state.processes(), DOWN_SECONDS)
        (self.state_dir / "stack.json").unlink(missing_ok=True)
        return list(running)

    def _stop_leftovers(self) -> None:
        """Stop children that outlived a supervisor which was killed."""
        if StackState.read(self.state_dir) is not None:
            self._down()

    def _programs(
        self,
        host: str,
        ports: StackPorts,
        prometheus: str,
        alertmanager: str,
        output_dir: Path,
        token_file: Path,
    ) -> list[Program]:
        state = self.state_dir
        urls = {name: f"http://{in_url(host)}:{port}" for name, port in asdict(ports).items()}
        sidecar_arguments = [
            sys.executable,
            "-m",
            "obsinfra.control.sidecar",
            f"--output-dir={output_dir}",
            f"--port={ports.sidecar}",
            f"--token-file={token_file}",
            f"--state-dir={state / 'sidecar'}",
            f"--policy={state / 'policy.toml'}",
            f"--alertmanager-url={urls['alertmanager']}",
        ]
        if host != "127.0.0.1":
            sidecar_arguments.append(f"--host={host}")
        alertmanager_arguments = [
            alertmanager,
            f"--config.file={state / 'alertmanager/alertmanager.yml'}",
            f"--storage.path={state / 'alertmanager/data'}",
            f"--web.listen-address={in_url(host)}:{ports.alertmanager}",
            f"--web.external-url={urls['alertmanager']}",
            "--cluster.listen-address=",
        ]
        prometheus_arguments = [
            prometheus,
            f"--config.file={state / 'prometheus/prometheus.yml'}",
            f"--storage.tsdb.path={state / 'prometheus/data'}",
            f"--storage.tsdb.retention.time={RETENTION}",
            f"--web.listen-address={in_url(host)}:{ports.prometheus}",
            f"--web.external-url={urls['prometheus']}",
            "--enable-feature=exemplar-storage",
            f"--rules.alert.resend-delay={RESEND}",
        ]
        return [
            Program("sidecar", sidecar_arguments, ports.sidecar, urls["sidecar"], "/healthz"),
            Program(
                "alertmanager",
                alertmanager_arguments,
                ports.alertmanager,
                urls["alertmanager"],
                "/-/ready",
            ),
            Program(
                "prometheus",
                prometheus_arguments,
                ports.prometheus,
                urls["prometheus"],
                "/-/ready",
                after=["alertmanager"],  # or its first alerts would reach nobody
            ),
        ]

    def _start_supervisor(self) -> None:
        logs = self.state_dir / "logs"
        logs.mkdir(exist_ok=True)
        # The same package as this one, also when it runs from a folder that is not the supervisor's.
        package = str(Path(obsinfra.__file__).parents[1])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        with (logs / "supervisor.log").open("ab") as output:
            started = subprocess.run(
                [sys.executable, "-m", "obsinfra.deployment.supervisor", str(self.state_dir)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.state_dir,
                env=os.environ | {"PYTHONPATH": path},
                timeout=READY_SECONDS,
                check=False,
            )
        if started.returncode != 0:
            raise StackUnavailable(
                f"the supervisor did not start:\n{self._last_lines('supervisor')}", "a working Python"
            )

    def _when_ready(self) -> StackInfo:
        """Wait until every program answers, or raise with the log of the first that does not."""
        deadline = time.monotonic() + READY_SECONDS
        plan = Plan.read(self.state_dir)
        while True:
            state = StackState.read(self.state_dir)
            waiting = [program.name for program in plan.programs if not _ready(program, state)]
            if not waiting and (info := self.status()) is not None:
                return info
            culprit = next((name for name in waiting if _keeps_failing(state, name)), None)
            if state is not None and not state.supervisor.alive():
                culprit = "supervisor"
            elif culprit is None and time.monotonic() > deadline:
                culprit = waiting[0] if waiting and state is not None else "supervisor"
            if culprit is not None:
                raise StackUnavailable(
                    f"{culprit} did not become ready; {self._log(culprit)} ends with:\n"
                    f"{self._last_lines(culprit)}",
                    "a program that starts and answers",
                    "correct what the log names, then try again",
                )
            time.sleep(READY_POLL_SECONDS)

    def _log(self, name: str) -> Path:
        return self.state_dir / "logs" / f"{name}.log"

    def _last_lines(self, name: str) -> str:
        try:
            text = self._log(name).read_text(errors="replace")
        except FileNotFoundError:
            return "  (no log)"
        return "\n".join(f"  {line}" for line in text.splitlines()[-SHOWN_LOG_LINES:])


def find_binary(program: str) -> str | None:
    """Path of `Prometheus` or `Alertmanager` on PATH, under upstream's or Debian's name; None if absent."""
    return next((found for name in BINARIES[program] if (found := shutil.which(name))), None)


def _binary(program: str) -> str:
    found = find_binary(program)
    if found is None:
        missing = [name for name in BINARIES if find_binary(name) is None]
        raise StackUnavailable(
            f"{' and '.join(missing)} not found on PATH", "the native binaries", f"install: {INSTALL_HINT}"
        )
    return found


def _check_can_read_urls(alertmanager: str, notify: Notify) -> None:
    """Refuse `url_file` of a webhook where Alertmanager is older than the version that introduced it."""
    urls = ("notify.webhook.url_file", "notify.watchdog.url_file")
    using = [name for name in notify.secret_files if name in urls]
    if not using:
        return
    said = subprocess.run(
        [alertmanager, "--version"], capture_output=True, text=True, timeout=READY_SECONDS, check=False
    )
    version = re.search(r"version (\d+)\.(\d+)", said.stdout + said.stderr)
    if version is not None and (int(version[1]), int(version[2])) < (0, 26):
        raise ConfigError(
            f"{using[0]} with Alertmanager {version[1]}.{version[2]}",
            "Alertmanager 0.26 or newer to read a webhook's address from a file",
            "use url if the address is no secret, or install a newer Alertmanager",
        )


def _ready(program: Program, state: StackState | None) -> bool:
    """Whether the program runs and answers; a stranger's answer on its port does not count."""
    return state is not None and state.children[program.name].process is not None and answers(program)


def _keeps_failing(state: StackState | None, name: str) -> bool:
    """Whether a program has crashed so often at its start that waiting longer is no use."""
    return state is not None and state.children[name].restarts >= GIVE_UP_RESTARTS
