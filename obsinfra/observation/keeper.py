"""The keeper: when to snapshot, when to commit, and what to commit when the present state is not sound."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from obsinfra.backup.backup_system import BackupSystem
from obsinfra.backup.snapshot import SnapshotBuffers
from obsinfra.catalog import metrics as catalog
from obsinfra.config.settings import Settings
from obsinfra.errors import ObsinfraError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.tracing import trace_id_of
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.observation.state import LoopState

Kind = Literal["regular", "emergency", "best", "final"]

SNAPSHOT_SHARE = 0.01
"""Automatic snapshots take at most this share of the wall time."""

MIN_SNAPSHOT_SECONDS = 1.0


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
    source: Literal["live state", "host snapshot"]


class Keeper:
    """Saves one loop's state. Live state on the loop's thread only; snapshots from any thread.

    Args:
        backup: where to; None (backups disabled) makes every call a no-op that returns None.

    Attributes:
        due: `perf_counter` moment at which `keep_up` wants to be called next.
        last_commit_seconds: how long the last commit took.
    """

    def __init__(
        self, backup: BackupSystem | None, state: LoopState, monitor: TrainingMonitor, settings: Settings
    ) -> None:
        self.backup = backup
        self._state = state
        self._monitor = monitor
        self._recorder = monitor.recorder
        self._settings = settings
        self._snapshots = SnapshotBuffers()
        self._log = get_logger("training")
        self.last_commit_seconds = 0.0
        self._last_regular_at = perf_counter()
        interval = settings.checkpoint_seconds
        self._checkpoint_due = perf_counter() + interval if backup is not None and interval > 0 else math.inf
        self._snapshot_due = math.inf
        self.due = self._checkpoint_due

    def sound(self) -> bool:
        """Whether nothing speaks against the present state: last loss and gradient norm were finite."""
        recorder = self._recorder
        return all(
            value is None or math.isfinite(value) for value in (recorder.last_loss, recorder.last_grad_norm)
        )

    def keep_up(self, epoch: int) -> None:
        """At a step boundary: the regular checkpoint and the snapshot that are due."""
        if perf_counter() >= self._checkpoint_due and self.sound():
            self.commit("regular", Request.now("interval"), epoch)
        if perf_counter() >= self._snapshot_due:
            self.snapshot(epoch)

    def epoch_ended(self, epoch: int) -> None:
        """After `epoch` epochs: the regular checkpoint the settings ask for."""
        every = self._settings.checkpoint_epochs
        rested = perf_counter() - self._last_regular_at >= self._settings.checkpoint_min_seconds
        if every and epoch % every == 0 and rested and self.sound():
            self.commit("regular", Request.now("epoch end"), epoch)

    def snapshot(self, epoch: int) -> None:
        """Copy the state into host memory; nothing without backups or while the state is not sound."""
        if self.backup is None:
            return
        started = perf_counter()
        if self.sound():
            with self._recorder.phase("checkpoint"):
                taken = self._snapshots.take(
                    self._state.capture(), step=self._recorder.step, epoch=epoch, metrics=self._metrics()
                )
            if taken:
                self._monitor.instruments.observe(catalog.SNAPSHOT_SECONDS, self._snapshots.last_seconds)
        every = self._settings.snapshot_seconds or max(
            MIN_SNAPSHOT_SECONDS, self._snapshots.last_seconds / SNAPSHOT_SHARE
        )
        self._snapshot_due = started + every
        self.due = min(self._snapshot_due, self._checkpoint_due)

    @property
    def snapshot_step(self) -> int | None:
        """Step of the newest snapshot."""
        return self._snapshots.newest_step

    def commit(self, kind: Kind, request: Request, epoch: int) -> Committed | None:
        """Commit the live state; an emergency takes the last good snapshot when the state is not sound.

        Returns:
            None when backups are disabled or the commit failed (counted and logged).
        """
        if self.backup is None:
            return None
        if kind == "emergency" and not self.sound():
            return self.commit_snapshot(request)
        with self._recorder.phase("checkpoint"):
            path = self._write(
                self._state.capture(),
                kind,
                request,
                step=self._recorder.step,
                epoch=epoch,
                metrics=self._metrics(),
            )
        if kind == "regular":
            # Whether it worked or not: a full disk is tried again after the interval, not at every step.
            self._last_regular_at = perf_counter()
            if self._settings.checkpoint_seconds > 0:
                self._checkpoint_due = perf_counter() + self._settings.checkpoint_seconds
            self.due = min(self._snapshot_due, self._checkpoint_due)
        return None if path is None else Committed(path, self._recorder.step, "live state")

    def commit_snapshot(self, request: Request) -> Committed | None:
        """Commit the newest host snapshot with a finite model; any thread. None when there is none."""
        if self.backup is None:
            return None
        snapshot = self._snapshots.hold(sound=True)
        if snapshot is None:
            return None
        try:
            path = self._write(
                snapshot.state,
                "emergency",
                request,
                step=snapshot.step,
                epoch=snapshot.epoch,
                metrics=snapshot.metrics,
            )
        finally:
            self._snapshots.release()
        return None if path is None else Committed(path, snapshot.step, "host snapshot")

    def _write(
        self,
        state: Mapping[str, Any],
        kind: Kind,
        request: Request,
        *,
        step: int,
        epoch: int,
        metrics: Mapping[str, float],
    ) -> Path | None:
        assert self.backup is not None
        started = perf_counter()
        try:
            saved = self.backup.save(
                state,
                step=step,
                epoch=epoch,
                kind=kind,
                metrics=dict(metrics),
                reason=request.reason,
                attributes={"resumable": kind != "best"},
            )
            self.backup.prune()
        except (OSError, ObsinfraError) as error:
            self._monitor.instruments.add(catalog.CHECKPOINT_FAILURES, kind=kind)
            get_logger("errors").error("checkpoint_failed", kind=kind, step=step, error=str(error))
            return None
        self.last_commit_seconds = perf_counter() - started
        self._monitor.checkpoint_committed(
            kind=kind,
            step=step,
            requested_at=request.requested_at,
            bytes_total=saved.bytes_total,
            bytes_written=saved.bytes_written,
            path=str(saved.path),
            traceparent=request.traceparent,
        )
        self._log.info(
            "checkpoint",
            kind=kind,
            step=step,
            reason=request.reason,
            seconds=round(self.last_commit_seconds, 4),
            path=str(saved.path),
            **({"trace_id": trace} if (trace := trace_id_of(request.traceparent)) else {}),
        )
        return saved.path

    def _metrics(self) -> dict[str, float]:
        found = {
            "loss": self._recorder.last_loss,
            "grad_norm": self._recorder.last_grad_norm,
            **{f"validation_{name}": value for name, value in self._monitor.validation.items()},
        }
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
