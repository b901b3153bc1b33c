"""The stack in containers, through `docker compose`: up, status, down.

Called by `which_stack` and the CLI. Runs docker-compose.yml as it is, with the configuration files that the
native stack would write, and an environment that puts this machine's values into it. Both lie in
`<state folder>/compose`, so that `down` and a person with `docker compose` find them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from obsinfra.alerting.messages import StackLinks, jaeger_search
from obsinfra.alerting.routes import absolute, check_secret_files
from obsinfra.catalog.alerts import ALERTS, Alert
from obsinfra.config.notify import Notify
from obsinfra.config.resolve import dump_toml
from obsinfra.config.settings import Settings
from obsinfra.dashboards.addresses import RUN
from obsinfra.deployment.ports import DEFAULT_COMPOSE_PORTS, ComposePorts, free_port, free_ports
from obsinfra.deployment.stack_configuration import (
    SERVICES,
    TOKEN_PATH,
    check_interval,
    ensure_token,
    find_stack_files,
    write_configuration,
)
from obsinfra.deployment.stack_state import StackUnavailable, state_locked
from obsinfra.errors import ConfigError, ObsinfraError
from obsinfra.run.files import write_atomic, write_json_atomic

UP_SECONDS = 900.0
"""Images are pulled and one is built at the first start."""

READY_SECONDS = 180
COMMAND_SECONDS = 60.0
DOWN_SECONDS = 180.0
SHOWN_LOG_LINES = 12
PORT_ATTEMPTS = 3
PORT_TAKEN = "port is already allocated|address already in use"

NOTIFY_FOLDER = "/run/notify"
"""Where Alertmanager's container sees the files with secrets that `[notify]` names."""

VERSION = 1


@dataclass(frozen=True, slots=True)
class ComposeInfo:
    """A stack in containers that is up.

    Attributes:
        prometheus_url, alertmanager_url, sidecar_url: on this machine, without a slash at the end.
        ports: what is published on 127.0.0.1.
        state_dir, output_dir: as `up` was given them.
        started: ISO 8601, UTC.
        token_file: the sidecar's bearer token.
        project: the name Compose knows it by.
        environment_file: what `docker compose --env-file` takes to mean this very stack.
        trainer_host: the address of this machine on which containers reach what listens there; None where
            `host.docker.internal` leads to the loopback address (Docker Desktop).
        services: name → state as Compose tells it (`running, healthy`, `exited`, …); not compared.
        already_up: whether `up` found it running; not compared.
    """

    prometheus_url: str
    alertmanager_url: str
    sidecar_url: str
    ports: ComposePorts
    state_dir: Path
    output_dir: Path
    started: str
    token_file: Path
    project: str
    environment_file: Path
    trainer_host: str | None
    services: Mapping[str, str] = field(compare=False)
    already_up: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class _Record:
    """compose.json: what `up` started."""

    project: str
    output_dir: str
    started: str
    files: str
    profiles: list[str]
    ports: dict[str, int]
    trainer_host: str | None
    version: int = VERSION


class ComposeStack:
    """The stack in containers whose state is in one folder.

    Args:
        state_dir: usually `<output folder>/.stack`; made by `up`.
    """

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir.absolute()
        self.folder = self.state_dir / "compose"

    def up(
        self,
        output_dir: Path,
        *,
        ports: ComposePorts = DEFAULT_COMPOSE_PORTS,
        scrape_interval: str | None = None,
        alerts: Sequence[Alert] = ALERTS,
        notify: Notify | None = None,
        policy: Mapping[str, Any] | None = None,
        profiles: Sequence[str] = (),
        services: Sequence[str] = (),
    ) -> ComposeInfo:
        """Start the stack and wait until all of it is healthy; if it is up already, return what is.

        Args:
            output_dir: the folder of runs; made if missing.
            ports: where to begin looking for free ports on 127.0.0.1.
            scrape_interval, alerts, notify, policy: as `NativeStack.up` takes them. Addresses in `notify` are
                as a container sees them.
            profiles: of docker-compose.yml: `dev`, `logs`, `gpu`, `train`, `train-gpu`.
            services: only these and what they need; empty: all.

        Raises:
            StackUnavailable: no engine answers, or a service did not become healthy; its last log lines are
                in the message, and what had started is stopped again.
            UserError: `scrape_interval` is no duration.
            ConfigError: the state folder is not writable, or a file with a secret that `notify` names is
                missing, unreadable or empty.
        """
        if scrape_interval is not None:
            check_interval(scrape_interval)
        problem = engine_problem()
        if problem is not None:
            raise StackUnavailable(
                problem, "a running Docker engine with Compose", "start it, or use --native"
            )
        with state_locked(self.state_dir, create=True):
            info = self.status()
            if info is not None:
                return replace(info, already_up=True)
            if notify is not None:
                check_secret_files(notify)
            output_dir = output_dir.absolute()
            output_dir.mkdir(parents=True, exist_ok=True)
            for attempt in range(1, PORT_ATTEMPTS + 1):
                record = self._prepare(
                    output_dir, ports, scrape_interval, alerts, notify, policy, list(profiles)
                )
                try:
                    waiting = ("--wait", "--wait-timeout", str(READY_SECONDS))
                    said = self._compose(record, "up", "--detach", *waiting, *services, seconds=UP_SECONDS)
                    if said.returncode == 0 and (info := self.status()) is not None:
                        return info
                    if attempt < PORT_ATTEMPTS and re.search(PORT_TAKEN, said.stderr):
                        continue  # somebody took a port since it was found free; find others
                    raise StackUnavailable(
                        self._what_failed(record, said.stderr),
                        "containers that become healthy",
                        "correct what the log names, then try again",
                    )
                except BaseException:
                    # An engine that has gone takes nothing down; compose.json stays, for a later `down`.
                    with contextlib.suppress(StackUnavailable):
                        self._down(volumes=False)
                    raise
            raise AssertionError("the last attempt returns or raises")

    def _prepare(
        self,
        output_dir: Path,
        ports: ComposePorts,
        scrape_interval: str | None,
        alerts: Sequence[Alert],
        notify: Notify | None,
        policy: Mapping[str, Any] | None,
        profiles: list[str],
    ) -> _Record:
        """Write all that `up` needs, for ports that are free now."""
        free = free_ports("127.0.0.1", ports)
        self._write_configuration(free, scrape_interval, alerts, notify, policy)
        record = _Record(
            project=f"obsinfra-{hashlib.sha256(str(self.state_dir).encode()).hexdigest()[:8]}",
            output_dir=str(output_dir),
            started=datetime.now(UTC).isoformat(timespec="milliseconds"),
            files=str(find_stack_files()),
            profiles=profiles,
            ports=asdict(free),
            trainer_host=bridge_address(),
        )
        self._write_environment(record)
        write_json_atomic(self.folder / "compose.json", asdict(record))
        return record

    def status(self) -> ComposeInfo | None:
        """What is up; None when nothing is, or no engine answers."""
        record = self._record()
        if record is None:
            return None
        try:
            services = self._services(record)
        except StackUnavailable:
            return None
        if not any(state.startswith("running") for state in services.values()):
            return None
        ports = ComposePorts(**record.ports)
        return ComposeInfo(
            prometheus_url=f"http://127.0.0.1:{ports.prometheus}",
            alertmanager_url=f"http://127.0.0.1:{ports.alertmanager}",
            sidecar_url=f"http://127.0.0.1:{ports.sidecar}",
            ports=ports,
            state_dir=self.state_dir,
            output_dir=Path(record.output_dir),
            started=record.started,
            token_file=(self.state_dir / "token").resolve(),
            project=record.project,
            environment_file=self.folder / "stack.env",
            trainer_host=record.trainer_host,
            services=services,
        )

    def down(self, *, volumes: bool = False) -> list[str]:
        """Stop and remove the containers that `up` started; returns the services' names.

        Args:
            volumes: remove what Prometheus, Alertmanager, Grafana and Jaeger have stored too.

        Raises:
            StackUnavailable: the engine does not answer, or says why it cannot.
        """
        if not self.folder.is_dir():
            return []
        with state_locked(self.state_dir):
            return self._down(volumes=volumes)

    def recorded(self) -> bool:
        """Whether `up` has started something that `down` has not stopped."""
        return (self.folder / "compose.json").exists()

    def trainer_host(self) -> str | None:
        """Where a trainer on this machine is reached from the recorded containers; None: on loopback.

        Asks no engine; an address that this machine no longer has does not count.
        """
        record = self._record()
        if record is None or record.trainer_host is None or not _is_ours(record.trainer_host):
            return None
        return record.trainer_host

    def _down(self, *, volumes: bool) -> list[str]:
        record = self._record()
        if record is None:
            return []
        services = sorted(self._services(record))
        everything = replace(record, profiles=["*"])
        options = ("--volumes",) if volumes else ()
        said = self._compose(everything, "down", "--remove-orphans", *options, seconds=DOWN_SECONDS)
        if said.returncode != 0:
            raise StackUnavailable(
                f"docker compose down: {_last_line(said.stderr)}", "an engine that stops its containers"
            )
        (self.folder / "compose.json").unlink(missing_ok=True)
        return services

    def _record(self) -> _Record | None:
        path = self.folder / "compose.json"
        try:
            return _Record(**json.loads(path.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ObsinfraError(f"{path} is not what 'obsinfra up' wrote ({error!r}); remove it") from error

    def _write_configuration(
        self,
        ports: ComposePorts,
        scrape_interval: str | None,
        alerts: Sequence[Alert],
        notify: Notify | None,
        policy: Mapping[str, Any] | None,
    ) -> None:
        # The user of a container is another one: files are readable by all, and this folder lets nobody in.
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.folder.chmod(0o700)
        for room in ("secrets", "notify", "targets", "prometheus", "alertmanager"):
            (self.folder / room).mkdir(exist_ok=True)
        token = ensure_token(self.state_dir / "token").read_text()
        write_atomic(self.folder / "secrets/obsinfra_token", token, mode=0o444)
        password = self.folder / "secrets/grafana_admin_password"
        if not password.exists():
            write_atomic(password, secrets.token_urlsafe(18), mode=0o444)
        write_configuration(
            self.folder,
            SERVICES,
            Path(TOKEN_PATH),
            scrape_interval=scrape_interval,
            alerts=alerts,
            notify=notify,
            runbooks=f"http://127.0.0.1:{ports.sidecar}/runbooks",
            paths=self._copy_secrets(notify),
            links=StackLinks(
                grafana=f"http://127.0.0.1:{ports.grafana}/d/{RUN}?var-run={{run}}",
                traces=jaeger_search(f"http://127.0.0.1:{ports.jaeger}"),
            ),
            policy=policy,
        )
        write_atomic(self.folder / "policy.toml", dump_toml(Settings(policy=dict(policy or {}))))
        committed = find_stack_files() / "deploy/compose/targets"
        shutil.copytree(committed, self.folder / "targets", dirs_exist_ok=True)
        hosts = yaml.safe_load((committed / "hosts.yml").read_text())
        for group in hosts:
            group["labels"]["host"] = os.uname().nodename
        write_atomic(self.folder / "targets/hosts.yml", yaml.safe_dump(hosts))
        for path in self.folder.rglob("*"):
            path.chmod(
                0o755 if path.is_dir() else 0o444 if path.parent.name in ("secrets", "notify") else 0o644
            )

    def _copy_secrets(self, notify: Notify | None) -> dict[str, str]:
        """Copy the files that `[notify]` names to where Alertmanager's container sees them.

        Returns: the path as in the settings → the path in the container.
        """
        shutil.rmtree(self.folder / "notify")
        (self.folder / "notify").mkdir()
        if notify is None:
            return {}
        files = dict(notify.secret_files)
        if notify.email is not None and notify.email.ca_file is not None:
            files["notify.email.ca_file"] = notify.email.ca_file
        found = {}
        for setting, path in files.items():
            source = absolute(path)
            try:
                write_atomic(self.folder / "notify" / setting, source.read_bytes(), mode=0o444)
            except OSError as error:
                raise ConfigError(
                    f"{setting} = {str(source)!r}: {error.strerror}", "a readable file"
                ) from error
            found[str(source)] = f"{NOTIFY_FOLDER}/{setting}"
        return found

    def _write_environment(self, record: _Record) -> None:
        values = {
            "COMPOSE_PROJECT_NAME": record.project,
            "COMPOSE_FILE": f"{record.files}/docker-compose.yml",
            "COMPOSE_PROFILES": ",".join(record.profiles),
            "OBSINFRA_UID": str(os.getuid()),
            "OBSINFRA_GID": str(os.getgid()),
            "OBSINFRA_RUNS": record.output_dir,
            "OBSINFRA_TRAINER_CPUS": str(os.cpu_count() or 1),  # an engine refuses more than there are
            "OBSINFRA_STACK": str(self.folder),
            "OBSINFRA_CONFIG": str(self.folder),
            **{f"OBSINFRA_PORT_{name.upper()}": str(port) for name, port in record.ports.items()},
        }
        for name, value in values.items():
            if any(character in value for character in "'\n"):
                raise ConfigError(
                    f"{name}={value!r}", "a path without quotes or line breaks", "choose --output-dir"
                )
        text = "".join(f"{name}='{value}'\n" for name, value in values.items())
        write_atomic(self.folder / "stack.env", text, mode=0o644)

    def _services(self, record: _Record) -> dict[str, str]:
        """Service → its container's state, with its health where that is known."""
        listed = replace(record, profiles=["*"])
        said = self._compose(listed, "ps", "--all", "--format", "json", seconds=COMMAND_SECONDS)
        if said.returncode != 0:
            raise StackUnavailable(
                f"docker compose ps: {_last_line(said.stderr)}", "a Docker engine that answers"
            )
        return {
            row["Service"]: ", ".join(filter(None, (row["State"], row.get("Health"))))
            for row in map(json.loads, filter(None, said.stdout.splitlines()))
        }

    def _what_failed(self, record: _Record, said: str) -> str:
        """What Compose said, and the last log lines of a service that is not well."""
        text = f"docker compose up: {_last_line(said)}"
        try:
            services = self._services(record)
        except StackUnavailable:
            return text
        ill = [name for name, state in services.items() if state not in ("running", "running, healthy")]
        if not ill:
            return text
        logs = self._compose(
            record,
            *("logs", "--no-log-prefix", "--tail", str(SHOWN_LOG_LINES), ill[0]),
            seconds=COMMAND_SECONDS,
        )
        lines = "\n".join(f"  {line}" for line in (logs.stdout + logs.stderr).splitlines())
        return f"{text}\n{ill[0]} is {services[ill[0]]}; its log ends with:\n{lines or '  (no log)'}"

    def _compose(self, record: _Record, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
        # An .env or COMPOSE_* of the working folder or the shell must not change what is meant.
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("COMPOSE_") and not name.startswith("OBSINFRA_PORT_")
        }
        profiles = [word for profile in record.profiles for word in ("--profile", profile)]
        return docker(
            "compose",
            *("--project-name", record.project, "--project-directory", record.files),
            *("--file", f"{record.files}/docker-compose.yml", "--env-file", str(self.folder / "stack.env")),
            *profiles,
            *arguments,
            seconds=seconds,
            environment=environment,
        )


def engine_problem() -> str | None:
    """Why no stack in containers can be run here, in one line; None when an engine and Compose answer."""
    if shutil.which("docker") is None:
        return "docker not found on PATH"
    said = docker("version", "--format", "{{.Server.Version}}", seconds=COMMAND_SECONDS)
    if said.returncode != 0:
        return f"no Docker engine answers ({_last_line(said.stderr)})"
    if docker("compose", "version", "--short", seconds=COMMAND_SECONDS).returncode != 0:
        return "docker has no Compose plugin"
    return None


def bridge_address() -> str | None:
    """This machine's address on Docker's bridge, which is `host.docker.internal` in a container on Linux.

    None where the engine runs in a machine of its own, as Docker Desktop's does.
    """
    said = docker(
        *("network", "inspect", "bridge", "--format", "{{json (index .IPAM.Config 0)}}"),
        seconds=COMMAND_SECONDS,
    )
    try:
        network = json.loads(said.stdout)
        # Engines that chose the subnet themselves do not name the gateway: it is the subnet's first address.
        address = network.get("Gateway") or str(ipaddress.ip_network(network["Subnet"])[1])
    except (ValueError, KeyError, AttributeError):
        return None
    return address if _is_ours(address) else None


def docker(
    *arguments: str, seconds: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `docker …` to its end; a run beyond `seconds` is ended and counts as failed."""
    command = ["docker", *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {seconds:.0f} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error.strerror or error))


def _is_ours(address: str) -> bool:
    """Whether something of this machine can listen on the address."""
    try:
        free_port(address, 0, set())
    except ConfigError:
        return False
    return True


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"
