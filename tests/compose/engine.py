"""A Docker engine of the tests' own, with the images of docker-compose.yml or, offline, stand-ins for them.

Its images stay in a cache beside the virtual environment, so that the next session finds them; containers and
processes do not outlive the session.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from compose_tool import UNPACKED, compose_version, docker_environment
from waiting import wait_for

TOP = Path(__file__).parents[2]
CACHE = Path(sys.prefix) / "compose-cache"
REACHABLE_SECONDS = 20
BUILD_SECONDS = 900
PULL_SECONDS = 600

OLD = {"prometheus": "v2.42.0", "alertmanager": "v0.25.0", "node-exporter": "v1.5.0"}
"""Debian bookworm's, beside the versions that the compose file names."""

BINARIES = {"prometheus": "prometheus", "alertmanager": "alertmanager", "node-exporter": "node_exporter"}


@dataclass(frozen=True)
class Engine:
    """A running engine.

    Attributes:
        host: its address, as DOCKER_HOST has it.
        stand_ins: whether Prometheus and the others are Debian's, because no registry is in reach.
    """

    host: str
    stand_ins: bool = False

    @property
    def environment(self) -> dict[str, str]:
        return docker_environment() | {"DOCKER_HOST": self.host}

    def docker(
        self, *arguments: str, seconds: float = 60, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `docker …`; the caller judges the exit status."""
        return subprocess.run(
            ["docker", *arguments],
            env=self.environment | {"DOCKER_BUILDKIT": "0"},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            input=stdin,
        )

    def ran(self, *arguments: str, seconds: float = 60, stdin: str | None = None) -> str:
        """What `docker …` printed; fails with what it said if it did not succeed."""
        said = self.docker(*arguments, seconds=seconds, stdin=stdin)
        assert said.returncode == 0, (
            f"docker {' '.join(arguments)}: {said.stdout[-1500:]}{said.stderr[-1500:]}"
        )
        return said.stdout

    def has(self, image: str) -> bool:
        return self.docker("image", "inspect", image).returncode == 0


def why_none() -> str | None:
    """Why no engine can be started here; None when one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Docker engine is started by root on Linux only"
    missing = [tool for tool in ("dockerd", "docker", "iptables") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt install docker.io iptables)"
    if compose_version() is None:
        return f"docker compose is missing (.ci/docker_compose.sh {UNPACKED} unpacks it)"
    return None


@contextlib.contextmanager
def running_engine() -> Iterator[Engine]:
    """Start an engine for this block; skips the test, saying why, where that is impossible."""
    reason = why_none()
    if reason is not None:
        pytest.skip(reason)
    CACHE.mkdir(exist_ok=True)
    with (CACHE / ".lock").open("w") as lock, tempfile.TemporaryDirectory(prefix="engine-") as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the images' folder serves one engine at a time
        socket, log = Path(folder, "docker.sock"), Path(folder, "log")
        command = [
            *("dockerd", "--data-root", str(CACHE / "data"), "--exec-root", f"{folder}/exec"),
            *("--pidfile", f"{folder}/pid", "--host", f"unix://{socket}"),
        ]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            engine = Engine(f"unix://{socket}")
            try:
                wait_for(
                    lambda: process.poll() is not None or engine.docker("version").returncode == 0,
                    "the engine answers",
                )
            except AssertionError as error:
                pytest.skip(f"the engine does not start ({error}): {log.read_text()[-300:]}")
            if process.poll() is not None:
                pytest.skip(f"the engine does not start here: {log.read_text()[-300:]}")
            try:
                yield engine
            finally:
                left = engine.docker("ps", "--all", "--quiet").stdout.split()
                if left:
                    engine.docker("rm", "--force", "--volumes", *left)
                engine.docker("network", "prune", "--force")
                engine.docker("volume", "prune", "--force")
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for mounted in _mounted_under(folder) + _mounted_under(str(CACHE / "data")):
                subprocess.run(["umount", "--lazy", mounted], check=False, capture_output=True)


def _mounted_under(folder: str) -> list[str]:
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted((point for point in points if point.startswith(folder + "/")), reverse=True)


def image(service: str) -> str:
    """The image that docker-compose.yml names for a service."""
    text = yaml.safe_load((TOP / "docker-compose.yml").read_text())["services"][service]["image"]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def prepare_images(engine: Engine) -> Engine:
    """See that Prometheus, Alertmanager and node exporter of both versions, and the sidecar, are there."""
    wanted = {name: [image(name), f"prom/{name}:{old}"] for name, old in OLD.items()}
    base = re.search(r"^ARG BASE=(\S+)", (TOP / "Dockerfile").read_text(), re.MULTILINE)
    assert base is not None
    # One small pull tells whether a registry is in reach; without one it fails within seconds.
    stand_ins = (CACHE / "stand-ins").exists()
    if not stand_ins:
        try:
            stand_ins = (
                engine.docker("pull", image("node-exporter"), seconds=REACHABLE_SECONDS).returncode != 0
            )
        except subprocess.TimeoutExpired:
            stand_ins = True
    if stand_ins:
        _import_stand_ins(engine, wanted, base[1])
        (CACHE / "stand-ins").touch()
    else:
        for name in [*(tag for tags in wanted.values() for tag in tags), base[1]]:
            if not engine.has(name):
                engine.ran("pull", name, seconds=PULL_SECONDS)
    _build_sidecar(engine, offline=stand_ins)
    return Engine(engine.host, stand_ins)


def _import_stand_ins(engine: Engine, wanted: dict[str, list[str]], base: str) -> None:
    everything = [base, *(tag for tags in wanted.values() for tag in tags)]
    if all(engine.has(tag) for tag in everything):
        return
    made = subprocess.run(
        [TOP / "tests/compose/offline_images.sh", CACHE / "files"],
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"no registry, and no stand-in images can be made here: {made.stderr[-300:]}")
    engine.ran("import", str(CACHE / "files/python.tar"), base, seconds=BUILD_SECONDS)
    for number, suite in enumerate(("forky", "bookworm")):
        engine.ran(
            "import", str(CACHE / f"files/{suite}.tar"), f"debian-stack:{suite}", seconds=BUILD_SECONDS
        )
        for name, tags in wanted.items():
            recipe = f'FROM debian-stack:{suite}\nENTRYPOINT ["/bin/{BINARIES[name]}"]\n'
            engine.ran("build", "--tag", tags[number], "-", stdin=recipe, seconds=BUILD_SECONDS)
    shutil.rmtree(CACHE / "files")


def _build_sidecar(engine: Engine, *, offline: bool) -> None:
    """The sidecar's image from our Dockerfile; packages come from wheels/ where the build has no network."""
    with tempfile.TemporaryDirectory(prefix="context-") as folder:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=TOP, capture_output=True, check=True
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (TOP / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/images/")):
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(TOP / name, target)
        arguments = ["--target", "sidecar", "--tag", image("sidecar")]
        if offline:
            shutil.copytree(_wheels(), Path(folder, "wheels"))
            arguments += ["--build-arg", "PIP_NO_INDEX=1"]
        engine.ran("build", *arguments, folder, seconds=BUILD_SECONDS)


def _wheels() -> Path:
    """What the sidecar needs as wheels, fetched by this environment's pip; kept for the next time."""
    import tomllib

    project = tomllib.loads((TOP / "pyproject.toml").read_text())
    names = [name for name in project["project"]["dependencies"] if not name.startswith("torch")]
    names += project["build-system"]["requires"]
    folder = CACHE / "wheels"
    stamp = folder / ".complete"
    wanted = "\n".join(names) + (TOP / "constraints.txt").read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        fetched = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"),
                *("--dest", str(folder), "--constraint", str(TOP / "constraints.txt"), *names),
            ],
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        if fetched.returncode != 0:
            pytest.skip(f"neither a registry nor a package index: {fetched.stderr[-300:]}")
        stamp.write_text(wanted)
    return folder
