"""ObservedRun: what `observe()` returns. Watches a loop, obeys commands, saves and restores its state.

The trainer and anybody's plain loop use the same object. What is not on the step path lives beside it:
`state`, `position`, `keeper` (checkpoints), `signals`, `watchdog`, `alert_duty`.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from obsinfra.alerting.evaluator import AlertStatus
from obsinfra.backup.backup_system import LoadedCheckpoint, Stateful, create_backup_system
from obsinfra.backup.rng import capture_rng_state, restore_rng_state
from obsinfra.catalog import actions as catalog_actions
from obsinfra.catalog import metrics as catalog
from obsinfra.config.resolve import dump_toml, resolve
from obsinfra.config.settings import Settings
from obsinfra.control.channel import ControlChannel
from obsinfra.control.command import Ack, Command
from obsinfra.errors import NonFiniteLossError, ObsinfraError
from obsinfra.monitoring.logging_config import get_logger, set_context_source
from obsinfra.monitoring.recorder import _Phase
from obsinfra.monitoring.tracing import trace_id_of
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.observation.alert_duty import AlertDuty
from obsinfra.observation.keeper import Committed, Keeper, Kind, Request
from obsinfra.observation.position import DataPosition
from obsinfra.observation.resume import ResumePlan, check_remote, plan_run
from obsinfra.observation.signals import InterruptedWait, SignalDoor
from obsinfra.observation.state import LoopState, unwrapped
from obsinfra.observation.watchdog import Watchdog
from obsinfra.run.files import write_atomic, write_json_atomic
from obsinfra.run.folder import ENDED_STATES, RunInfo
from obsinfra.run.process import ProcessId

CLOSE_SECONDS = 60.0
"""For what is being committed when the run ends; the writer goes on alone if it takes longer."""

_CHECKPOINT, _EMERGENCY, _STOP = (
    action.name
    for action in (catalog_actions.CHECKPOINT, catalog_actions.EMERGENCY_CHECKPOINT, catalog_actions.STOP)
)

PROGRESS_SECONDS = 2.0
"""How often the step reached is noted, to know after a crash how many steps are done again."""


@dataclass(frozen=True, slots=True)
class StopRequest:
    """Why the run is asked to end.

    Attributes:
        reason: for people, e.g. `signal SIGTERM` or `command stop (cli: by hand)`.
        exit_code: what the process should exit with: 128 + signal number, or 0 for a command.
    """

    reason: str
    exit_code: int


def observe(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    run: str | None = None,
    model_name: str | None = None,
    resume: str | None = None,
    scheduler: Stateful | None = None,
    scaler: Stateful | None = None,
    extra: Mapping[str, Stateful] | None = None,
    settings: Settings | None = None,
    plan: ResumePlan | None = None,
    device: str | None = None,
    precision: str = "fp32",
    **overrides: Any,
) -> ObservedRun:
    """Give a PyTorch loop metrics, alerts, control and checkpoints.

        run = obsinfra.observe(model, optimizer, run="my-run", resume="auto")
        for epoch in run.epochs(10):
            for batch in run.steps(loader):
                ...
                run.record(loss=loss, grad_norm=norm)

    Args:
        model: the module being trained; a compiled or DDP-wrapped one is saved under its own names.
        optimizer: its optimizer, saved and restored with it.
        run: name of the run folder; default: model name, time and four random digits.
        model_name: the `model` label; default: the module's class name.
        resume: `auto`, a run name or a checkpoint path (see `Settings.resume`).
        scheduler, scaler, extra: further state to save and restore.
        settings: all settings at once; else environment, obsinfra.toml and defaults, with `overrides` on top.
        plan: an already decided resume plan.
        device, precision: shown on the page and in build info; the device is the model's by default.
        overrides: any field of `Settings`, e.g. `checkpoint_seconds=60`.

    Raises:
        ConfigError, CheckpointError, RunBusyError: see each setting's bounds and `plan_run`.
    """
    name = model_name or type(unwrapped(model)).__name__
    if settings is None:
        settings = resolve({**overrides, "run": run, "resume": resume, "model_name": name}).settings
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    first = next(iter(model.parameters()), None)
    return ObservedRun(
        model,
        {part: found for part, found in parts.items() if found is not None},
        extra or {},
        model_name=name,
        settings=settings,
        plan=plan or plan_run(settings, name),
        device=device or (str(first.device) if first is not None else "cpu"),
        precision=precision,
    )


class ObservedRun:
    """One run of one loop; made by `observe`. Also a context manager that records how the loop ended.

    Attributes:
        folder: the run folder.
        monitor: the `TrainingMonitor` of this process.
        keeper: makes its checkpoints.
        position: epoch and batch counters.
        stop: set once the run is asked to end; `steps` and `epochs` end their iteration by themselves.
        resumed: the checkpoint this process started from, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, Stateful],
        extra: Mapping[str, Stateful],
        *,
        model_name: str,
        settings: Settings,
        plan: ResumePlan,
        device: str,
        precision: str,
    ) -> None:
        check_remote(
            settings
        )  # again: a resumed run's own settings may name one that this machine cannot use
        self.settings = settings
        self.folder = plan.folder
        self.stop: StopRequest | None = None
        self.resumed: LoadedCheckpoint | None = None
        self.position = DataPosition()
        self._log = get_logger("training")
        self._system_log = get_logger("system")
        self._acting = threading.RLock()
        self._attention = False
        self._ended = False
        self._signalled: tuple[str, float] | None = None
        self._progress_due = 0.0
        self._epochs_counted = 0
        self._in_epochs = False
        self._pid = os.getpid()
        self._revision = git_revision()

        made = not self.folder.root.exists()
        self.folder.create()
        self.folder.lock()
        self.channel = ControlChannel(
            self.folder,
            on_garbage=self._on_garbage,
            on_outcome=self._on_outcome,
            on_arrival=self._on_arrival,
        )
        self._duty = AlertDuty(self.folder, self.channel.submit)
        self.monitor = TrainingMonitor(
            model_name,
            run=self.folder.id,
            metrics_host=settings.metrics_host,
            metrics_port=settings.metrics_port,
            sample_seconds=settings.sample_seconds,
            thresholds=settings.thresholds,
            trace_every=settings.trace_every,
            otlp_endpoint=settings.otlp_endpoint,
            trace_file=self.folder.traces / "spans.jsonl",
            disk_path=self.folder.root,
            epochs=settings.epochs or 0,
            device=device,
            precision=precision,
            git_revision=self._revision,
            after_alerts=self._after_alerts,
            alert_mode=self._duty.mode,
        )
        self._recorder = self.monitor.recorder
        set_context_source(lambda: {"step": self.step, "trace_id": self.monitor.trace_id})
        self._state = LoopState(model, parts, extra, self.position, self._recorder)
        backup = None
        if not settings.disable_backups:
            backup = create_backup_system(
                self.folder.checkpoints, keep_last=settings.keep_checkpoints, run=self.folder.id
            )
        self.keeper = Keeper(
            backup,
            self._state,
            self.monitor,
            settings,
            run=self.folder.id,
            log_path=self.folder.logs / "writer.jsonl",
        )
        self._door = SignalDoor(
            settings.stop_signals, on_signal=self._on_signal, on_second_interrupt=self._on_second_interrupt
        )
        self._door.install()
        self._watchdog = Watchdog(
            self._door.wake_fd, on_signal_fd=self._on_signal_fd, on_overdue=self._overdue
        )
        try:
            if plan.store is not None:
                self._restore(plan)
            self._nonfinite_seen = self._recorder.nonfinite
            self.channel.start()
            if not settings.disable_monitoring:
                self.monitor.start_monitoring()
            self._introduce(plan)
        except BaseException:
            self._close_doors()
            self.keeper.close(CLOSE_SECONDS)
            self.monitor.stop_monitoring()
            self.folder.unlock()
            if made:
                shutil.rmtree(self.folder.root, ignore_errors=True)
            raise
        self.keeper.snapshot(self.position.epoch)
        atexit.register(self.finish)
        self._previous_excepthook = sys.excepthook
        sys.excepthook = self._excepthook

    # ---- the loop's side -------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Global step: the one under way, or the next one between two steps."""
        return self._recorder.step

    def epochs(self, count: int | None = None) -> Iterator[int]:
        """Epoch numbers from where the run stands up to `count`; ends early when a stop is asked for."""
        total = count if count is not None else self.settings.epochs
        self.monitor.epochs = total or 0
        self.folder.update_info(epochs=total or 0)
        self._in_epochs = True
        if self._attention:
            self._boundary()
        while (total is None or self.position.epoch < total) and self.stop is None:
            epoch = self.position.epoch
            self.monitor.begin_epoch(epoch)
            yield epoch
            if self.stop is None:
                self._epoch_ended()

    def steps(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Batches of `loader`; each iteration is one step, with the wait for its batch seen as data time.

        Between two steps the run obeys: commands, signals, due snapshots and checkpoints. On a resumed run
        the iteration goes on where the checkpoint was taken. Called outside `epochs`, each call is one
        epoch, and epochs that were complete are passed over.
        """
        position, recorder, keeper, door = self.position, self._recorder, self.keeper, self._door
        if not self._in_epochs:
            self._epochs_counted += 1
            if self._epochs_counted <= position.epoch:
                return
            if self._attention:
                self._boundary()
            self.monitor.begin_epoch(position.epoch)
        if self.stop is None and self.monitor.state == "starting":
            self._set_state("running")
        if (length := getattr(loader, "__len__", None)) is not None:
            self.monitor.steps_per_epoch = length()
        data = recorder.phase(getattr(loader, "phase", "data"))
        waits = getattr(loader, "num_workers", 0) > 0
        iterator: Iterator[Any] | None = None
        while self.stop is None:
            recorder.begin_step()
            try:
                with data:
                    if iterator is None:
                        with door.shielding(loader):
                            iterator = position.iterate(loader)
                    door.may_interrupt = "data" if waits else None
                    if waits and self._signalled is not None:
                        raise InterruptedWait
                    batch = next(iterator, _END)
                    door.may_interrupt = None
            except InterruptedWait:
                door.may_interrupt = None
                recorder.abandon_step()
                self._boundary()
                continue
            except BaseException:
                door.may_interrupt = None
                recorder.abandon_step()
                raise
            if batch is _END:
                recorder.abandon_step()
                position.exhausted = True
                break
            yield batch
            recorder.end_step()
            position.batches_done += 1
            if self._attention or recorder._mark >= keeper.due or recorder.nonfinite != self._nonfinite_seen:
                self._boundary()
        if self.stop is None and not self._in_epochs:
            self._epoch_ended()

    def record(self, **values: Any) -> None:
        """Values of the current step: `loss`, `grad_norm`, `samples`, `learning_rate`, and more by name.

        Tensors are welcome; nothing waits for a device.
        """
        self._recorder.record(**values)

    def phase(self, name: str) -> _Phase:
        """Context manager of a phase of the step (`catalog.metrics.PHASES`)."""
        return self._recorder.phase(name)

    def validation(self) -> Validation:
        """Around a validation: its time is seen as such, and a stop does not wait for its end.

        When a signal interrupts it, the block is left, the random state of its beginning is put back, and
        the resumed run validates anew. A stop that was asked for before is obeyed first; look at `stop`.
        """
        return Validation(self)

    def log_validation(self, metrics: Mapping[str, float]) -> None:
        """Report validation metrics."""
        self.monitor.log_validation(metrics)
        self._log.info("validation", epoch=self.position.epoch, at_step=self.step, **metrics)

    def checkpoint(
        self, kind: Kind = "regular", reason: str = "asked for by the loop", *, wait: bool = True
    ) -> Path | None:
        """Commit the present state. Call it between steps, on the loop's thread.

        Args:
            wait: False returns as soon as the state is copied, and has it committed in the background.

        Returns:
            The manifest's path; None without `wait`, when backups are disabled, or when the commit failed
            (counted and logged).
        """
        request, epoch = Request.now(reason), self.position.epoch
        if not wait:
            self.keeper.begin(kind, request, epoch)
            return None
        committed = self.keeper.commit(kind, request, epoch)
        return committed.path if committed else None

    def request_stop(self, reason: str, exit_code: int = 0) -> None:
        """Ask the run to end at the next step boundary, with a checkpoint; on the loop's thread."""
        with self._acting:
            if self.stop is None:
                self._set_state("stopping", reason)
                self._stop_reason_pending = StopRequest(reason, exit_code)
                self._attention = True

    def finish(
        self, state: Literal["finished", "stopped", "failed"] | None = None, reason: str | None = None
    ) -> None:
        """End the run: last state, run.json, servers and threads. By the context manager, or at exit."""
        if os.getpid() != self._pid:
            return  # a forked child that ends like a program of its own
        with self._acting:
            if self._ended:
                return
            self._ended = True
        if state is None:
            state = "stopped" if self.stop is not None else "finished"
        reason = reason or (self.stop.reason if self.stop else None)
        summary = self.monitor.get_performance_summary()
        self._system_log.info("run_ended", state=state, reason=reason, **summary)
        self.keeper.close(CLOSE_SECONDS)
        self._close_doors()
        self._set_state(state, reason)
        self.monitor.stop_monitoring()
        self._note_progress()
        self.folder.unlock()
        atexit.unregister(self.finish)
        if sys.excepthook == self._excepthook:
            sys.excepthook = self._previous_excepthook

    def fail(self, error: BaseException) -> None:
        """Record `error`, commit the last good state as an emergency checkpoint and end the run as failed."""
        if self._ended or os.getpid() != self._pid:
            return
        self._recorder.abandon_step()
        reason = f"{type(error).__name__}: {error}"[:500]
        # Not on the terminal: whoever catches the error, or Python itself, shows it there.
        get_logger("errors").error(
            "training_failed", at_step=self.step, error=reason, exc_info=error, terminal=False
        )
        if not isinstance(error, NonFiniteLossError):  # that one was raised after saving
            self.keeper.commit_snapshot(Request.now(reason))
        self.finish("failed", reason)

    def __enter__(self) -> ObservedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, (SystemExit, GeneratorExit)):
            self.fail(error)
        else:
            self.finish()

    # ---- between two steps ---------------------------------------------------------------------------

    _stop_reason_pending: StopRequest | None = None

    def _boundary(self) -> None:
        """Everything that is not the usual case between two steps; the loop's thread."""
        with self._acting:
            if self._ended or self.stop is not None:
                return
            self._attention = False
            if self._recorder.nonfinite != self._nonfinite_seen:
                self._on_nonfinite()
            if self._signalled is not None:
                self._obey_signal(*self._signalled)
            elif self._stop_reason_pending is not None:
                self._obey_stop(self._stop_reason_pending)
            for command in self.channel.take():
                self._obey(command)
            self._watchdog.satisfied()
            if self.stop is None:
                self.keeper.keep_up(self.position.epoch)

    def _epoch_ended(self) -> None:
        self.position.begin_epoch(self.position.epoch + 1)
        self.monitor.end_epoch()
        self._recorder.epoch = self.position.epoch
        self.keeper.epoch_ended(self.position.epoch)
        if self._attention:
            self._boundary()

    def _obey_signal(self, name: str, at: float) -> None:
        self._set_state("stopping", f"signal {name}")
        committed = self.keeper.commit("emergency", Request(f"signal {name}", at), self.position.epoch)
        self._log.warning("stopped_by_signal", signal=name, at_step=self.step, **_where(committed))
        self.stop = StopRequest(f"signal {name}", 128 + signal.Signals[name].value)

    def _obey_stop(self, stop: StopRequest) -> None:
        committed = self.keeper.commit("regular", Request.now(stop.reason), self.position.epoch)
        self._log.info("stopped", reason=stop.reason, at_step=self.step, **_where(committed))
        self.stop = stop

    def _obey(self, command: Command) -> None:
        """Execute one command and acknowledge it; a failing one never ends the training.

        A checkpoint is acknowledged when it is durable; the loop goes on after the copy.
        """
        started, step = time.time(), self.step
        self.channel.ack(command.id, "running", step=step)

        def settle(committed: Committed | None) -> None:
            if committed is None and self.keeper.backup is not None:
                self._refuse(
                    command, "the checkpoint was not committed; errors.jsonl says why", step, started
                )
            else:
                self.channel.ack(command.id, "done", step=step, result=_where(committed))
                self._settled(command, "done", step, started)

        try:
            request = Request(_reason(command), command.issued_at, command.traceparent)
            epoch = self.position.epoch
            if command.action in (_CHECKPOINT, _EMERGENCY):
                kind: Kind = "regular" if command.action == _CHECKPOINT else "emergency"
                saving = self.keeper.begin(kind, request, epoch)
                saving.then(settle) if saving is not None else settle(None)
            elif command.action == _STOP:
                self._set_state("stopping", _reason(command))
                committed = self.keeper.commit("emergency", request, epoch)
                self.stop = StopRequest(f"command stop ({_reason(command)})", 0)
                settle(committed)
            else:
                self._refuse(command, f"the trainer cannot do {command.action!r}", step, started)
        except Exception as error:
            self._system_log.error("command_failed", action=command.action, id=command.id, exc_info=error)
            self._refuse(command, f"{type(error).__name__}: {error}", step, started)

    def _refuse(self, command: Command, error: str, step: int, started: float) -> None:
        self.channel.ack(command.id, "failed", step=step, error=error)
        self._settled(command, "failed", step, started)

    def _on_nonfinite(self) -> None:
        self._nonfinite_seen = self._recorder.nonfinite
        loss, norm = self._recorder.last_loss, self._recorder.last_grad_norm
        stops = self.settings.on_nonfinite == "stop"
        get_logger("errors").error(
            "nonfinite_loss", at_step=self.step, loss=str(loss), grad_norm=str(norm), terminal=not stops
        )
        if stops:
            committed = self.keeper.commit_snapshot(Request.now(f"non-finite loss before step {self.step}"))
            saved = f"the last good state (step {committed.step}) was saved" if committed else "nothing saved"
            raise NonFiniteLossError(
                f"loss {loss}, gradient norm {norm} before step {self.step}: not finite; {saved}; lower the "
                "learning rate, or go on through such steps with --on-nonfinite continue"
            )

    # ---- when the loop cannot be reached -------------------------------------------------------------

    def _overdue(self) -> None:
        """The watchdog's thread: no boundary within the grace. Save what there is and say so."""
        with self._acting:
            if self._ended or self.stop is not None:
                return
            commands = self.channel.take()
            if not commands and self._signalled is None:
                return
            started = time.time()
            phase = self._recorder.in_step_phase()
            stacks = self._dump_stacks()
            asked = [f"signal {self._signalled[0]}"] if self._signalled else []
            asked += [_reason(command) for command in commands]
            reason = f"{'; '.join(asked)}; no step boundary in time (in {phase})"
            self._system_log.error("loop_not_reached", reason=reason, stacks=str(stacks))
            for command in commands:
                self.channel.ack(command.id, "running", step=self.keeper.snapshot_step)
            traced = next((command.traceparent for command in commands if command.traceparent), None)
            at = self._signalled[1] if self._signalled else min(command.issued_at for command in commands)
            committed = self.keeper.commit_snapshot(Request(reason, at, traced))
            failed = committed is None and self.keeper.backup is not None
            for command in commands:
                result = {**_where(committed), "stacks": str(stacks) if stacks else None}
                outcome: Literal["failed", "done"] = "failed" if failed else "done"
                error = "no sound snapshot could be committed" if failed else None
                step = committed.step if committed else None
                self.channel.ack(command.id, outcome, step=step, result=result, error=error)
                self._settled(command, outcome, step, started)
            if self._signalled is not None:
                self._leave(128 + signal.Signals[self._signalled[0]].value, reason)
            elif any(catalog_actions.ACTIONS[command.action].ends_run for command in commands):
                self._leave(0, reason)

    def _leave(self, exit_code: int, reason: str) -> None:
        """End the process from a thread that is not the loop's, after all that must be durable is."""
        try:
            self._ended = True
            self._set_state("stopped", reason)
            self._note_progress()
            self.keeper.close(CLOSE_SECONDS)
            self.channel.stop()
            self.monitor.stop_monitoring()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(exit_code)

    def _dump_stacks(self) -> Path | None:
        path = self.folder.logs / f"stacks-{time.time_ns()}.txt"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            self._system_log.error("stacks_not_written", path=str(path), error=str(error))
            return None
        return path

    def _patience(self) -> float:
        """Seconds the loop may take to a boundary, so that a snapshot can be committed within the grace."""
        grace = self.settings.grace_seconds
        return grace - min(grace / 2, max(1.0, 3 * self.keeper.last_commit_seconds))

    # ---- doors ---------------------------------------------------------------------------------------

    def _close_doors(self) -> None:
        self._watchdog.stop()
        self._door.uninstall()
        set_context_source(None)
        self.channel.stop()

    def _on_arrival(self) -> None:
        self._attention = True
        self._watchdog.expect(self._patience())

    def _on_signal(self, name: str) -> None:
        if self._signalled is None:
            self._signalled = (name, time.time())
        self._attention = True

    def _on_signal_fd(self) -> None:
        """The watchdog's thread; the main thread may be stuck in C and never run the Python handler."""
        names = self._door.drain()
        if names and not self._ended:
            self._on_signal(names[0])
            self._watchdog.expect(self._patience())

    def _on_second_interrupt(self) -> None:
        # In a signal handler: whatever lock the main thread holds here will never be released.
        self._ended = True
        try:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            self.folder.update_info(state="stopped", reason="second SIGINT: stopped at once", ended=now)
        finally:
            os._exit(128 + signal.SIGINT)

    def _on_garbage(self, door: str, error: str) -> None:
        self.monitor.instruments.add(catalog.CONTROL_GARBAGE, door=door)
        self._system_log.warning("control_garbage", door=door, error=error)

    def _on_outcome(self, command: Command, ack: Ack) -> None:
        """The channel itself settled a command that never reached the loop."""
        if ack.state in ("rejected", "expired"):
            self._settled(command, ack.state, None, command.issued_at)

    def _settled(self, command: Command, outcome: str, step: int | None, started: float) -> None:
        self.monitor.command_finished(
            id=command.id,
            action=command.action if command.action in catalog_actions.ACTIONS else "unknown",
            source=command.source,
            reason=command.reason,
            outcome=outcome,
            step=step,
            started_at=started,
            traceparent=command.traceparent,
        )
        self._system_log.info(
            "command",
            action=command.action,
            id=command.id,
            source=command.source,
            outcome=outcome,
            at_step=step,
            **_trace(command.traceparent),
        )

    def _after_alerts(self, alerts: Sequence[AlertStatus]) -> None:
        """The housekeeping thread, once per evaluation."""
        if time.monotonic() >= self._progress_due:
            self._progress_due = time.monotonic() + PROGRESS_SECONDS
            self._note_progress()
        self._duty.consider(alerts)

    # ---- run.json and what was there before ------------------------------------------------------------

    def _restore(self, plan: ResumePlan) -> None:
        assert plan.store is not None
        own = plan.continues and self.keeper.backup is not None
        store = self.keeper.backup if own else create_backup_system(plan.store)
        assert store is not None
        loaded = store.load(plan.checkpoint)
        self._state.restore(loaded.state, loaded.info.path)
        if plan.continues:
            self._recorder.rework_until_step = self._steps_reached()
        self.monitor.resumed_from_step = self.step
        self.resumed = loaded

    def _introduce(self, plan: ResumePlan) -> None:
        """Write run.json and config.toml."""
        me = ProcessId.current()
        process = {"0": {"pid": me.pid, "created": me.created}}
        urls = {"0": f"{self.monitor.url}/metrics"} if self.monitor.url else {}
        if plan.continues:
            self.folder.update_info(
                state="starting",
                processes=process,
                metrics_urls=urls,
                restarts=self.folder.read_info().restarts + 1,
                ended=None,
                reason=None,
            )
        else:
            self.folder.write_info(
                RunInfo(
                    self.folder.id,
                    self.monitor.model,
                    processes=process,
                    metrics_urls=urls,
                    git_revision=self._revision,
                    epochs=self.settings.epochs or 0,
                    parent=plan.parent,
                )
            )
        write_atomic(self.folder.config_toml, dump_toml(self.settings))

    def _set_state(self, state: str, reason: str | None = None) -> None:
        self.monitor.set_state(state)
        changes: dict[str, Any] = {"state": state, "reason": reason}
        if state in ENDED_STATES:
            changes["ended"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            self.folder.update_info(**changes)
        except (OSError, ObsinfraError) as error:
            self._system_log.error("run_json_not_written", error=str(error))

    def _note_progress(self) -> None:
        document = {"step": self.step, "epoch": self.position.epoch, "at": time.time()}
        try:
            write_json_atomic(self.folder.root / "progress.json", document, durable=False, mode=0o644)
        except OSError as error:
            self._system_log.warning("progress_not_written", error=str(error))

    def _steps_reached(self) -> int:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((self.folder.root / "progress.json").read_text())["step"])
        return 0

    def _excepthook(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self.fail(error)
        self._previous_excepthook(kind, error, trace)


class Validation:
    """The context manager of `ObservedRun.validation`.

    A class, not a generator: between its methods and the block no foreign code runs that an interrupt could
    hit outside the block.
    """

    def __init__(self, run: ObservedRun) -> None:
        self._run = run
        self._phase = run.phase("validation")

    def __enter__(self) -> None:
        run = self._run
        run.keeper.snapshot(run.position.epoch)
        self._rng = capture_rng_state()
        self._phase.__enter__()
        run._door.may_interrupt = "validation"
        if run._signalled is not None:
            run._door.may_interrupt = None
            run._boundary()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        run = self._run
        run._door.may_interrupt = None
        self._phase.__exit__(kind, error, trace)
        if not isinstance(error, InterruptedWait):
            return False
        restore_rng_state(self._rng)
        run._boundary()
        return True


_END = object()


def _reason(command: Command) -> str:
    return f"{command.source}: {command.reason or command.action}"


def _trace(traceparent: str | None) -> dict[str, str]:
    """The trace of whoever asked, for a log event that belongs there rather than to the run's own."""
    found = trace_id_of(traceparent)
    return {} if found is None else {"trace_id": found}


def _where(committed: Committed | None) -> dict[str, Any]:
    if committed is None:
        return {"checkpoint": None}
    return {"checkpoint": str(committed.path), "step": committed.step, "from": committed.source}


def git_revision() -> str | None:
    """Revision of the checkout in the working folder, if it is one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=2, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
