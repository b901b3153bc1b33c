"""Which runs live on this host: found by a scan of their folders, told to Prometheus, given a heartbeat.

One thread of the sidecar. The heartbeat tells a trainer that alerts act through the sidecar alone; it is
given only while a Prometheus asks where the runs are, since without one no alert would ever come.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from obsinfra.catalog.metrics import SIDECAR_RUN_UP
from obsinfra.control.folder_events import FolderEvents
from obsinfra.errors import ConfigError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.sample import Sample
from obsinfra.run.folder import (
    ENDED_STATES,
    HEARTBEAT_SECONDS,
    LIVE_STATES,
    RUN_ID_PATTERN,
    RunFolder,
    RunInfo,
)

PROMETHEUS_SILENT_SECONDS = 30.0
"""After this long without a request to `/sd`, alerts are left to the trainers themselves."""

GONE_SECONDS = 3600.0
"""A run whose trainer died is told as down for this long; then it is history."""

SETTLE_SECONDS = 0.05
"""Pause after a scan, so that a burst of changes is one scan."""

_Version = tuple[int, int, int]
"""Inode, modification time and size of a run.json: another one after every write, since it is replaced."""


@dataclass(frozen=True, slots=True)
class SeenRun:
    """A run as of the last scan.

    Attributes:
        live: whether a trainer of it runs.
        addresses: rank (as text) → host and port of its `/metrics`.
    """

    folder: RunFolder
    info: RunInfo
    live: bool
    addresses: dict[str, str]

    @property
    def died(self) -> bool:
        """Whether its trainer went without saying how it ended."""
        return not self.live and self.info.state in LIVE_STATES

    @property
    def state(self) -> str:
        """What run.json says, or `dead`."""
        return "dead" if self.died else self.info.state


class RunWatch:
    """Scans `output_dir` every `HEARTBEAT_SECONDS`, and when inotify tells of a change, until `stop`.

    Args:
        output_dir: the folder of runs; need not exist yet.
        scanned: called after each scan with the number of runs by state.
        alerts_come: whether what Prometheus fires gets here at all; without that no heartbeat.
        loopback_host: what Prometheus is told instead of the loopback address of a trainer outside this
            container; None: the address itself.
        page: where people open the page of all runs; told to the trainers, whose pages lead there.
    """

    def __init__(
        self,
        output_dir: Path,
        scanned: Callable[[dict[str, int]], None],
        alerts_come: Callable[[], bool] = lambda: True,
        loopback_host: str | None = None,
        page: str | None = None,
    ) -> None:
        self._output_dir = output_dir
        self._page = page
        self._loopback_host = loopback_host
        self._scanned = scanned
        self._alerts_come = alerts_come
        self._asked_at: float | None = None
        self._lock = threading.Lock()
        self._scanning = threading.Lock()
        self._runs: dict[str, SeenRun] = {}
        self._read: dict[str, tuple[_Version, RunInfo, dict[str, str]]] = {}
        self._gone_since: dict[str, float] = {}
        self._events = FolderEvents(output_dir, ("run.json",))
        self._stopping = False
        self._beaten: set[str] = set()
        self._unreadable: set[str] = set()
        self._log = get_logger("system")
        self._thread = threading.Thread(target=self._watch, name="obsinfra-run-watch", daemon=True)

    def start(self) -> None:
        """Scan once, then in the background."""
        self._scan()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and take the heartbeats away, so that trainers act for themselves at once."""
        self._stopping = True
        self._events.wake()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        for run in list(self._runs.values()):
            if run.folder.id in self._beaten:
                with contextlib.suppress(OSError):
                    run.folder.heartbeat.unlink(missing_ok=True)
        if not self._thread.is_alive():
            self._events.close()

    def find(self, run_id: str) -> SeenRun | None:
        """The run of that name; looked at anew when the last scan did not see it live."""
        found = self._runs.get(run_id)  # without the lock: the dictionary is replaced, never emptied
        if found is not None and found.live:
            return found
        if found is None and (not RUN_ID_PATTERN.fullmatch(run_id) or ".." in run_id):
            return None
        with self._scanning:
            try:
                found = self._look_at(run_id)
            except FileNotFoundError:
                found = None
            except Exception as error:  # whatever stands in its run.json: logged, counted as unreadable
                self._unreadable_run(run_id, error)
                found = None
            if found is not None:
                with self._lock:
                    self._runs[run_id] = found
        return found

    def runs(self) -> list[SeenRun]:
        """Every run of the last scan, by id."""
        with self._lock:
            return [self._runs[name] for name in sorted(self._runs)]

    def targets(self) -> list[dict[str, Any]]:
        """What Prometheus shall scrape, as http_sd wants it; asking is what shows that one is there."""
        first, self._asked_at = self._asked_at is None, time.monotonic()
        if first:
            self._scan()
        return [
            {
                "targets": [self._reachable(address, run.info.host)],
                "labels": {
                    "run": run.folder.id,
                    "model": run.info.model,
                    "rank": rank,
                    "host": run.info.host,
                },
            }
            for run in self.runs()
            if run.live
            for rank, address in run.addresses.items()
        ]

    def _reachable(self, address: str, host: str) -> str:
        """The address of a rank's `/metrics` as Prometheus can use it."""
        if self._loopback_host is None or host == socket.gethostname():
            return address
        name, _, port = address.rpartition(":")
        return f"{self._loopback_host}:{port}" if is_loopback(name) else address

    def run_up(self) -> list[Sample]:
        """`obsinfra_sidecar_run_up` of each run that lives (1) or lost its trainer in the last hour (0)."""
        with self._lock:
            runs, gone_since = list(self._runs.values()), dict(self._gone_since)
        oldest = time.time() - GONE_SECONDS
        return [
            Sample(SIDECAR_RUN_UP, {"run": run.folder.id, "model": run.info.model}, float(run.live))
            for run in runs
            if run.live or gone_since.get(run.folder.id, 0.0) > oldest
        ]

    @property
    def prometheus_asks(self) -> bool:
        """Whether a Prometheus asked for targets lately."""
        asked = self._asked_at
        return asked is not None and time.monotonic() - asked < PROMETHEUS_SILENT_SECONDS

    def _watch(self) -> None:
        due = time.monotonic() + HEARTBEAT_SECONDS
        while not self._stopping:
            changed = self._events.wait(max(0.0, due - time.monotonic()))
            if self._stopping or not (changed or time.monotonic() >= due):
                continue
            due = time.monotonic() + HEARTBEAT_SECONDS
            try:
                self._scan()
            except Exception as error:  # one unreadable run must not end the heartbeats of the others
                self._log.error("scan_failed", exc_info=error)
            time.sleep(SETTLE_SECONDS)

    def _scan(self) -> None:
        with self._scanning:
            runs, states = self._found()
            for name in self._read.keys() - runs.keys():
                del self._read[name]
            self._note_gone(runs)
            with self._lock:
                self._runs = runs
        if self.prometheus_asks and self._alerts_come() and not self._stopping:
            for run in runs.values():
                if run.live:
                    self._beat(run.folder)
        self._scanned(dict(states))

    def _found(self) -> tuple[dict[str, SeenRun], Counter[str]]:
        runs: dict[str, SeenRun] = {}
        states: Counter[str] = Counter()
        try:
            names = [name for name in os.listdir(self._output_dir) if not name.startswith(".")]
        except OSError:
            names = []
        self._events.watch(names)  # before they are looked at, so that no change falls in between
        for name in names:
            try:
                seen = self._look_at(name)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except Exception as error:  # whatever stands in one run.json, the other runs are watched
                states["unreadable"] += 1
                self._unreadable_run(name, error)
                continue
            self._unreadable.discard(name)
            states[seen.state] += 1
            runs[name] = seen
        return runs, states

    def _look_at(self, name: str) -> SeenRun:
        """The run in that folder; its run.json is read only when it was replaced since."""
        place = os.path.join(self._output_dir, name, "run.json")
        try:
            status = os.stat(place)
        except OSError as error:  # a link that leads in a circle, or an entry that went: no run
            raise FileNotFoundError(place) from error
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for its writer
            raise ConfigError(f"{place} is no file", "a run.json written by a trainer")
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        folder = RunFolder(self._output_dir / name)
        known = self._read.get(name)
        if known is None or known[0] != version:
            known = version, *_read_run(folder)
            self._read[name] = known
        _, info, addresses = known
        return SeenRun(folder, info, folder.lives(info), addresses)

    def _note_gone(self, runs: dict[str, SeenRun]) -> None:
        """Since when each run that lost its trainer has been without one, epoch seconds."""
        gone_since: dict[str, float] = {}
        for name, run in runs.items():
            if run.died:
                before = self._runs.get(name)
                seen_alive = before is not None and before.live
                since = self._gone_since.get(name)
                gone_since[name] = (
                    (time.time() if seen_alive else _last_sign(run)) if since is None else since
                )
        with self._lock:
            self._gone_since = gone_since

    def _unreadable_run(self, name: str, error: Exception) -> None:
        if name not in self._unreadable:
            self._log.warning("run_unreadable", label_run=name, error=str(error))
            self._unreadable.add(name)

    def _beat(self, folder: RunFolder) -> None:
        try:
            folder.beat(time.time(), self._page)
            self._beaten.add(folder.id)
        except OSError as error:
            self._log.warning("heartbeat_not_written", run=folder.id, error=str(error))


def _read_run(folder: RunFolder) -> tuple[RunInfo, dict[str, str]]:
    info = folder.read_info()
    if info.state not in (*LIVE_STATES, *ENDED_STATES) or not isinstance(info.model, str):
        raise ConfigError(
            f"state {info.state!r} and model {info.model!r} in {folder.run_json}",
            "a run.json written by a trainer",
        )
    addresses = {rank: urlsplit(url).netloc for rank, url in sorted(info.metrics_urls.items())}
    return info, {rank: found for rank, found in addresses.items() if found}


def is_loopback(name: str) -> bool:
    """Whether a host as a URL has it is this machine's own address: 127.0.0.0/8, ::1 or localhost."""
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost"


def _last_sign(run: SeenRun) -> float:
    """When a run that was never seen alive was heard of last."""
    try:
        written = run.folder.run_json.stat().st_mtime
    except OSError:
        written = 0.0
    progress = run.folder.read_progress()
    return min(time.time(), max(progress.at if progress else 0.0, written))
