"""The trainer's side of the mirror: starts the process that copies checkpoints to a remote, and hears it.

For the keeper. Knows processes and how a mirror stands; not what is copied, nor how.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from obsinfra.backup.companion import Companion, start_companion
from obsinfra.backup.mirror import MirrorStatus
from obsinfra.backup.mirror_process import LINGER_SECONDS, STOP_SECONDS, MirrorConfig
from obsinfra.monitoring.logging_config import get_logger

EventSink = Callable[[str, Mapping[str, Any]], None]
"""Gets an event's name and its facts: `checkpoint_mirror_died`, `checkpoint_mirror_unavailable`,
`checkpoint_remote_failing` (once an outage), `checkpoint_remote_recovered`."""

_REPORT_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
"""Between attempts to have a mirror process, when one after the other dies."""

_SETTLED_SECONDS = 60.0
"""A process that lived so long is no sign of one that dies at once."""

_JOIN_SECONDS = 5.0
_left_behind: list[subprocess.Popen[bytes]] = []
"""Processes that go on after their trainer's run; here so that they are reaped when they have ended."""


@dataclass(frozen=True, slots=True)
class MirrorReport:
    """How the mirror stands, for metrics.

    Attributes:
        pending: checkpoints that wait to be copied.
        lag_seconds: how long the oldest that was not copied has been waiting, also while the process is dead.
        failures: attempts that failed since the last report.
        copied_bytes: since the last report.
        restarts: processes that died since the last report.
    """

    pending: int
    lag_seconds: float
    failures: int
    copied_bytes: int
    restarts: int


class CheckpointMirror(Protocol):
    """What the keeper knows of a mirror."""

    def start(self) -> None: ...

    def committed(self) -> None: ...

    def close(self) -> None: ...


class NoMirror:
    """No remote was asked for."""

    def start(self) -> None:
        """Nothing to start."""

    def committed(self) -> None:
        """Nobody to tell."""

    def close(self) -> None:
        """Nothing to end."""


class BackgroundMirror:
    """Keeps a mirror process over `directory`, and starts another when it dies. Never makes a caller wait.

    The process outlives this one's end, however it comes, until all is copied or `linger_seconds` are over;
    what is left then, the next mirror of that folder and URL takes up.

    Args:
        directory: the checkpoint folder; made when it is not there.
        url: where the copy goes; see `remote_url.check_url`.
        on_report: told about once a second how it stands, on the mirror's thread.
        on_event: told of what happens, on the mirror's thread.
        log_path: file of JSON lines in which the process notes how it ended.
        first_wait_seconds, longest_wait_seconds: between attempts to reach the remote while they fail;
            doubled each time.
        linger_seconds: how long the process goes on after this one's end, at most.
    """

    def __init__(
        self,
        directory: Path,
        url: str,
        *,
        on_report: Callable[[MirrorReport], None],
        on_event: EventSink,
        log_path: Path | None = None,
        first_wait_seconds: float = 1.0,
        longest_wait_seconds: float = 300.0,
        linger_seconds: float = LINGER_SECONDS,
    ) -> None:
        self.url = url
        self._directory = directory.absolute()
        self._on_report = on_report
        self._on_event = on_event
        self._log_path = log_path.absolute() if log_path is not None else None
        self._waits = (first_wait_seconds, longest_wait_seconds)
        self._linger_seconds = linger_seconds
        self._log = get_logger("system")
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._companion: Companion | None = None
        self._last: subprocess.Popen[bytes] | None = None  # that goes on alone
        self._unseen: list[float] = []  # monotonic moments of commits that the process has not seen yet
        self._status = MirrorStatus(url)
        self._heard_at = time.monotonic()
        self._reported = (0, 0)  # failures and bytes of the present process that were reported
        self._restarts = 0
        self._failing = False
        if self._owner == 1:
            atexit.register(self._wait_for_process)

    def start(self) -> None:
        """Start the process, once; returns before it runs."""
        if self._thread is None and not self._closing.is_set():
            self._thread = threading.Thread(target=self._serve, name="obsinfra-mirror", daemon=True)
            self._thread.start()

    def committed(self) -> None:
        """A checkpoint is durable now. Any thread; the process finds it by itself, this is for the lag."""
        with self._lock:
            self._unseen.append(time.monotonic())

    def close(self) -> None:
        """Let the process go on alone to its end, and hear of it no more.

        Where this is the first process of its container, with which the kernel ends all others, Python's exit
        waits for the mirror.
        """
        if os.getpid() != self._owner or self._closing.is_set():
            return
        self._closing.set()
        with self._lock:
            if self._companion is not None:
                with contextlib.suppress(OSError):  # the process is gone already
                    self._companion.connection.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)

    @property
    def pid(self) -> int | None:
        """Process id of the mirror; None while there is none."""
        companion = self._companion
        return companion.process.pid if companion is not None else None

    # ---- the thread ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        deaths = 0
        while not self._closing.is_set():
            started = time.monotonic()
            try:
                companion = self._spawn()
            except OSError as error:
                self._tell("checkpoint_mirror_unavailable", error=str(error))
            else:
                self._hear(companion)
                if self._part(companion):
                    return
            deaths = 1 if time.monotonic() - started >= _SETTLED_SECONDS else deaths + 1
            again = time.monotonic() + min(0.5 * 2.0 ** (deaths - 1), _LONGEST_PAUSE_SECONDS)
            while (left := again - time.monotonic()) > 0 and not self._closing.is_set():
                self._report()  # the lag grows meanwhile
                self._closing.wait(min(left, _REPORT_SECONDS))

    def _spawn(self) -> Companion:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        companion = start_companion(
            "obsinfra.backup.mirror_process",
            lambda end: MirrorConfig(
                str(self._directory),
                self.url,
                end,
                self._owner,
                log_path=str(self._log_path or ""),
                first_wait_seconds=self._waits[0],
                longest_wait_seconds=self._waits[1],
                linger_seconds=self._linger_seconds,
            ),
        )
        with self._lock:
            self._companion = companion
            self._status = replace(self._status, failures=0, copied_bytes=0)
            if self._closing.is_set():
                companion.connection.shutdown(socket.SHUT_RDWR)
        self._reported = (0, 0)
        return companion

    def _hear(self, companion: Companion) -> None:
        """What the process says, until the line is dead."""
        companion.connection.settimeout(_REPORT_SECONDS)
        while True:
            try:
                message = companion.lines.receive()
            except TimeoutError:  # it waits for an earlier mirror, or for a processor
                self._report()
                continue
            except OSError:
                return
            if message is None:
                return
            status = MirrorStatus(**message["status"])
            with self._lock:
                self._status, self._heard_at = status, time.monotonic()
                self._unseen = [moment for moment in self._unseen if moment > message["looked_at"]]
            if (status.failing > 0) != self._failing:
                self._failing = status.failing > 0
                if self._failing:
                    self._tell("checkpoint_remote_failing", url=self.url, error=status.error)
                else:
                    self._tell("checkpoint_remote_recovered", url=self.url)
            self._report()

    def _part(self, companion: Companion) -> bool:
        """The line is dead: because this side closed it (True), or because the process died."""
        with self._lock:
            self._companion = None
        companion.hang_up()
        process = companion.process
        if self._closing.is_set():
            companion.stderr.close()
            _left_behind[:] = [left for left in _left_behind if left.poll() is None] + [process]
            self._last = process
            return True
        code, said = companion.bury()
        self._restarts += 1
        self._tell("checkpoint_mirror_died", pid=process.pid, exit_code=code, stderr=said)
        self._report()
        return False

    def _report(self) -> None:
        if self._closing.is_set():
            return
        now = time.monotonic()
        with self._lock:
            status, unseen = self._status, list(self._unseen)
            behind = status.pending > 0 or status.lag_seconds > 0
            lag = status.lag_seconds + (now - self._heard_at) if behind else 0.0
        failures, copied = self._reported
        report = MirrorReport(
            status.pending + len(unseen),
            max(lag, now - min(unseen, default=now)),
            max(0, status.failures - failures),
            max(0, status.copied_bytes - copied),
            self._restarts,
        )
        self._reported = (max(failures, status.failures), max(copied, status.copied_bytes))
        self._restarts = 0
        try:
            self._on_report(report)
        except Exception:  # a sink of somebody else, and what would count it: the copies go on
            self._log.exception("mirror_report_failed")

    def _tell(self, event: str, **facts: Any) -> None:
        try:
            self._on_event(event, facts)
        except Exception:  # likewise
            self._log.exception("event_sink_failed", event_name=event)

    def _wait_for_process(self) -> None:
        """The first process of a container is about to end, and with it all others."""
        if os.getpid() == self._owner and self._last is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._last.wait(self._linger_seconds + STOP_SECONDS)
