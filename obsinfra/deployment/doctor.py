"""What this machine has for training and for the stack, what is missing, and what to do about it.

Called by `obsinfra doctor`, which draws the table. Looks only; changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from obsinfra.deployment.native_stack import INSTALL_HINT, NativeStack, find_binary
from obsinfra.deployment.ports import DEFAULT_PORTS
from obsinfra.errors import ObsinfraError
from obsinfra.monitoring.cgroup import memory_limits

Status = Literal["ok", "missing", "problem"]

OLDEST_PYTHON = (3, 11)
TRAINER_PORT = 9464
LITTLE_DISK_BYTES = 2 << 30
LITTLE_SHM_BYTES = 64 << 20
"""Docker's default /dev/shm, too small for data-loader workers that pass batches through it."""

LITTLE_MEMORY_BYTES = 2 << 30
FEW_FILES = 1024
ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: `ok`; `missing`: goes without, something useful is not there; `problem`: training may fail.
        detail: what was found.
        fix: what to do; None when nothing needs doing.
    """

    name: str
    status: Status
    detail: str
    fix: str | None = None


def examine(output_dir: Path) -> list[Finding]:
    """Look at everything, in the order of the report.

    A look that fails is itself a finding of status `problem`; nothing is raised.

    Args:
        output_dir: where runs would go; it need not exist.
    """
    looks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("Python", _python),
        ("torch", _torch),
        ("NVML", _nvml),
        ("memory", _memory),
        ("disk", lambda: [disk(output_dir)]),
        ("/dev/shm", lambda: [shared_memory(Path("/dev/shm"))]),
        ("open files", lambda: [_open_files()]),
        ("ports", lambda: _ports(output_dir)),
        ("stack", _stack),
        ("Docker", lambda: [_docker()]),
    ]
    findings: list[Finding] = []
    for name, look in looks:
        try:
            findings += look()
        except Exception as error:  # a finding like any other, and the other looks are still taken
            findings.append(Finding(name, "problem", f"could not be examined: {error!r}", "report this"))
    return findings


def _python() -> list[Finding]:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return [
            Finding("Python", "problem", found, f"use Python {'.'.join(map(str, OLDEST_PYTHON))} or newer")
        ]
    return [Finding("Python", "ok", found)]


def _torch() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [
            Finding("torch", "problem", f"cannot be imported: {error}", "./launch_training.sh installs it")
        ]
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} processors"
    return [Finding("torch", "ok", f"{torch.__version__}, {threads}"), _accelerator(torch)]


def _accelerator(torch: Any) -> Finding:
    if torch.cuda.is_available():
        devices = [
            f"{torch.cuda.get_device_name(index)} "
            f"({_size(torch.cuda.get_device_properties(index).total_memory)})"
            for index in range(torch.cuda.device_count())
        ]
        return Finding("CUDA", "ok", f"{torch.version.cuda}: {', '.join(devices)}")
    if torch.backends.mps.is_available():
        return Finding("CUDA", "missing", "none; Apple's MPS is there and is used")
    if Path("/dev/nvidiactl").exists():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return Finding(
            "CUDA",
            "problem",
            f"an NVIDIA device is present, but this torch ({built}) cannot use it",
            "install a CUDA build of torch that fits the driver: https://pytorch.org/get-started/",
        )
    return Finding("CUDA", "missing", "no GPU; training uses the CPU")


def _nvml() -> list[Finding]:
    try:
        import pynvml
    except ImportError as error:
        return [Finding("NVML", "problem", f"{error}", "pip install nvidia-ml-py")]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [Finding("NVML", "missing", f"{error}; GPU metrics are absent")]
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        return [Finding("NVML", "ok", f"driver {driver}, {pynvml.nvmlDeviceGetCount()} devices")]
    finally:
        pynvml.nvmlShutdown()


def _memory() -> list[Finding]:
    host = psutil.virtual_memory()
    findings = [_room("host memory", host.available, host.total)]
    levels = memory_limits()
    if not levels:
        findings.append(Finding("cgroup memory", "ok", "no limit"))
    else:
        nearest = min(levels, key=lambda level: level.limit_bytes - level.used_bytes)
        version = "v2" if (nearest.path / "cgroup.controllers").exists() else "v1"
        free = nearest.limit_bytes - nearest.used_bytes
        findings.append(_room(f"cgroup memory ({version})", free, nearest.limit_bytes))
    return findings


def _room(name: str, free: int, total: int) -> Finding:
    detail = f"{_size(free)} free of {_size(total)}"
    if free < LITTLE_MEMORY_BYTES:
        return Finding(name, "problem", detail, f"free some: under {_size(LITTLE_MEMORY_BYTES)} is little")
    return Finding(name, "ok", detail)


def disk(output_dir: Path) -> Finding:
    """Free space where runs would go, and whether one may write there."""
    name = "disk"
    place = output_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    detail = f"{_size(free)} free for {output_dir}"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding(name, "problem", f"{place} is not a writable folder", "choose another --output-dir")
    if free < LITTLE_DISK_BYTES:
        return Finding(name, "problem", detail, "free some, or choose --output-dir on a larger disk")
    return Finding(name, "ok", detail)


def shared_memory(place: Path) -> Finding:
    """Free shared memory, which data-loader workers pass batches through."""
    if not place.is_dir():
        return Finding("/dev/shm", "missing", "none; data-loader workers may not work", "use --num-workers 0")
    usage = shutil.disk_usage(place)
    detail = f"{_size(usage.free)} free of {_size(usage.total)}"
    if usage.free <= LITTLE_SHM_BYTES:
        return Finding(
            "/dev/shm", "problem", detail, "docker run --shm-size=2g (or --ipc=host), or use --num-workers 0"
        )
    return Finding("/dev/shm", "ok", detail)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = [str(limit) if limit != resource.RLIM_INFINITY else "unlimited" for limit in (soft, hard)]
    detail = f"{shown[0]} (at most {shown[1]})"
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        return Finding("open files", "problem", detail, "ulimit -n 4096")
    return Finding("open files", "ok", detail)


def _ports(output_dir: Path) -> list[Finding]:
    own: dict[int, str] = {}
    with contextlib.suppress(ObsinfraError):
        info = NativeStack(output_dir / ".stack").status()
        if info is not None:
            own = {child.port: "the stack of this folder" for child in info.children.values()}
    wanted = {"trainer": TRAINER_PORT} | asdict(DEFAULT_PORTS)
    return [port(f"port {number} ({name})", number, own.get(number)) for name, number in wanted.items()]


def port(name: str, number: int, owner: str | None = None) -> Finding:
    """Whether a loopback port can be listened on; a taken one is no problem, the next free one is used.

    Args:
        name: the finding's name.
        number: the port.
        owner: who is known to listen there rightly.
    """
    if owner is not None:
        return Finding(name, "ok", f"in use by {owner}")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            return Finding(name, "ok", f"taken ({error.strerror}); the next free one will be used")
    return Finding(name, "ok", "free")


def _stack() -> list[Finding]:
    findings = []
    for name in ("Prometheus", "Alertmanager"):
        found = find_binary(name)
        if found is None:
            fix = f"{INSTALL_HINT}; or ./launch_training.sh --install-stack"
            findings.append(Finding(name, "missing", "not on PATH; alerts are evaluated in-process", fix))
        else:
            findings.append(program(name, [found, "--version"]))
    promtool = shutil.which("promtool")
    if promtool is None:
        findings.append(
            Finding("promtool", "missing", "not on PATH; rules cannot be checked", "comes with Prometheus")
        )
    else:
        findings.append(program("promtool", [promtool, "--version"]))
    return findings


def program(name: str, command: list[str]) -> Finding:
    """Whether a program runs, and the version it tells."""
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, "problem", f"{command[0]} does not run: {error}", "install it again")
    said = (told.stdout or told.stderr).strip()
    if told.returncode != 0:
        last = said.splitlines()[-1] if said else "nothing"
        return Finding(
            name, "problem", f"{command[0]} ends with {told.returncode}, saying: {last}", "install it again"
        )
    version = re.search(r"\d+(\.\d+)+", said)
    return Finding(name, "ok", f"{version[0] if version else 'unknown version'} at {command[0]}")


def _docker() -> Finding:
    found = shutil.which("docker")
    if found is None:
        return Finding("Docker", "missing", "not on PATH", "only needed to run the stack in containers")
    client = program("Docker", [found, "--version"])
    if client.status != "ok":
        return client
    engine = program("Docker", [found, "version", "--format", "{{.Server.Version}}"])
    if engine.status != "ok":
        return Finding(
            "Docker",
            "missing",
            f"client {client.detail}; no engine answers",
            "start the engine (systemctl start docker); only needed to run the stack in containers",
        )
    return Finding("Docker", "ok", f"client {client.detail}; engine {engine.detail.partition(' ')[0]}")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
