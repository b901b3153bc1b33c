"""The numbers of a run as they went, one JSON document a line: `logs/history.jsonl` of the run folder.

Written by the monitor's housekeeping thread, whether logging is configured or not; read by
`obsinfra.reporting`. A restarted run goes on in the same file.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from obsinfra.alerting.evaluator import AlertStatus
from obsinfra.monitoring.json_numbers import finite
from obsinfra.monitoring.rotating_file import RotatingFile
from obsinfra.run.files import of_rank

RecordKind = Literal["start", "point", "validation", "alert", "summary"]
"""`start` of a process, what it is and runs on; a `point` of the curves; a `validation`; an `alert` that
begins or ends to fire; a `summary`: where the time of this process went so far."""

MAX_BYTES = 64 << 20
BACKUPS = 1

POINTS_PER_E_FOLD = 10_000
"""With a point each second, the first so many seconds have them all; from then on points become rarer in
proportion to the age of the run, so that a month is 66,000 of them."""

IDLE_SECONDS = 10.0
"""At least so long between two points of the same step."""

SUMMARY_SECONDS = 15.0
"""A trainer that dies without a word leaves a summary that is at most so old."""

PEAKS = frozenset({"grad_norm", "step_time_seconds"})
"""Columns of which a point has the largest value since the one before; of `loss` it has the mean."""


class PerformanceHistory:
    """Collects what the loop and the housekeeping say, and writes it when told to.

    Args:
        path: rank 0's file; other ranks write `history-rankN.jsonl` beside it. Its folder must exist when the
            first record is written.
        rank: of this process.
        clock: seconds since the epoch.
    """

    def __init__(self, path: Path, rank: int, clock: Callable[[], float] = time.time) -> None:
        self._file = RotatingFile(of_rank(path, rank), max_bytes=MAX_BYTES, backups=BACKUPS)
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: list[dict[str, Any]] = []
        self._firing: dict[str, AlertStatus] = {}
        self._began: float | None = None
        self._point_at = self._summary_at = 0.0
        self._point_step: Any = None
        self._losses: list[float] = []
        self._peaks: dict[str, float] = {}

    def start(self, facts: Mapping[str, Any]) -> None:
        """A process begins: what it is and what it runs on."""
        self._summary_at = self._clock()
        self._put("start", facts)

    def point(self, values: Mapping[str, float | None]) -> None:
        """The values of now, by the columns of the live page; written when a point is due."""
        if (loss := values.get("loss")) is not None and math.isfinite(loss):
            self._losses.append(loss)
        for name in PEAKS:
            value = values.get(name)
            if value is not None and not value <= self._peaks.get(name, -math.inf):
                self._peaks[name] = value
        now = self._clock()
        wait = (now - self._beginning(now)) / POINTS_PER_E_FOLD
        if values.get("step") == self._point_step:
            wait = max(wait, IDLE_SECONDS)
        # A little early is on time: the housekeeping's rounds are not exactly a second apart.
        if now < self._point_at + 0.9 * wait:
            return
        self._point_at, self._point_step = now, values.get("step")
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._put("point", {**values, **self._peaks, "loss": loss})
        self._losses, self._peaks = [], {}

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """A validation result."""
        self._put("validation", {"step": step, "metrics": dict(metrics)})

    def alerts(self, statuses: Iterable[AlertStatus], step: int) -> None:
        """All alerts of now; those that began or ceased to fire since the last call are kept."""
        firing = {
            f"{status.alert.name}{sorted(status.labels.items())}": status
            for status in statuses
            if status.state == "firing"
        }
        for key in [*firing, *self._firing]:
            if (key in firing) != (key in self._firing):
                status = firing.get(key) or self._firing[key]
                self._put(
                    "alert",
                    {
                        "name": status.alert.name,
                        "severity": status.alert.severity,
                        "state": "firing" if key in firing else "resolved",
                        "since": status.since,
                        "value": status.value / status.alert.scale,
                        "threshold": status.alert.threshold,
                        "unit": status.alert.threshold_unit,
                        "labels": dict(status.labels),
                        "summary": status.alert.description,
                        "step": step,
                    },
                )
        self._firing = firing

    def summary(self, make: Callable[[], Mapping[str, Any]], *, last: bool = False) -> None:
        """Where the time went, by `make`, when one is due or it is the last."""
        now = self._clock()
        if last or now >= self._summary_at + SUMMARY_SECONDS:
            self._summary_at = now
            self._put("summary", make())

    def write(self) -> None:
        """Append what has come in since the last call. What cannot be written is lost.

        Raises:
            OSError: not written: disk full, folder gone.
        """
        with self._lock:
            pending, self._pending = self._pending, []
        for record in pending:
            self._file.append(json.dumps(finite(record), allow_nan=False, default=str).encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _put(self, kind: RecordKind, values: Mapping[str, Any]) -> None:
        with self._lock:
            self._pending.append({"kind": kind, "at": self._clock(), **values})

    def _beginning(self, now: float) -> float:
        """When the run's first process began, by the file's first line."""
        if self._began is None:
            try:
                with self._file.path.open("rb") as file:
                    self._began = float(json.loads(file.readline(1 << 16))["at"])
            except (OSError, ValueError, KeyError, TypeError):
                self._began = now
        return self._began


class NullPerformanceHistory:
    """Keeps nothing: for a monitor without a run folder."""

    def start(self, facts: Mapping[str, Any]) -> None:
        pass

    def point(self, values: Mapping[str, float | None]) -> None:
        pass

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def alerts(self, statuses: Iterable[AlertStatus], step: int) -> None:
        pass

    def summary(self, make: Callable[[], Mapping[str, Any]], *, last: bool = False) -> None:
        pass

    def write(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_history(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a history, oldest first, rotated ones before it; malformed lines are left out."""
    for place in (path.with_name(path.name + ".1"), path):
        try:
            file = place.open("rb")
        except OSError:
            continue
        with file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:  # torn by a full disk
                    continue
                if isinstance(record, dict) and isinstance(record.get("at"), int | float):
                    yield record
