"""The keeper: when to snapshot, when to commit, and what to commit when the present state is not sound."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from obsinfra.backup.background_mirror import BackgroundMirror, CheckpointMirror, MirrorReport, NoMirror
from obsinfra.backup.backup_system import BackupSystem
from obsinfra.backup.checkpointer import Checkpointer, create_checkpointer
from obsinfra.backup.commit_queue import PendingCommit
from obsinfra.backup.parts import Part
from obsinfra.catalog import metrics as catalog
from obsinfra.config.settings import Settings
from obsinfra.errors import CheckpointError, ObsinfraError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.tracing import trace_id_of
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.observation.state import LoopState

Kind = Literal["regular", "emergency", "best", "final"]

SNAPSHOT_SHARE = 0.01
"""Automatic snapshots take at most this share of the wall time."""

MIN_SNAPSHOT_SECONDS = 1.0

SLOT_SECONDS = 30.0
"""How long a commit waits for a snapshot's place while both are being committed."""

Source = Literal["live state", "host snapshot"]


@dataclass(frozen=True, slots=True)
class Request:
    """Why a checkpoint is made.

    Attributes:
        reason: for people and the manifest.
        requested_at: epoch seconds, from which its duration counts.
        traceparent: W3C trace context of whoever asked.
    """

    reason: str
    requested_at: float
    traceparent: str | None = None

    @classmethod
    def now(cls, reason: str) -> Request:
        """A request made here and now."""
        return cls(reason, time.time())


@dataclass(frozen=True, slots=True)
class Committed:
    """A durable checkpoint: its manifest, its step, and whether it is the live state or a snapshot."""

    path: Path
    step: int
    source: Source


@dataclass(frozen=True, slots=True)
class SharedStore:
    """Where all ranks commit their parts of a state.

    Attributes:
        folder: the checkpoint folder, the same for all.
        launch: the same on all ranks, of no other launch.
        rank, size: which one this is, of how many.
    """

    folder: Path
    launch: str
    rank: int
    size: int


class Saving:
    """A commit under way: the loop has paid for the copy, the writer does the rest."""

    def __init__(self) -> None:
        self._settled = threading.Condition()
        self._done = False
        self._outcome: Committed | None = None
        self._listeners: list[Callable[[Committed | None], None]] = []

    def wait(self, timeout: float | None = None) -> Committed | None:
        """Wait until it is durable; None when it failed (counted and logged), or after `timeout` seconds."""
        with self._settled:
            self._settled.wait_for(lambda: self._done, timeout)
            return self._outcome

    def then(self, listener: Callable[[Committed | None], None]) -> None:
        """Call `listener` with the outcome: on the checkpointer's thread, or at once if it is known."""
        with self._settled:
            if not self._done:
                self._listeners.append(listener)
                return
        listener(self._outcome)

    def settle(self, outcome: Committed | None) -> None:
        """It is durable and reported, or has failed."""
        with self._settled:
            self._outcome, self._done = outcome, True
            self._settled.notify_all()
        for listener in self._listeners:
            listener(outcome)


class Keeper:
    """Saves one loop's state: copies it between two steps and has the writer process commit the copy.

    Copies are for the loop's thread only; `begin_snapshot` may be called from any.

    Args:
        backup: the store; None (backups disabled) makes every call a no-op that returns None.
        log_path: where the writer notes what it saved after the trainer was lost; the mirror notes beside it,
            in `mirror.jsonl`, what it copied after the trainer's end.
        ask_all: for a state in shards, of which a copy takes all ranks: has every rank call `agreed` at one
            boundary. None: this process has all of the state.
        shared: of a state in shards, where every rank commits its own part, if `settings.checkpoint_form`
            asks for that.

    Attributes:
        due: `perf_counter` moment at which `keep_up` wants to be called next.
        last_commit_seconds: how long the last commit took, from the request to the durable manifest.
    """

    def __init__(
        self,
        backup: BackupSystem | None,
        state: LoopState,
        monitor: TrainingMonitor,
        settings: Settings,
        *,
        run: str,
        log_path: Path,
        ask_all: Callable[[str], None] | None = None,
        shared: SharedStore | None = None,
    ) -> None:
        self.backup = backup
        self._ask_all = ask_all
        self._lends = ask_all is not None and not settings.disable_backups
        self._state = state
        self._monitor = monitor
        self._recorder = monitor.recorder
        self._settings = settings
        self._log = get_logger("training")
        self._errors = get_logger("errors")
        self._checkpointer: Checkpointer | None = None
        if backup is not None:
            monitor.instruments.add(catalog.CHECKPOINT_WRITER_RESTARTS, 0)
            if settings.checkpoint_seconds > 0:
                monitor.instruments.set(catalog.CHECKPOINT_PROMISE_SECONDS, settings.checkpoint_seconds)
            self._checkpointer = create_checkpointer(
                backup.store.root,
                run=run,
                on_event=self._on_event,
                log_path=log_path,
                retention=backup.policy,
                compression=settings.checkpoint_compression,
            )
        self._shared = shared
        self._parts: Checkpointer | None = None
        self._parts_made = 0
        if shared is not None:
            self._parts = create_checkpointer(
                shared.folder,
                run=run,
                on_event=self._on_event,
                log_path=log_path.with_name(f"part-writer-rank{shared.rank}.jsonl"),
                retention=backup.policy if backup is not None else None,
            )
        self._mirror = self._mirror_of(backup, run, log_path)
        self.last_commit_seconds = 0.0
        self._unsavable: CheckpointError | None = None
        self._under_way: set[Saving] = set()
        self._last_regular_at = perf_counter()
        interval = settings.checkpoint_seconds
        self._checkpoint_due = perf_counter() + interval if backup is not None and interval > 0 else math.inf
        self._snapshot_due = math.inf
        self.due = self._checkpoint_due

    def _mirror_of(self, backup: BackupSystem | None, run: str, log_path: Path) -> CheckpointMirror:
        if backup is None or self._settings.checkpoint_remote is None:
            return NoMirror()
        for counter in (
            catalog.CHECKPOINT_REMOTE_FAILURES,
            catalog.CHECKPOINT_REMOTE_COPIED_BYTES,
            catalog.CHECKPOINT_REMOTE_RESTARTS,
        ):
            self._monitor.instruments.add(counter, 0)
        return BackgroundMirror(
            backup.store.root,
            f"{self._settings.checkpoint_remote.rstrip('/')}/{run}",
            on_report=self._on_mirror_report,
            on_event=self._on_mirror_event,
            log_path=log_path.with_name("mirror.jsonl"),
        )

    def sound(self) -> bool:
        """Whether nothing speaks against the present state: last loss and gradient norm were finite."""
        recorder = self._recorder
        return all(
            value is None or math.isfinite(value) for value in (recorder.last_loss, recorder.last_grad_norm)
        )

    def first_snapshot(self, epoch: int) -> CheckpointError | None:
        """`snapshot` before the first step; what is wrong with a state that no checkpoint can hold.

        Later such a thing is counted and logged, and the training goes on.
        """
        self._unsavable = None
        self.snapshot(epoch)
        return self._unsavable

    def keep_up(self, epoch: int) -> None:
        """At a step boundary: the regular checkpoint and the snapshot that are due."""
        if self._ask_all is not None:
            if (now := perf_counter()) < self.due:
                return
            if not self.sound():
                self.due = now + MIN_SNAPSHOT_SECONDS
                return
            self.due = math.inf  # until all ranks are at the boundary
            self._ask_all("regular" if now >= self._checkpoint_due else "snapshot")
            return
        if perf_counter() >= self._checkpoint_due and self.sound():
            self.begin("regular", Request.now("interval"), epoch)
        if perf_counter() >= self._snapshot_due:
            self.snapshot(epoch)

    def agreed(self, what: str, epoch: int) -> None:
        """Every rank, at the same boundary: what rank 0 has asked all for."""
        if what == "regular":
            self.begin("regular", Request.now("interval"), epoch)
        else:
            self.snapshot(epoch)

    def epoch_ended(self, epoch: int) -> None:
        """After `epoch` epochs: the regular checkpoint the settings ask for."""
        every = self._settings.checkpoint_epochs
        rested = perf_counter() - self._last_regular_at >= self._settings.checkpoint_min_seconds
        if self._ask_all is not None:
            # Ranks differ in what their clocks say, so rank 0 asks, and it is at a boundary soon after.
            if self._checkpointer is not None and every and epoch % every == 0 and rested:
                self._ask_all("regular")
            return
        if every and epoch % every == 0 and rested and self.sound():
            self.begin("regular", Request.now("epoch end"), epoch)

    def snapshot(self, epoch: int) -> None:
        """Copy the state into shared memory; nothing without backups or while the state is not sound."""
        if self._checkpointer is None:
            self._lend()
            return
        started = perf_counter()
        if self.sound():
            self._take(epoch, urgent=False, wait=0.0)
        else:
            self._lend()
        every = self._settings.snapshot_seconds or max(
            MIN_SNAPSHOT_SECONDS, self._checkpointer.last_snapshot_seconds / SNAPSHOT_SHARE
        )
        self._snapshot_due = started + every
        self.due = min(self._snapshot_due, self._checkpoint_due)

    @property
    def snapshot_step(self) -> int | None:
        """Step of the newest snapshot."""
        return self._checkpointer.newest_step if self._checkpointer is not None else None

    def begin(self, kind: Kind, request: Request, epoch: int) -> Saving | None:
        """Copy the live state and have it committed; an emergency takes the last sound snapshot instead when
        the present state is not sound. Returns as soon as the copy is made.

        Returns:
            None when backups are disabled or nothing could be copied (counted and logged).
        """
        if self._parts is not None and self._shared is not None:
            return self._begin_in_parts(self._parts, self._shared, kind, request, epoch)
        if self._checkpointer is None:
            self._lend()
            return None
        if kind == "emergency" and not self.sound():
            self._lend()
            return self.begin_snapshot(request)
        problem = self._take(epoch, urgent=kind == "emergency", wait=SLOT_SECONDS)
        saving = self._commit(kind, request, "live state", sound=False) if problem is None else None
        if problem is not None:
            self._failed(kind, problem)
        if kind == "regular":
            self._rest()
        return saving

    def _rest(self) -> None:
        # Whether it worked or not: a full disk is tried again after the interval, not at every step.
        self._last_regular_at = perf_counter()
        if self._settings.checkpoint_seconds > 0:
            self._checkpoint_due = perf_counter() + self._settings.checkpoint_seconds
        self.due = min(self._snapshot_due, self._checkpoint_due)

    def begin_snapshot(self, request: Request) -> Saving | None:
        """Have the newest sound snapshot committed as an emergency; any thread. None when there is none."""
        return self._commit("emergency", request, "host snapshot", sound=True)

    def commit(self, kind: Kind, request: Request, epoch: int) -> Committed | None:
        """`begin`, and wait until it is durable; the wait is accounted as checkpoint time."""
        with self._recorder.phase("checkpoint"):
            saving = self.begin(kind, request, epoch)
            return saving.wait() if saving is not None else None

    def commit_snapshot(self, request: Request) -> Committed | None:
        """`begin_snapshot`, and wait until it is durable; any thread."""
        saving = self.begin_snapshot(request)
        return saving.wait() if saving is not None else None

    def settle(self) -> None:
        """Wait until nothing is on its way to the store any more."""
        with self._recorder.phase("checkpoint"):
            for saving in list(self._under_way):
                saving.wait()

    def close(self, timeout: float) -> None:
        """Wait for what is being committed, then end the writers; they go on alone after `timeout` seconds.

        The mirror is not waited for: its process goes on until all is copied, for a bounded time.
        """
        closed = [one.close(timeout) for one in (self._parts, self._checkpointer) if one is not None]
        if not all(closed):
            self._errors.error("checkpoints_not_finished", seconds=timeout)
        self._mirror.close()

    # ---- inside ------------------------------------------------------------------------------------

    def _lend(self) -> None:
        """Take part in the gathering of a state in shards where this rank, or this moment, keeps nothing."""
        if self._lends:
            with self._recorder.phase("checkpoint"):
                self._state.capture()

    def _begin_in_parts(
        self, parts: Checkpointer, shared: SharedStore, kind: Kind, request: Request, epoch: int
    ) -> Saving | None:
        """Every rank, at the same boundary: copy this rank's part; all writers commit them as one."""
        from obsinfra.backup import dcp_state

        self._mirror.start()
        self._parts_made += 1
        with self._recorder.phase("checkpoint"):
            state = self._state.capture(in_parts=True)
            sound = dcp_state.everywhere(self.sound() and dcp_state.finite(state))
            taken = False
            if sound:
                try:
                    taken = parts.snapshot(
                        dcp_state.part_of(state),
                        step=self._recorder.step,
                        epoch=epoch,
                        metrics=self._metrics(),
                        sound=False,  # a part by itself is nothing that its writer could commit
                        wait=SLOT_SECONDS,
                    )
                except (OSError, ObsinfraError) as error:
                    self._errors.error("part_not_copied", rank=shared.rank, error=str(error))
            taken = dcp_state.everywhere(taken)
        saving = None
        if taken:
            saving = self._commit_part(parts, shared, kind, request)
        elif kind == "emergency":  # the last sound snapshot, which is whole
            saving = self.begin_snapshot(request)
        elif self.backup is not None:
            why = "not every rank could copy its part" if sound else "the state is not finite on every rank"
            self._failed(kind, why)
        if self.backup is not None and kind == "regular":
            self._rest()
        return saving

    def _commit_part(
        self, parts: Checkpointer, shared: SharedStore, kind: Kind, request: Request
    ) -> Saving | None:
        pending = parts.commit(
            kind,
            request.reason,
            attributes={"resumable": kind != "best"},
            part=Part(shared.launch, self._parts_made, shared.rank, shared.size),
        )
        if self.backup is None:  # rank 0 tells of it, and of what failed
            return None
        return self._under_way_until(pending, request, "live state")

    def _take(self, epoch: int, *, urgent: bool, wait: float) -> str | None:
        """Copy the state; why it was not copied, if so."""
        assert self._checkpointer is not None
        self._mirror.start()
        with self._recorder.phase("checkpoint"):
            try:
                captured = self._state.capture()
                taken = self._checkpointer.snapshot(
                    captured,
                    step=self._recorder.step,
                    epoch=epoch,
                    metrics=self._metrics(),
                    sound=self.sound() and self._state.finite(captured),
                    urgent=urgent,
                    wait=wait,
                )
            except (OSError, ObsinfraError) as error:
                self._failed("snapshot", str(error))
                if isinstance(error, CheckpointError):
                    self._unsavable = error
                return str(error)
        if not taken:
            return "both snapshots were being committed all the time"
        self._monitor.instruments.observe(catalog.SNAPSHOT_SECONDS, self._checkpointer.last_snapshot_seconds)
        return None

    def _commit(self, kind: Kind, request: Request, source: Source, *, sound: bool) -> Saving | None:
        if self._checkpointer is None:
            return None
        try:
            pending = self._checkpointer.commit(
                kind, request.reason, attributes={"resumable": kind != "best"}, sound=sound
            )
        except ObsinfraError as error:
            self._failed(kind, str(error))
            return None
        return self._under_way_until(pending, request, source)

    def _under_way_until(self, pending: PendingCommit, request: Request, source: Source) -> Saving:
        saving = Saving()
        self._under_way.add(saving)
        saving.then(lambda _: self._under_way.discard(saving))
        pending.add_done_callback(lambda done: saving.settle(self._report(done, request, source)))
        return saving

    def _report(self, pending: PendingCommit, request: Request, source: Source) -> Committed | None:
        """The checkpointer's thread: what was asked for is durable, or has failed."""
        try:
            saved = pending.wait(0)
        except (OSError, ObsinfraError) as error:
            self._failed(pending.kind, str(error))
            return None
        self.last_commit_seconds = saved.duration_seconds
        self._mirror.committed()
        self._monitor.checkpoint_committed(
            kind=saved.kind,
            step=saved.step,
            requested_at=request.requested_at,
            bytes_total=saved.bytes_total,
            bytes_written=saved.bytes_written,
            path=str(saved.path),
            traceparent=request.traceparent,
        )
        trace = trace_id_of(request.traceparent)
        self._log.info(
            "checkpoint",
            kind=saved.kind,
            step=saved.step,
            reason=request.reason,
            seconds=round(saved.duration_seconds, 4),
            path=str(saved.path),
            **({"trace_id": trace} if trace else {}),
        )
        return Committed(saved.path, saved.step, source)

    def _failed(self, kind: str, error: str) -> None:
        self._monitor.instruments.add(catalog.CHECKPOINT_FAILURES, kind=kind)
        self._errors.error("checkpoint_failed", kind=kind, at_step=self._recorder.step, error=error)

    def _on_event(self, event: str, facts: Mapping[str, Any]) -> None:
        if event == "writer_died":
            self._monitor.instruments.add(catalog.CHECKPOINT_WRITER_RESTARTS)
        if event == "checkpointer_crashed":
            self._monitor.instruments.add(catalog.TELEMETRY_ERRORS, component="checkpointer")
        if event in ("writer_died", "writer_unavailable", "committing_in_trainer", "checkpointer_crashed"):
            self._errors.error(event, **facts)

    def _on_mirror_report(self, report: MirrorReport) -> None:
        instruments = self._monitor.instruments
        instruments.set(catalog.CHECKPOINT_REMOTE_PENDING, report.pending)
        instruments.set(catalog.CHECKPOINT_REMOTE_LAG_SECONDS, report.lag_seconds)
        instruments.add(catalog.CHECKPOINT_REMOTE_FAILURES, report.failures)
        instruments.add(catalog.CHECKPOINT_REMOTE_COPIED_BYTES, report.copied_bytes)
        instruments.add(catalog.CHECKPOINT_REMOTE_RESTARTS, report.restarts)

    def _on_mirror_event(self, event: str, facts: Mapping[str, Any]) -> None:
        if event == "checkpoint_remote_recovered":
            self._log.info(event, **facts)
        elif event == "checkpoint_remote_failing":  # training is as well as before; the lag metric tells more
            self._log.warning(event, **facts)
        else:
            self._errors.error(event, **facts)

    def _metrics(self) -> dict[str, float]:
        found = {
            "loss": self._recorder.last_loss,
            "grad_norm": self._recorder.last_grad_norm,
            **{f"validation_{name}": value for name, value in self._monitor.validation.items()},
        }
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
