"""Which runs live on this host: found by a scan of their folders, told to Prometheus, given a heartbeat.

One thread of the sidecar. The heartbeat tells a trainer that alerts act through the sidecar alone; it is
given only while a Prometheus asks where the runs are, since without one no alert would ever come.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from obsinfra.errors import ConfigError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.run.folder import ENDED_STATES, HEARTBEAT_SECONDS, LIVE_STATES, RunFolder, RunInfo, scan_runs

PROMETHEUS_SILENT_SECONDS = 30.0
"""After this long without a request to `/sd`, alerts are left to the trainers themselves."""

FRESH_SECONDS = 60.0
"""A run of another host (or container) counts as live while its progress is younger than this."""


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


class RunWatch:
    """Scans `output_dir` every `HEARTBEAT_SECONDS` until `stop`.

    Args:
        output_dir: the folder of runs; need not exist yet.
        scanned: called after each scan with the number of runs by state.
    """

    def __init__(self, output_dir: Path, scanned: Callable[[dict[str, int]], None]) -> None:
        self._output_dir = output_dir
        self._scanned = scanned
        self._asked_at: float | None = None
        self._lock = threading.Lock()
        self._runs: dict[str, SeenRun] = {}
        self._wake = threading.Event()
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
        self._wake.set()
        self._thread.join(timeout=10)
        for run in list(self._runs.values()):
            if run.folder.id in self._beaten:
                with contextlib.suppress(OSError):
                    run.folder.heartbeat.unlink(missing_ok=True)

    def find(self, run_id: str) -> SeenRun | None:
        """The run of that name, scanned anew when it is not known yet."""
        with self._lock:
            found = self._runs.get(run_id)
        if found is None or not found.live:
            self._scan()
            with self._lock:
                found = self._runs.get(run_id)
        return found

    def targets(self) -> list[dict[str, Any]]:
        """What Prometheus shall scrape, as http_sd wants it; asking is what shows that one is there."""
        first, self._asked_at = self._asked_at is None, time.monotonic()
        if first:
            self._scan()
        with self._lock:
            runs = [run for run in self._runs.values() if run.live]
        return [
            {
                "targets": [address],
                "labels": {"run": run.folder.id, "model": run.info.model, "rank": rank},
            }
            for run in runs
            for rank, address in run.addresses.items()
        ]

    @property
    def prometheus_asks(self) -> bool:
        """Whether a Prometheus asked for targets lately."""
        asked = self._asked_at
        return asked is not None and time.monotonic() - asked < PROMETHEUS_SILENT_SECONDS

    def _watch(self) -> None:
        while not self._stopping:
            self._wake.wait(HEARTBEAT_SECONDS)
            if not self._stopping:
                try:
                    self._scan()
                except Exception as error:  # one unreadable run must not end the heartbeats of the others
                    self._log.error("scan_failed", exc_info=error)

    def _scan(self) -> None:
        runs: dict[str, SeenRun] = {}
        states: Counter[str] = Counter()
        for folder in scan_runs(self._output_dir):
            try:
                seen = _look_at(folder)
            except Exception as error:  # whatever stands in one run.json, the other runs are watched
                states["unreadable"] += 1
                if folder.id not in self._unreadable:
                    self._log.warning("run_unreadable", label_run=folder.id, error=str(error))
                    self._unreadable.add(folder.id)
                continue
            self._unreadable.discard(folder.id)
            states[seen.info.state if seen.live or seen.info.state not in LIVE_STATES else "dead"] += 1
            runs[folder.id] = seen
        with self._lock:
            self._runs = runs
        if self.prometheus_asks and not self._stopping:
            for run in runs.values():
                if run.live:
                    self._beat(run.folder)
        self._scanned(dict(states))

    def _beat(self, folder: RunFolder) -> None:
        try:
            folder.beat(time.time())
            self._beaten.add(folder.id)
        except OSError as error:
            self._log.warning("heartbeat_not_written", run=folder.id, error=str(error))


def _look_at(folder: RunFolder) -> SeenRun:
    info = folder.read_info()
    if info.state not in (*LIVE_STATES, *ENDED_STATES) or not isinstance(info.model, str):
        raise ConfigError(
            f"state {info.state!r} and model {info.model!r} in {folder.run_json}",
            "a run.json written by a trainer",
        )
    addresses = {rank: urlsplit(url).netloc for rank, url in sorted(info.metrics_urls.items())}
    return SeenRun(
        folder, info, _lives(folder, info), {rank: found for rank, found in addresses.items() if found}
    )


def _lives(folder: RunFolder, info: RunInfo) -> bool:
    if info.state not in LIVE_STATES:
        return False
    if info.host == socket.gethostname():
        return info.alive()
    try:
        at = float(json.loads((folder.root / "progress.json").read_text())["at"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return abs(time.time() - at) < FRESH_SECONDS
