"""The run folder: its layout, its identity card `run.json`, its lock, and finding runs by a scan.

The trainer writes it; the sidecar and the CLI read it. Knows no torch and no settings.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from obsinfra.errors import ConfigError, RunBusyError
from obsinfra.run.files import write_json_atomic
from obsinfra.run.process import ProcessId

RUN_JSON_VERSION = 1

RUN_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a run id may look like: it becomes a folder name, a label value and part of an address."""

_locked_here: set[str] = set()

ENDED_STATES = ("finished", "stopped", "failed")
LIVE_STATES = ("starting", "running", "paused", "stopping")

FRESH_SECONDS = 60.0
"""A run of another host counts as live while its progress is younger than this."""

HEARTBEAT_SECONDS = 2.0
"""How often the sidecar renews its heartbeat in a run's control folder."""

HEARTBEAT_STALE_SECONDS = 8.0
"""A heartbeat older than this means no sidecar."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The identity card of a run, `run.json`.

    Attributes:
        id: run id; folder name and `run` label.
        model: workload name; `model` label.
        state: `starting`, `running`, `paused`, `stopping`, `finished`, `stopped` or `failed`, as the trainer
            last said.
        started: ISO 8601, UTC, of the first start.
        host: host name of rank 0.
        world_size: number of ranks.
        processes: rank (as text) → pid and creation time of the rank's process.
        metrics_urls: rank (as text) → address of that rank's `/metrics`.
        git_revision: revision of the code in use, if it is a checkout.
        epochs: epochs asked for; 0 when open-ended.
        restarts: how often the run was resumed.
        parent: checkpoint this run was branched from, if any.
        ended, reason: when and why it ended.
    """

    id: str
    model: str
    state: str = "starting"
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    host: str = field(default_factory=socket.gethostname)
    world_size: int = 1
    processes: dict[str, dict[str, float]] = field(default_factory=dict)
    metrics_urls: dict[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    epochs: int = 0
    restarts: int = 0
    parent: str | None = None
    ended: str | None = None
    reason: str | None = None
    version: int = RUN_JSON_VERSION

    def alive(self) -> bool:
        """Whether a process of this run still runs on this host."""
        return any(ProcessId(int(p["pid"]), p["created"]).alive() for p in self.processes.values())


def new_run_id(model: str) -> str:
    """`<model>-<UTC time>-<4 hex digits>`: sorts by time, unique enough for one folder."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-._") or "run"
    return f"{stem[:60]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def check_run_id(run_id: str) -> str:
    """Return `run_id` if it is safe as a folder name and a label.

    Raises:
        ConfigError: it is not.
    """
    if not RUN_ID_PATTERN.fullmatch(run_id) or ".." in run_id:
        raise ConfigError(
            f"run name {run_id[:120]!r}",
            "1 to 100 letters, digits, '.', '_' or '-', beginning with a letter or digit",
            "choose another --run",
        )
    return run_id


@dataclass(frozen=True, slots=True)
class Progress:
    """The global step a trainer noted last, None where it is missing, and when: epoch seconds."""

    step: int | None
    at: float


class RunFolder:
    """Paths and identity card of one run.

    Args:
        root: `<output folder>/<run id>`; need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock_fd: int | None = None

    def __repr__(self) -> str:
        return f"RunFolder({str(self.root)!r})"

    @property
    def id(self) -> str:
        return self.root.name

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def config_toml(self) -> Path:
        return self.root / "config.toml"

    @property
    def control(self) -> Path:
        return self.root / "control"

    @property
    def socket(self) -> Path:
        return self.control / "control.sock"

    @property
    def inbox(self) -> Path:
        return self.control / "inbox"

    @property
    def acks(self) -> Path:
        return self.control / "acks"

    @property
    def heartbeat(self) -> Path:
        """Written by the sidecar while it watches this run."""
        return self.control / "sidecar.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def history(self) -> Path:
        """The numbers of rank 0 as they went (`monitoring.performance_history`); other ranks' are beside."""
        return self.logs / "history.jsonl"

    @property
    def profiles(self) -> Path:
        return self.root / "profiles"

    @property
    def reports(self) -> Path:
        """What was asked for to be looked at: memory reports."""
        return self.root / "reports"

    @property
    def traces(self) -> Path:
        return self.root / "traces"

    def create(self) -> None:
        """Make the folder and its rooms, 0700 where they control something.

        Raises:
            ConfigError: the place is not writable.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for room in (self.control, self.inbox, self.acks, self.checkpoints, self.logs, self.traces):
                room.mkdir(mode=0o700, exist_ok=True)
            for room in (self.control, self.inbox, self.acks):
                room.chmod(0o700)
        except OSError as error:
            raise ConfigError(
                f"cannot create the run folder {self.root}: {error.strerror}",
                "a writable folder with free space",
                "choose another --output-dir",
            ) from error

    def lock(self) -> None:
        """Become the one trainer of this folder until `unlock` or the end of the process.

        Raises:
            RunBusyError: another live trainer holds it.
        """
        if self._lock_fd is not None:
            return
        key = str(self.root.resolve())
        # A POSIX record lock, not flock: forked data-loader workers must not keep the run locked after
        # the trainer is killed. It does not exclude its own process; _locked_here does that.
        fd = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if key in _locked_here:
                raise BlockingIOError(errno.EAGAIN, "locked by this process")
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(fd, 64, 0).decode(errors="replace").strip() or "unknown"
            if key not in _locked_here:
                os.close(fd)  # closing any descriptor of the file would drop this process's own lock
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise RunBusyError(
                f"run {self.id} is in use by process {owner}",
                "one trainer per run folder",
                f"stop it with 'obsinfra command {self.id} stop', or choose another --run",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._lock_fd = fd
        _locked_here.add(key)

    def unlock(self) -> None:
        """Give the folder up."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None
            _locked_here.discard(str(self.root.resolve()))

    def lives(self, info: RunInfo) -> bool:
        """Whether a trainer of this run is at work.

        On its own host its processes tell. From another host or container the lock does, where the kernel is
        the same, or else progress younger than `FRESH_SECONDS`.
        """
        if info.state not in LIVE_STATES:
            return False
        if info.host == socket.gethostname():
            return info.alive()
        if self.is_locked():
            return True
        progress = self.read_progress()
        return progress is not None and abs(time.time() - progress.at) < FRESH_SECONDS

    def present_state(self, info: RunInfo) -> str:
        """What `info` says, or `dead` when it claims to be live and no trainer is at work."""
        return "dead" if info.state in LIVE_STATES and not self.lives(info) else info.state

    def is_locked(self) -> bool:
        """Whether a trainer that runs under this kernel holds the folder; only Linux can tell."""
        if str(self.root.resolve()) in _locked_here:
            return True
        if sys.platform != "linux":
            return False
        try:
            fd = os.open(self.root / ".lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return int(struct.unpack_from("h", fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0]) != fcntl.F_UNLCK
        except OSError:
            return False
        finally:
            os.close(fd)

    def read_info(self) -> RunInfo:
        """Read `run.json`; fields of a newer version are ignored.

        Raises:
            ConfigError: there is none, or it is not readable as one.
        """
        try:
            return _info(json.loads(self.run_json.read_text()))
        except FileNotFoundError:
            raise ConfigError(
                f"no run at {self.root}", "a run folder with a run.json", "list runs with 'obsinfra runs'"
            ) from None
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ConfigError(
                f"unreadable {self.run_json}: {error}", "a run.json written by a trainer"
            ) from error

    @property
    def progress_json(self) -> Path:
        """Where the trainer notes every few seconds how far it is."""
        return self.root / "progress.json"

    def write_progress(self, step: int, epoch: int) -> None:
        """Note the step reached, as of now; not durably, since it is noted again soon.

        Raises:
            OSError: it cannot be written.
        """
        document = {"step": step, "epoch": epoch, "at": time.time()}
        write_json_atomic(self.progress_json, document, durable=False, mode=0o644)

    def read_progress(self) -> Progress | None:
        """What was noted last; None when nothing was, or it cannot be read."""
        try:
            found = json.loads(self.progress_json.read_text())
            at, step = float(found["at"]), found.get("step")
            return Progress(step if isinstance(step, int) else None, at)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_info(self, info: RunInfo) -> None:
        """Write `run.json` whole."""
        write_json_atomic(self.run_json, asdict(info), mode=0o644)

    def update_info(self, **changes: Any) -> RunInfo:
        """Read, change and write `run.json`; only the lock's holder calls this."""
        info = replace(self.read_info(), **changes)
        self.write_info(info)
        return info

    def beat(self, now: float, page: str | None = None) -> None:
        """Renew the sidecar's heartbeat.

        Args:
            now: seconds since the epoch.
            page: where people open the sidecar's page of all runs.
        """
        document = {**asdict(ProcessId.current()), "at": now, "page": page}
        write_json_atomic(self.heartbeat, document, durable=False)

    def sidecar_alive(self, now: float) -> bool:
        """Whether the heartbeat is younger than `HEARTBEAT_STALE_SECONDS` at `now` (epoch seconds)."""
        try:
            at = float(json.loads(self.heartbeat.read_text())["at"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return abs(now - at) < HEARTBEAT_STALE_SECONDS

    def sidecar_page(self, now: float) -> str | None:
        """Where the page of all runs is, while a sidecar watches this run and said so."""
        try:
            page = json.loads(self.heartbeat.read_text()).get("page")
        except (OSError, ValueError, AttributeError):
            return None
        return page if isinstance(page, str) and self.sidecar_alive(now) else None


class MemberFolder(RunFolder):
    """The folder of a run for its ranks above 0: they read it, and write files of their own into its rooms.

    Who they are and how the run stands is written by rank 0, which also holds the lock.
    """

    def create(self) -> None:
        """The rooms are there.

        Raises:
            ConfigError: they are not: this host does not see the folder of rank 0.
        """
        if not self.logs.is_dir():
            raise ConfigError(
                f"rank 0's run folder {self.root} is not there on {socket.gethostname()}",
                "an --output-dir that all hosts share",
                "mount it at the same place on every host",
            )

    def lock(self) -> None:
        """Rank 0 holds it."""

    def unlock(self) -> None:
        """Rank 0 holds it."""

    def write_info(self, info: RunInfo) -> None:
        """Rank 0 writes it."""

    def update_info(self, **changes: Any) -> RunInfo:
        """Rank 0 writes it."""
        return self.read_info()

    def write_progress(self, step: int, epoch: int) -> None:
        """Rank 0 writes it."""


def _info(document: Any) -> RunInfo:
    """A `RunInfo` from its JSON form, each field of its own type; TypeError and the like where one is not."""
    known = {key: value for key, value in document.items() if key in RunInfo.__dataclass_fields__}
    info = RunInfo(**known)
    texts = (info.id, info.model, info.state, info.started, info.host)
    optional = (info.git_revision, info.parent, info.ended, info.reason)
    numbers = (info.world_size, info.epochs, info.restarts, info.version)
    sound = (
        all(isinstance(value, str) for value in texts)
        and all(value is None or isinstance(value, str) for value in optional)
        and all(isinstance(value, int) for value in numbers)
        and all(isinstance(value, str) for value in info.metrics_urls.values())
    )
    if not sound:
        raise TypeError("a field has another type than a trainer writes")
    processes = {
        rank: {"pid": int(process["pid"]), "created": float(process["created"])}
        for rank, process in info.processes.items()
    }
    return replace(info, processes=processes)


def scan_runs(output_dir: Path) -> Iterator[RunFolder]:
    """Every run folder under `output_dir`, by id; folders whose name begins with a dot are skipped."""
    try:
        entries = sorted(os.scandir(output_dir), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        # os.path.exists, unlike entry.is_dir, says no to a link that leads in a circle.
        if not entry.name.startswith(".") and os.path.exists(os.path.join(entry.path, "run.json")):
            yield RunFolder(Path(entry.path))


def find_run(output_dir: Path, run_id: str) -> RunFolder:
    """The run called `run_id` under `output_dir`.

    Raises:
        ConfigError: the id is malformed or there is no such run.
    """
    folder = RunFolder(output_dir / check_run_id(run_id))
    if not folder.run_json.exists():
        known = [run.id for run in scan_runs(output_dir)]
        raise ConfigError(
            f"no run {run_id!r} in {output_dir}",
            f"one of {', '.join(known[-5:])}" if known else "an existing run (there is none yet)",
            "list them with 'obsinfra runs', or name the folder with --output-dir",
        )
    return folder
