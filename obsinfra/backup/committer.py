"""The committer: keeps a writer and has it commit what is in the queue; without one it commits by itself.

One thread in the trainer, for the checkpointer. Knows processes and what they answer; not when to save.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from obsinfra.backup.backup_system import SavedCheckpoint
from obsinfra.backup.commit_queue import CommitQueue
from obsinfra.backup.companion import Companion, spawning, start_companion
from obsinfra.backup.compression import Compression
from obsinfra.backup.heir import HEIR_LOCK
from obsinfra.backup.retention import Retention, prune
from obsinfra.backup.shared_snapshot import SharedSnapshots
from obsinfra.backup.slot import SlotReader
from obsinfra.backup.store import CheckpointStore
from obsinfra.backup.writer import Done, WriterConfig, commit_slot
from obsinfra.errors import CheckpointError
from obsinfra.monitoring.logging_config import get_logger

EventSink = Callable[[str, Mapping[str, Any]], None]
"""Gets an event's name and its facts: `writer_started`, `writer_died`, `writer_unavailable`,
`committing_in_trainer`, `committed`, `commit_failed`, `pruned`, `prune_failed`."""

ATTEMPTS = 3
"""Writers that may die over one commit before the trainer commits it by itself."""

_LONGEST_PAUSE_SECONDS = 30.0
"""Between attempts to have a writer, when one after the other dies; a commit does not wait for it."""

_committers: weakref.WeakSet[Committer] = weakref.WeakSet()


class Committer:
    """Commits what is in `queue`, on a thread of its own; the arguments are those of `create_checkpointer`.

    Args:
        directory: the checkpoint folder.
        snapshots: what the queue's commits are of.

    Attributes:
        restarts: writers that died and were replaced, or could not be.
    """

    def __init__(
        self,
        directory: Path,
        snapshots: SharedSnapshots,
        queue: CommitQueue,
        *,
        on_event: EventSink | None,
        log_path: Path | None,
        retention: Retention | None,
        nice: int,
        threads: int,
        compression: Compression,
    ) -> None:
        self.restarts = 0
        self._directory = directory
        self._snapshots = snapshots
        self._queue = queue
        self._on_event = on_event
        self._log_path = log_path
        self._retention = retention
        self._nice = nice
        self._threads = threads
        self._compression: Compression = compression
        self._log = get_logger("system")
        self._owner = os.getpid()
        self._committed = 0  # sequence of the newest durable one
        self._lock_fd: int | None = None
        self._link: Companion | None = None
        self._deaths = 0  # of writers in a row that did nothing
        self._said_goodbye = False
        self._abandoned = False
        self._thread: threading.Thread | None = None
        _committers.add(self)

    @property
    def writer_pid(self) -> int | None:
        """Process id of the writer; None while there is none."""
        link = self._link
        return link.process.pid if link is not None else None

    def start(self) -> None:
        """Start the thread, once; returns when there is a writer, or could be none."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="obsinfra-checkpointer", daemon=True)
            self._thread.start()
            with self._queue.changed:  # from now on somebody outlives this process: true of the first one too
                self._queue.changed.wait_for(lambda: self._link is not None or self._deaths > 0)

    def dispatch(self) -> None:
        """Send the next request when the writer has nothing to do. It never has two, so this never waits."""
        with self._queue.changed:
            if self._queue.in_flight is not None or self._link is None or self._said_goodbye:
                return
            request = self._queue.take()
            if request is None:
                return
            with contextlib.suppress(OSError):  # the writer is dead, as the reader will notice
                self._link.lines.send({"op": "commit", **asdict(request.order())})

    def dismiss(self, *, abandoned: bool) -> Companion | None:
        """Nothing more will be asked for. With the queue's `changed` held; gives whom to say goodbye to.

        Args:
            abandoned: the writer ends its work alone.
        """
        self._said_goodbye = True
        self._abandoned = abandoned
        self._queue.changed.notify_all()
        return self._link

    def say_goodbye(self, link: Companion) -> None:
        """After `dismiss`, to the writer it gave."""
        with contextlib.suppress(OSError):  # it is gone already
            if self._abandoned:
                link.connection.shutdown(socket.SHUT_RDWR)
            else:
                link.lines.send({"op": "goodbye"})

    def join(self, seconds: float) -> bool:
        """Wait for the thread's end; whether it has ended."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def give_back(self) -> None:
        """After the thread's end: close the snapshots, and the lock that says who may commit here."""
        with spawning:
            _committers.discard(self)
            self._snapshots.close()
            if self._lock_fd is not None:
                os.close(self._lock_fd)

    # ---- the thread ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        """The thread: keep a writer, hear its answers, commit here when there cannot be one."""
        over = False
        while not over:
            try:
                over = self._turn()
            except Exception:
                # A bug of ours, and nobody else would take up what is asked for: told, counted by whoever is
                # told, and with another writer it may still be done.
                self._tell("checkpointer_crashed", error=traceback.format_exc(), warning=True)
                over = self._recovered()

    def _recovered(self) -> bool:
        """After a crash of the thread: without a writer or with a new one; whether that was the end."""
        if self._link is not None:
            return self._lost(self._link)
        with self._queue.changed:
            self._deaths += 1
            self._queue.changed.notify_all()
            return self._queue.changed.wait_for(lambda: self._said_goodbye, self._pause())

    def _turn(self) -> bool:
        """One thing the thread does; whether it was the last."""
        link = self._link
        if link is not None:
            message = link.lines.receive()
            if message is None:
                return self._lost(link)
            self._heard(message)
            return False
        with self._queue.changed:
            self._queue.changed.wait_for(lambda: self._queue.first or self._said_goodbye, self._pause())
            if self._said_goodbye:
                return True
            first = self._queue.first
            hopeless = first is not None and first.attempts >= ATTEMPTS
        if hopeless or not self._start():
            self._commit_here()
        else:
            self.dispatch()
        return False

    def _pause(self) -> float:
        """Seconds before another writer is tried while nobody wants one."""
        excess = self._deaths - ATTEMPTS
        return min(2.0**excess, _LONGEST_PAUSE_SECONDS) if excess >= 0 else 0.0

    def _start(self) -> bool:
        """Start a writer; False when that is impossible, which is logged and told."""
        try:
            link = self._spawn()
        except OSError as error:
            with self._queue.changed:
                self._deaths += 1
                self._queue.changed.notify_all()
            self._tell("writer_unavailable", error=str(error), warning=True)
            return False
        with self._queue.changed:
            self._link = link
            self._queue.changed.notify_all()
            if self._said_goodbye:  # closed meanwhile
                with contextlib.suppress(OSError):
                    link.lines.send({"op": "goodbye"})
        self._tell("writer_started", pid=link.process.pid, restarts=self.restarts)
        return True

    def _spawn(self) -> Companion:
        with spawning:
            lock = self._hold_heir_lock()
        return start_companion(
            "obsinfra.backup.writer",
            lambda end: WriterConfig(
                str(self._directory),
                end,
                self._snapshots.fds,
                lock,
                self._owner,
                committed=self._committed,
                nice=self._nice,
                threads=self._threads,
                compression=self._compression,
                log_path=str(self._log_path or ""),
                retention=asdict(self._retention) if self._retention is not None else None,
            ),
            (*self._snapshots.fds, lock),
        )

    def _hold_heir_lock(self) -> int:
        """One open file for the trainer and all its writers: the lock lasts as long as one of them."""
        if self._lock_fd is None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._directory / HEIR_LOCK
            self._lock_fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_SH)
        return self._lock_fd

    def _heard(self, message: Mapping[str, Any]) -> None:
        """An answer of the writer."""
        if message["op"] == "committed":
            self._deaths = 0
            self._settle(message["order"], Done(**message["done"]))
        elif message["op"] == "failed":
            self._deaths = 0
            self._settle(message["order"], _error_of(message))
        elif message["op"] == "pruned":
            self._tell("pruned", paths=message["paths"])
        elif message["op"] == "prune_failed":
            self._tell("prune_failed", error=message["error"], warning=True)

    def _lost(self, link: Companion) -> bool:
        """The line is dead. Whether that was meant; else what was in flight goes back to the queue's head."""
        link.hang_up()
        with self._queue.changed:
            meant = self._said_goodbye
            self._link = None
            self._queue.put_back()
            if not meant:
                self._deaths += 1
                self.restarts += 1
            self._queue.changed.notify_all()
        if meant:
            link.stderr.close()
            if not self._abandoned:  # else it ends its work alone
                link.process.wait()
            return True
        code, said = link.bury()
        self._tell(
            "writer_died",
            pid=link.process.pid,
            exit_code=code,
            restarts=self.restarts,
            stderr=said,
            warning=True,
        )
        return False

    def _commit_here(self) -> None:
        """There is no writer: commit the next request on this thread."""
        with self._queue.changed:
            request = self._queue.take() if self._queue.in_flight is None else None
        if request is None:
            return
        self._tell("committing_in_trainer", kind=request.kind, reason=request.reason, warning=True)
        outcome: Done | Exception
        try:
            assert request.slot is not None
            slot = SlotReader(self._snapshots.fds[request.slot])
            store = CheckpointStore(self._directory, compression=self._compression)
            outcome = commit_slot(store, slot, request.order(), self._retention)
        except (OSError, CheckpointError) as error:
            outcome = error
        except Exception as error:  # a bug of ours, which whoever waits for the commit must hear of
            self._tell("commit_crashed", kind=request.kind, error=traceback.format_exc(), warning=True)
            outcome = CheckpointError(f"the commit failed: {error!r}")
        self._settle(request.id, outcome)
        if isinstance(outcome, Done) and self._retention is not None:
            try:
                gone = prune(CheckpointStore(self._directory), self._retention, Path(outcome.path))
                self._tell("pruned", paths=[str(path) for path in gone])
            except OSError as error:
                self._tell("prune_failed", error=str(error), warning=True)

    def _settle(self, request_id: int, outcome: Done | Exception) -> None:
        """Tell whoever asked, after the next one is on its way."""
        with self._queue.changed:
            request = self._queue.in_flight
            if request is None or request.id != request_id:
                return  # closed meanwhile
            self._queue.in_flight = None
            if isinstance(outcome, Done) and outcome.resumable:
                self._committed = max(self._committed, request.sequence)
            self._queue.changed.notify_all()
        self.dispatch()
        if isinstance(outcome, Done):
            saved = SavedCheckpoint(
                Path(outcome.path),
                outcome.id,
                outcome.kind,
                outcome.step,
                outcome.epoch,
                outcome.bytes_total,
                outcome.bytes_written,
                time.perf_counter() - request.asked_at,
            )
            self._tell("committed", **asdict(outcome), reason=request.reason)
            request.pending._future.set_result(saved)
        else:
            self._tell("commit_failed", kind=request.kind, error=str(outcome), warning=True)
            request.fail(outcome)

    def _tell(self, event: str, *, warning: bool = False, **facts: Any) -> None:
        # A full disk or a closed stream must not cost a commit.
        with contextlib.suppress(OSError, ValueError):
            (self._log.warning if warning else self._log.debug)(event, **facts)
        if self._on_event is not None:
            try:
                self._on_event(event, facts)
            except Exception:  # a sink of somebody else, and what would count it: the commits go on
                self._log.exception("event_sink_failed", event_name=event)

    def _forget_in_child(self) -> None:
        """In a forked child: hold nothing that would make the writer believe the trainer lives."""
        for fd in (*self._snapshots.fds, self._lock_fd):
            if fd is not None:
                with contextlib.suppress(OSError):  # closed before the fork
                    os.close(fd)


def _error_of(message: Mapping[str, Any]) -> Exception:
    """The error that the writer met, of the same type."""
    if "os" in message:
        return OSError(*message["os"])
    return CheckpointError(*message["user"])


def _after_fork_in_child() -> None:
    for committer in list(_committers):
        committer._forget_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
