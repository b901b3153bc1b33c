"""The stack in real containers: the story that docs/compose.md tells, and each service alone in two versions.

One file, since one engine serves all of it. Left out are services whose images only a registry has: Grafana,
the collector, Jaeger, mailpit (a mail server of the test's own takes its place), Loki and the GPU exporter.
"""

from __future__ import annotations

import contextlib
import email
import email.policy
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from aiosmtpd.controller import Controller
from engine import OLD, Engine, image, prepare_images, running_engine
from waiting import wait_for

from obsinfra.deployment.compose_stack import ComposeInfo, ComposeStack, bridge_address
from obsinfra.deployment.ports import DEFAULT_COMPOSE_PORTS, free_port
from obsinfra.run.folder import RunFolder

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(900)]

TOP = Path(__file__).parents[2]
PORTS = asdict(DEFAULT_COMPOSE_PORTS)
SERVICES = ("prometheus", "node-exporter")
"""And what they need: the sidecar and Alertmanager."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running_engine() as started:
        ready = prepare_images(started)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ready.environment.items():
                patch.setenv(name, value)
            yield ready


# ---- the whole story ---------------------------------------------------------------------------------------


@dataclass
class Mails:
    """A mail server on Docker's bridge, where containers reach it, and what arrived."""

    port: int
    received: list[EmailMessage] = field(default_factory=list)

    def about(self, alert: str, run: str) -> list[str]:
        """The texts of the mails that name both."""
        texts = []
        for mail in self.received:
            body = mail.get_body(("plain", "html"))
            texts.append(f"{mail['subject']}\n{body.get_content() if body is not None else ''}")
        return [text for text in texts if alert in text and run in text]


@contextlib.contextmanager
def mail_server(host: str) -> Iterator[Mails]:
    mails = Mails(free_port(host, 0, set()))

    class Handler:
        async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
            mail = email.message_from_bytes(envelope.content, policy=email.policy.default)
            assert isinstance(mail, EmailMessage)
            mails.received.append(mail)
            return "250 OK"

    controller = Controller(Handler(), hostname=host, port=mails.port)
    controller.start()
    try:
        yield mails
    finally:
        controller.stop()


@dataclass
class Timeline:
    """What happened when; printed at the end, and what docs/compose.md shows."""

    started: float = field(default_factory=time.monotonic)
    moments: list[tuple[float, str]] = field(default_factory=list)

    def note(self, what: str) -> None:
        self.moments.append((time.monotonic() - self.started, what))

    def __str__(self) -> str:
        return "\n".join(f"{seconds:8.1f}  {what}" for seconds, what in self.moments)


class Story:
    """A stack in containers for one folder of runs, and the two trainers beside it."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder, self.engine = folder, engine
        self.runs = folder / "runs"
        self.stack = ComposeStack(self.runs / ".stack")
        self.at: ComposeInfo | None = None
        self.timeline = Timeline()

    def obsinfra(self, *words: str, seconds: float = 400) -> str:
        """Run `obsinfra …` as somebody at a terminal; fails with what it said if it did not succeed."""
        said = subprocess.run(
            [sys.executable, "-m", "obsinfra.cli.main", *words, "--output-dir", str(self.runs)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert said.returncode == 0, said.stdout + said.stderr
        return said.stdout

    @property
    def environment(self) -> dict[str, str]:
        # Ports far from the usual ones, which other tests' stacks take meanwhile.
        ports = {f"OBSINFRA_PORT_{name.upper()}": str(port + 20_000) for name, port in PORTS.items()}
        return self.engine.environment | ports | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}

    @property
    def info(self) -> ComposeInfo:
        """Where everything is, which does not change."""
        self.at = self.at or self.stack.status()
        assert self.at is not None
        return self.at

    def services(self) -> dict[str, str]:
        """What Compose says of each service now."""
        info = self.stack.status()
        return dict(info.services) if info is not None else {}

    def is_well(self, name: str) -> bool:
        return self.services().get(name) == "running, healthy"

    def compose(self, *arguments: str) -> None:
        """`docker compose …` by hand; the trainer with this environment's packages."""
        info = self.info
        said = subprocess.run(
            [
                *("docker", "compose", "--project-name", info.project, "--project-directory", str(TOP)),
                *("--env-file", str(info.environment_file), "--profile", "train"),
                *("--file", str(TOP / "docker-compose.yml"), "--file", str(self._with_our_packages())),
                *arguments,
            ],
            env=self.engine.environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert said.returncode == 0, said.stderr[-3000:]

    def _with_our_packages(self) -> Path:
        """The trainer's image would be a build of minutes: the sidecar's, with torch mounted into it."""
        target = self.folder / "trainer.yml"
        trainer = {
            "image": image("sidecar"),
            "entrypoint": ["python3", "-m", "obsinfra.cli.main"],
            "command": ["train", "--output-dir=/runs", "--run=boxed", *TRAINING],
            "environment": {"PYTHONPATH": "/packages", "OMP_NUM_THREADS": "1"},
            "volumes": [f"{Path(httpx.__file__).parents[1]}:/packages:ro"],
            "shm_size": "256m",
        }
        target.write_text(yaml.safe_dump({"services": {"trainer": trainer}}))
        return target

    @contextlib.contextmanager
    def trainer_on_the_host(self) -> Iterator[subprocess.Popen[bytes]]:
        command = ["train", "--output-dir", str(self.runs), "--run=host", *TRAINING]
        with (self.folder / "host.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "obsinfra.cli.main", *command],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    def ask(self, query: str, **parameters: str) -> list[dict[str, Any]]:
        """Prometheus's answer to an instant query."""
        try:
            answer = httpx.get(
                f"{self.info.prometheus_url}/api/v1/query",
                params={"query": query, **parameters},
                trust_env=False,
                timeout=10,
            )
            return list(answer.json()["data"]["result"])
        except (httpx.HTTPError, ValueError, KeyError):
            return []

    def up(self, job: str) -> dict[str, float]:
        """Run or instance → whether the last scrape succeeded."""
        return {
            row["metric"].get("run", row["metric"]["instance"]): float(row["value"][1])
            for row in self.ask(f'up{{job="{job}"}}')
        }

    def both_are_seen(self, since: float = 0.0) -> bool:
        """Whether both trainers were scraped with success later than `since`, epoch seconds."""
        rows = self.ask('timestamp(up{job="trainers"} == 1)')
        seen = {row["metric"]["run"] for row in rows if float(row["value"][1]) > since}
        return seen == {"host", "boxed"}

    def api(self, method: str, path: str, **request: Any) -> Any:
        """The sidecar's answer under `/v1`, with the token."""
        token = (self.runs / ".stack/token").read_text().strip()
        found = httpx.request(
            method,
            f"{self.info.sidecar_url}/v1{path}",
            headers={"authorization": f"Bearer {token}"},
            trust_env=False,
            timeout=30,
            **request,
        )
        assert found.is_success, found.text
        return found.json()

    def commands(self, run: str) -> list[dict[str, Any]]:
        """What the run was told through the sidecar, newest first."""
        return list(self.api("GET", f"/runs/{run}/commands"))

    def told(self, run: str, action: str) -> dict[str, Any]:
        """Give a command through the sidecar's API and wait until it is settled."""
        given = self.api("POST", f"/runs/{run}/commands", json={"action": action, "who": "test"})

        def settled() -> dict[str, Any] | None:
            [row] = [row for row in self.commands(run) if row["id"] == given["id"]]
            return row if row["outcome"] != "waiting" else None

        return wait_for(settled, f"{run} settles {action}")

    def words(self) -> str:
        """The last that the trainers said."""
        return (self.folder / "host.log").read_text()[-500:] + self.engine.docker("ps", "--all").stdout

    def emergency(self, run: str) -> list[Path]:
        return list((self.runs / run / "checkpoints/manifests").glob("*-emergency-*.json"))


SERVICE_NAMES = ("prometheus", "alertmanager", "sidecar", "node-exporter")


TRAINING = (
    *("--model-name=digits", "--epochs=1000000", "--seed=3", "--log-every-seconds=5", "--sample-seconds=0.5"),
    *("--disable-testing", "--stack=off", "--inject=explode@400x1000000000"),
)
"""Gradients explode after a while and from then on: the alert fires whenever Prometheus first looks."""

NOTIFY = """
[notify.email]
smarthost = "host.docker.internal:{port}"
from = "obsinfra@example.org"
to = ["people@example.org"]
require_tls = false
"""


def test_the_whole_story_in_containers(engine: Engine, tmp_path: Path) -> None:
    """Up; a trainer on the host and one in a container are found and saved when their alert fires; people get
    mail; each service is restarted and all goes on; down leaves nothing."""
    bridge = bridge_address()
    assert bridge is not None
    story = Story(tmp_path, engine)
    note = story.timeline.note
    with contextlib.ExitStack() as ends, mail_server(bridge) as mails:
        (tmp_path / "obsinfra.toml").write_text(NOTIFY.format(port=mails.port))
        services = [word for name in SERVICES for word in ("--service", name)]
        note("obsinfra up --compose")
        said = story.obsinfra("up", "--compose", "--scrape-interval=1s", *services)
        ends.callback(lambda: story.stack.down(volumes=True))
        assert "as asked" in said and f"listen on {bridge}" in said
        assert story.info.ports.prometheus >= PORTS["prometheus"] + 20_000
        assert story.services() == dict.fromkeys(SERVICE_NAMES, "running, healthy")
        note("all services are healthy")
        assert_confined(engine)

        ends.enter_context(story.trainer_on_the_host())
        story.compose("up", "--detach", "--no-deps", "trainer")
        note("a trainer started on the host, one in a container")
        wait_for(story.both_are_seen, f"Prometheus scrapes both; host.log: {story.words()}", 120)
        note("Prometheus scrapes both")
        assert "containers: listening on" in (tmp_path / "host.log").read_text()

        for run in ("host", "boxed"):
            wait_for(lambda run=run: story.emergency(run), f"emergency checkpoint of {run}", 120)
            note(f"{run}: the gradients explode, the emergency checkpoint is committed")
            [done] = [row for row in story.commands(run) if row["action"] == "emergency_checkpoint"][-1:]
            assert done["alert"] == "GradientExplosion"
        for run in ("host", "boxed"):
            assert story.told(run, "checkpoint")["outcome"] == "done"
            note(f"{run}: a command through the sidecar is done")
        for run in ("host", "boxed"):
            wait_for(lambda run=run: mails.about("GradientExplosion", run), f"mail about {run}", 60)
            note(f"mail about {run} arrives")

        for name in SERVICE_NAMES:
            before = time.time()
            story.compose("restart", name)
            wait_for(lambda name=name: story.is_well(name), f"{name} is well")
            after = time.time()
            wait_for(
                lambda after=after: story.both_are_seen(after), f"both are scraped after a restart of {name}"
            )
            note(f"{name} restarted, both trainers are scraped")
            # What was stored is there still: a volume for Prometheus, the journal for the sidecar.
            assert story.ask('up{job="trainers",run="host"}', time=f"{before - 1:.0f}"), name
        assert story.told("boxed", "checkpoint")["outcome"] == "done"
        assert any(row["alert"] == "GradientExplosion" for row in story.commands("host"))
        wait_for(lambda: story.up("hosts") and min(story.up("hosts").values()) == 1, "the host is scraped")

        # From the host into the container by the folder alone, as where the kernels differ.
        story.obsinfra("command", "boxed", "checkpoint", "--door", "inbox")
        assert story.told("host", "stop")["outcome"] == "done"
        story.compose("stop", "trainer")
        for run in ("host", "boxed"):
            folder = RunFolder(story.runs / run)
            wait_for(lambda folder=folder: folder.read_info().state == "stopped", f"{run} stops")
        note("both trainers stopped, the one by a command, the other by its container's SIGTERM")

        said = story.obsinfra("down", "--volumes")
        assert set(SERVICE_NAMES) <= set(said.removeprefix("stopped ").strip().replace(",", "").split())
        for kind in ("ps --all", "volume ls"):
            assert engine.ran(*kind.split(), "--quiet") == "", kind
        assert "obsinfra" not in engine.ran("network", "ls", "--format", "{{.Name}}")
        note("obsinfra down --volumes: no container, volume or network is left")
        print(f"\n{story.timeline}")


def assert_confined(engine: Engine) -> None:
    """What the file says of each container is what the engine made of it."""
    for name in engine.ran("ps", "--quiet").split():
        [found] = json.loads(engine.ran("inspect", name))
        assert found["HostConfig"]["ReadonlyRootfs"] and found["HostConfig"]["CapDrop"] == ["ALL"], name
        assert found["HostConfig"]["Memory"] > 0 and found["HostConfig"]["NanoCpus"] > 0, name
        for bindings in found["NetworkSettings"]["Ports"].values():
            assert all(binding["HostIp"] == "127.0.0.1" for binding in bindings or ()), name


# ---- each service by itself, in both versions --------------------------------------------------------------


@pytest.fixture(params=["named-by-the-file", "older"])
def tags(request: pytest.FixtureRequest, engine: Engine) -> dict[str, str]:
    """Service → image: what the compose file names, and Debian bookworm's versions."""
    if request.param == "older":
        return {name: f"prom/{name}:{tag}" for name, tag in OLD.items()}
    return {name: image(name) for name in OLD}


def test_each_service_takes_our_configuration_by_itself(tags: dict[str, str], tmp_path: Path) -> None:
    """Prometheus loads every rule, Alertmanager routes an alert, the node exporter exports."""
    from testcontainers.core.config import testcontainers_config
    from testcontainers.core.container import DockerContainer

    testcontainers_config.ryuk_disabled = (
        True  # its image needs a registry; the blocks below remove everything
    )
    (tmp_path / "token").write_text("not-a-secret-0123456789")
    (tmp_path / "token").chmod(0o444)

    def started(service: str, port: int, *arguments: str, **mounts: str) -> DockerContainer:
        container = DockerContainer(tags[service]).with_exposed_ports(port).with_command(list(arguments))
        for source, target in mounts.items():
            container = container.with_volume_mapping(source, target, "ro")
        return container

    def get(container: DockerContainer, port: int, path: str) -> Any:
        address = f"http://127.0.0.1:{container.get_exposed_port(port)}{path}"

        def answer() -> httpx.Response | None:
            try:
                found = httpx.get(address, trust_env=False, timeout=5)
            except httpx.HTTPError:
                return None
            return found if found.status_code == 200 else None

        return wait_for(answer, f"{address} answers")

    config = ("--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus")
    with started("prometheus", 9090, *config, **{str(TOP / "prometheus"): "/etc/prometheus"}) as prometheus:
        get(prometheus, 9090, "/-/ready")
        groups = get(prometheus, 9090, "/api/v1/rules").json()["data"]["groups"]
        written = yaml.safe_load((TOP / "prometheus/rules/obsinfra.yml").read_text())["groups"]
        assert sum(len(group["rules"]) for group in groups) == sum(len(group["rules"]) for group in written)
        version = get(prometheus, 9090, "/api/v1/status/buildinfo").json()["data"]["version"]
        assert tags["prometheus"].rpartition(":v")[2].split(".")[:2] == version.split(".")[:2]
    mounts = {str(TOP / "alertmanager"): "/etc/alertmanager", str(tmp_path): "/run/secrets"}
    (tmp_path / "token").rename(tmp_path / "obsinfra_token")
    config = ("--config.file=/etc/alertmanager/alertmanager.yml", "--storage.path=/alertmanager")
    with started("alertmanager", 9093, *config, "--cluster.listen-address=", **mounts) as alertmanager:
        get(alertmanager, 9093, "/-/ready")
        labels = {"alertname": "GradientExplosion", "run": "r", "action": "emergency_checkpoint"}
        address = f"http://127.0.0.1:{alertmanager.get_exposed_port(9093)}/api/v2/alerts"
        assert httpx.post(address, json=[{"labels": labels}], trust_env=False).status_code == 200
        [held] = get(alertmanager, 9093, "/api/v2/alerts").json()
        assert {receiver["name"] for receiver in held["receivers"]} >= {"sidecar"}
    with started("node-exporter", 9100) as exporter:
        assert "node_cpu_seconds_total" in get(exporter, 9100, "/metrics").text
