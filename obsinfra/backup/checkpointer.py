"""The checkpointer: the loop pays for a memory copy; another process commits it and outlives the trainer.

For any training loop. Knows snapshots, the writer and who may overwrite what; not when to save, nor why.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from obsinfra.backup.backup_system import Kind, SavedCheckpoint
from obsinfra.backup.companion import Companion, spawning, start_companion
from obsinfra.backup.compression import Compression, check_compression
from obsinfra.backup.heir import HEIR_LOCK
from obsinfra.backup.heir import wait_for_heir as wait_for_heir  # for those who only know this module
from obsinfra.backup.parts import Part
from obsinfra.backup.retention import Retention, prune
from obsinfra.backup.shared_snapshot import SharedSnapshots
from obsinfra.backup.slot import SlotReader, SnapshotHead
from obsinfra.backup.store import CheckpointStore
from obsinfra.backup.tensors import code_versions
from obsinfra.backup.writer import MESSAGE_BYTES, Done, Order, WriterConfig, commit_slot
from obsinfra.errors import CheckpointError
from obsinfra.monitoring.logging_config import get_logger

EventSink = Callable[[str, Mapping[str, Any]], None]
"""Gets an event's name and its facts: `writer_started`, `writer_died`, `writer_unavailable`,
`committing_in_trainer`, `committed`, `commit_failed`, `pruned`, `prune_failed`."""

ATTEMPTS = 3
"""Writers that may die over one commit before the trainer commits it by itself."""

_LONGEST_PAUSE_SECONDS = 30.0
"""Between attempts to have a writer, when one after the other dies; a commit does not wait for it."""

_checkpointers: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


def create_checkpointer(
    directory: Path | str,
    *,
    run: str = "",
    on_event: EventSink | None = None,
    log_path: Path | str | None = None,
    retention: Retention | None = None,
    nice: int = 10,
    threads: int = 2,
    compression: Compression = "off",
) -> Checkpointer:
    """A checkpointer over `directory`, which is created with the first snapshot.

    Args:
        run: run id written into manifests.
        on_event: told of what happens, on whatever thread; must not block.
        log_path: file of JSON lines in which the writer records how a trainer was lost and what it saved.
        retention: what stays; the writer prunes after every commit, and before one for which there is too
            little space. None: nothing is removed.
        nice: added to the writer's niceness.
        threads: how many tensors the writer hashes and writes at a time.
        compression: as for `create_backup_system`; it is the writer's work.

    Raises:
        OSError: no shared memory can be made.
        ValueError: no such compression.
    """
    return Checkpointer(
        Path(directory).absolute(),
        run=run,
        on_event=on_event,
        log_path=Path(log_path).absolute() if log_path is not None else None,
        retention=retention,
        nice=nice,
        threads=threads,
        compression=compression,
    )


class PendingCommit:
    """A commit that was asked for."""

    def __init__(self, kind: Kind, reason: str) -> None:
        self.kind = kind
        self.reason = reason
        self._future: Future[SavedCheckpoint] = Future()

    @property
    def done(self) -> bool:
        """Whether it is durable or has failed."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> SavedCheckpoint:
        """Wait until it is durable.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            CheckpointError, OSError: it failed; the store is as it was.
            TimeoutError: it is still being worked on.
        """
        return self._future.result(timeout)

    def add_done_callback(self, callback: Callable[[PendingCommit], None]) -> None:
        """Call `callback(self)` when it is done: on the checkpointer's thread, or at once if it is."""
        self._future.add_done_callback(lambda _: callback(self))


@dataclass(slots=True)
class _Request:
    """A commit in the queue. `slot` is None once a newer snapshot took the one it was asked for."""

    id: int
    kind: Kind
    reason: str
    attributes: Mapping[str, Any]
    sound: bool
    slot: int | None
    pending: PendingCommit
    asked_at: float = field(default_factory=time.perf_counter)
    attempts: int = 0
    sequence: int = 0
    part: Part | None = None


class Checkpointer:
    """Snapshots and commits of one loop; made by `create_checkpointer`.

    Only the loop's thread takes snapshots; any thread commits. Without `close`, the writer takes the end of
    the process for a crash and commits the newest sound snapshot, if it is not yet.

    Attributes:
        writer_restarts: writers that died and were replaced, or could not be.
    """

    def __init__(
        self,
        directory: Path,
        *,
        run: str,
        on_event: EventSink | None,
        log_path: Path | None,
        retention: Retention | None,
        nice: int,
        threads: int,
        compression: Compression,
    ) -> None:
        check_compression(compression)
        self.directory = directory
        self.writer_restarts = 0
        self._run = run
        self._on_event = on_event
        self._log_path = log_path
        self._retention = retention
        self._nice = nice
        self._threads = threads
        self._compression: Compression = compression
        self._log = get_logger("system")
        self._versions = code_versions()
        self._snapshots = SharedSnapshots(directory)
        self._owner = os.getpid()
        self._changed = threading.Condition()
        self._queue: list[_Request] = []
        self._in_flight: _Request | None = None
        self._taking: int | None = None  # slot that is being overwritten
        self._ids = 0
        self._committed = 0  # sequence of the newest durable one
        self._lock_fd: int | None = None
        self._link: Companion | None = None
        self._deaths = 0  # of writers in a row that did nothing
        self._closing = False
        self._said_goodbye = False
        self._abandoned = False
        self._thread: threading.Thread | None = None
        _checkpointers.add(self)

    # ---- the loop's side ---------------------------------------------------------------------------

    def snapshot(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        epoch: int,
        metrics: Mapping[str, float] | None = None,
        sound: bool = True,
        urgent: bool = False,
        wait: float = 0.0,
    ) -> bool:
        """Copy `state` (nested, as `state_tree.encode` takes; tensors on any device) into shared memory.

        The first one also allocates the memory and starts the writer.

        Args:
            metrics: values worth keeping with it.
            sound: nothing speaks against this state (finite loss and gradient norm). The writer commits no
                other one by itself, and the last sound one is not overwritten by one that is not.
            urgent: take the place of a snapshot whose commit has not begun; that commit gets this state
                instead (not if its kind is `best`).
            wait: seconds to wait for a slot when both are being committed.

        Returns:
            False when there was no slot: nothing was copied.

        Raises:
            CheckpointError: something in the state cannot be stored; it names the place.
            OSError: not enough memory.
        """
        with self._changed:
            self._check_usable()
            if not self._changed.wait_for(lambda: self._closing or self._free_slot(urgent) is not None, wait):
                return False
            self._check_usable()
            slot = self._taking = self._free_slot(urgent)
            assert slot is not None
            for request in self._queue:
                if request.slot == slot:
                    request.slot = None
        head = SnapshotHead(self._run, step, epoch, time.time(), dict(metrics or {}), self._versions)
        try:
            self._snapshots.take(slot, state, head, sound=sound)
        finally:
            with self._changed:
                self._taking = None
                self._changed.notify_all()
            self._dispatch()
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="obsinfra-checkpointer", daemon=True)
            self._thread.start()
            with self._changed:  # from now on somebody outlives this process: true of the first one too
                self._changed.wait_for(lambda: self._link is not None or self._deaths > 0)
        return True

    def commit(
        self,
        kind: Kind,
        reason: str,
        *,
        attributes: Mapping[str, Any] | None = None,
        sound: bool = False,
        part: Part | None = None,
    ) -> PendingCommit:
        """Have the newest snapshot committed. Any thread; returns at once.

        An emergency goes before everything that has not begun.

        Args:
            attributes: further JSON facts for the manifest; `resumable` is true unless said otherwise.
            sound: the newest sound snapshot instead.
            part: the snapshot is this rank's part (`dcp_state.part_of`), and is committed with all others.

        Raises:
            CheckpointError: there is no snapshot, or the attributes are not JSON or too large.
        """
        facts = dict(attributes or {})
        try:
            size = len(json.dumps([kind, reason, facts], allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"attributes {facts!r} are not JSON: {error}", "plain JSON values"
            ) from error
        if size > MESSAGE_BYTES // 2:
            raise CheckpointError(f"reason and attributes take {size} bytes", f"at most {MESSAGE_BYTES // 2}")
        with self._changed:
            self._check_usable()
            slot = self._snapshots.newest(sound=sound, besides=self._taking)
            if slot is None:
                raise CheckpointError(
                    f"no {'sound ' if sound else ''}snapshot to commit", "one", "call snapshot() first"
                )
            self._ids += 1
            pending = PendingCommit(kind, reason)
            request = _Request(self._ids, kind, reason, facts, sound, slot, pending, part=part)
            self._enqueue(request)
            self._changed.notify_all()
        self._dispatch()
        return pending

    def close(self, timeout: float = 60.0) -> bool:
        """Finish pending commits, say goodbye to the writer, wait for its end, give the memory back.

        Args:
            timeout: seconds. When they are over, pending commits fail here, and the writer goes on by
                itself: it ends what it is at and commits the newest sound snapshot.

        Returns:
            Whether everything was done in time.
        """
        if os.getpid() != self._owner:
            return True
        deadline = time.monotonic() + timeout
        with self._changed:
            if self._closing:
                return True
            self._closing = True
            idle = self._changed.wait_for(lambda: not self._queue and self._in_flight is None, timeout)
            left = [*self._queue, *([self._in_flight] if self._in_flight else [])]
            self._queue.clear()
            self._in_flight = None
            self._said_goodbye = True
            self._abandoned = not idle
            link = self._link
            self._changed.notify_all()
        if link is not None:
            with contextlib.suppress(OSError):  # it is gone already
                if idle:
                    link.lines.send({"op": "goodbye"})
                else:
                    link.connection.shutdown(socket.SHUT_RDWR)
        for request in left:
            _fail(
                request, CheckpointError("the checkpointer was closed before it was committed", "more time")
            )
        if self._thread is not None:
            self._thread.join(max(1.0, deadline - time.monotonic()))
            if self._thread.is_alive():  # it still uses the descriptors; the process's end gives them back
                self._log.warning("writer_left_alone", pid=self.writer_pid)
                return False
        with spawning:
            _checkpointers.discard(self)
            self._snapshots.close()
            if self._lock_fd is not None:
                os.close(self._lock_fd)
        return idle

    @property
    def newest_step(self) -> int | None:
        """Step of the newest snapshot; None before the first."""
        slot = self._snapshots.newest()
        taken = self._snapshots.taken[slot] if slot is not None else None
        return taken.step if taken is not None else None

    @property
    def last_snapshot_seconds(self) -> float:
        """How long the loop waited for the last snapshot."""
        return self._snapshots.last_seconds

    @property
    def writer_pid(self) -> int | None:
        """Process id of the writer; None while there is none."""
        link = self._link
        return link.process.pid if link is not None else None

    # ---- who may overwrite what; all with the lock held ----------------------------------------------

    def _check_usable(self) -> None:
        if os.getpid() != self._owner:
            raise CheckpointError(f"this checkpointer belongs to process {self._owner}", "that process")
        if self._closing:
            raise CheckpointError("this checkpointer is closed", "an open one")

    def _free_slot(self, urgent: bool) -> int | None:
        """The slot that the next snapshot goes to, None when it would overwrite what is wanted."""
        reading = self._in_flight.slot if self._in_flight is not None else None
        wanted = {request.slot for request in self._queue}
        first = self._snapshots.next_slot()
        if first != reading and first not in wanted:
            return first
        kept = {request.slot for request in self._queue if request.kind == "best"}
        for slot in (first, 1 - first) if urgent else ():
            if slot != reading and slot not in kept:
                return slot
        return None

    def _enqueue(self, request: _Request) -> None:
        """Emergencies before the others, else in the order they came."""
        others = [i for i, queued in enumerate(self._queue) if queued.kind != "emergency"]
        place = others[0] if request.kind == "emergency" and others else len(self._queue)
        self._queue.insert(place, request)

    def _next(self) -> _Request | None:
        """Take the next request from the queue, bound to a snapshot; those without one fail."""
        while self._queue:
            request = self._queue[0]
            if request.slot is None:
                if self._taking is not None:
                    return None  # the snapshot being taken is for this one
                request.slot = self._snapshots.newest(sound=request.sound)
            taken = self._snapshots.taken[request.slot] if request.slot is not None else None
            self._queue.pop(0)
            if taken is None:
                self._changed.notify_all()
                _fail(request, CheckpointError("its snapshot was lost to a newer one that failed", "one"))
                continue
            request.sequence = taken.sequence
            request.attempts += 1
            self._in_flight = request
            return request
        return None

    # ---- the line to the writer ----------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Send the next request when the writer has nothing to do. It never has two, so this never waits."""
        with self._changed:
            if self._in_flight is not None or self._link is None or self._said_goodbye:
                return
            request = self._next()
            if request is None:
                return
            with contextlib.suppress(OSError):  # the writer is dead, as the reader will notice
                self._link.lines.send({"op": "commit", **asdict(_order(request))})

    def _serve(self) -> None:
        """The thread: keep a writer, hear its answers, commit here when there cannot be one."""
        over = False
        while not over:
            try:
                over = self._turn()
            except Exception:  # a bug of ours: with another writer, what was asked may still be done
                self._tell("checkpointer_crashed", error=traceback.format_exc(), warning=True)
                if self._link is not None:
                    over = self._lost(self._link)

    def _turn(self) -> bool:
        """One thing the thread does; whether it was the last."""
        link = self._link
        if link is not None:
            message = link.lines.receive()
            if message is None:
                return self._lost(link)
            self._heard(message)
            return False
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._said_goodbye, self._pause())
            if self._said_goodbye:
                return True
            hopeless = bool(self._queue) and self._queue[0].attempts >= ATTEMPTS
        if hopeless or not self._start():
            self._commit_here()
        else:
            self._dispatch()
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
            with self._changed:
                self._deaths += 1
                self._changed.notify_all()
            self._tell("writer_unavailable", error=str(error), warning=True)
            return False
        with self._changed:
            self._link = link
            self._changed.notify_all()
            if self._said_goodbye:  # closed meanwhile
                with contextlib.suppress(OSError):
                    link.lines.send({"op": "goodbye"})
        self._tell("writer_started", pid=link.process.pid, restarts=self.writer_restarts)
        return True

    def _spawn(self) -> Companion:
        with spawning:
            lock = self._hold_heir_lock()
        return start_companion(
            "obsinfra.backup.writer",
            lambda end: WriterConfig(
                str(self.directory),
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
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self.directory / HEIR_LOCK
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
        with self._changed:
            meant = self._said_goodbye
            self._link = None
            if self._in_flight is not None:
                self._queue.insert(0, self._in_flight)
                self._in_flight = None
            if not meant:
                self._deaths += 1
                self.writer_restarts += 1
            self._changed.notify_all()
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
            restarts=self.writer_restarts,
            stderr=said,
            warning=True,
        )
        return False

    def _commit_here(self) -> None:
        """There is no writer: commit the next request on this thread."""
        with self._changed:
            request = self._next() if self._in_flight is None else None
        if request is None:
            return
        self._tell("committing_in_trainer", kind=request.kind, reason=request.reason, warning=True)
        outcome: Done | Exception
        try:
            assert request.slot is not None
            slot = SlotReader(self._snapshots.fds[request.slot])
            store = CheckpointStore(self.directory, compression=self._compression)
            outcome = commit_slot(store, slot, _order(request), self._retention)
        except (OSError, CheckpointError) as error:
            outcome = error
        except Exception as error:
            self._tell("commit_crashed", kind=request.kind, error=traceback.format_exc(), warning=True)
            outcome = CheckpointError(f"the commit failed: {error!r}")
        self._settle(request.id, outcome)
        if isinstance(outcome, Done) and self._retention is not None:
            try:
                gone = prune(CheckpointStore(self.directory), self._retention, Path(outcome.path))
                self._tell("pruned", paths=[str(path) for path in gone])
            except OSError as error:
                self._tell("prune_failed", error=str(error), warning=True)

    def _settle(self, request_id: int, outcome: Done | Exception) -> None:
        """Tell whoever asked, after the next one is on its way."""
        with self._changed:
            request = self._in_flight
            if request is None or request.id != request_id:
                return  # closed meanwhile
            self._in_flight = None
            if isinstance(outcome, Done) and outcome.resumable:
                self._committed = max(self._committed, request.sequence)
            self._changed.notify_all()
        self._dispatch()
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
            _fail(request, outcome)

    def _tell(self, event: str, *, warning: bool = False, **facts: Any) -> None:
        # A full disk or a closed stream must not cost a commit.
        with contextlib.suppress(OSError, ValueError):
            (self._log.warning if warning else self._log.debug)(event, **facts)
        if self._on_event is not None:
            try:
                self._on_event(event, facts)
            except Exception:
                self._log.exception("event_sink_failed", event_name=event)

    def _forget_in_child(self) -> None:
        """In a forked child: hold nothing that would make the writer believe the trainer lives."""
        for fd in (*self._snapshots.fds, self._lock_fd):
            if fd is not None:
                with contextlib.suppress(OSError):  # closed before the fork
                    os.close(fd)


def _order(request: _Request) -> Order:
    assert request.slot is not None
    return Order(
        request.id,
        request.slot,
        request.sequence,
        request.kind,
        request.reason,
        dict(request.attributes),
        astuple(request.part) if request.part is not None else None,
    )


def _error_of(message: Mapping[str, Any]) -> Exception:
    """The error that the writer met, of the same type."""
    if "os" in message:
        return OSError(*message["os"])
    return CheckpointError(*message["user"])


def _fail(request: _Request, error: Exception) -> None:
    request.pending._future.set_exception(error)


def _after_fork_in_child() -> None:
    for checkpointer in list(_checkpointers):
        checkpointer._forget_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
