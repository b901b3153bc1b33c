"""ObservedRun: what `observe()` returns. Watches a loop, obeys commands, saves and restores its state.

The trainer and anybody's plain loop use the same object. What is not on the step path lives beside it:
`state`, `position`, `keeper` (checkpoints), `actions` (commands), `run_card`, `signals`, `watchdog`,
`alert_duty`.
"""

from __future__ import annotations

import atexit
import copy
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from obsinfra.config.resolve import changed, resolve
from obsinfra.config.settings import Settings
from obsinfra.control.command import Ack, Command
from obsinfra.errors import CheckpointError, ConfigError, NonFiniteLossError
from obsinfra.monitoring.logging_config import get_logger, log_beside
from obsinfra.monitoring.recorder import _Phase
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.observation.actions import Actions, Order, where
from obsinfra.observation.agreement import Request as Agreed
from obsinfra.observation.alert_duty import AlertDuty
from obsinfra.observation.executors import EXECUTORS
from obsinfra.observation.flight_record import dump_collectives
from obsinfra.observation.keeper import Keeper, Kind, Request, SharedStore
from obsinfra.observation.learning_rate import LearningRateScale
from obsinfra.observation.position import DataPosition
from obsinfra.observation.ranks import Ranks, Restart, cause_of, present_ranks
from obsinfra.observation.resume import ResumePlan, check_remote, plan_for_all, plan_run
from obsinfra.observation.rollback import load_newest
from obsinfra.observation.run_card import RunCard, git_revision
from obsinfra.observation.signals import InterruptedWait, SignalDoor
from obsinfra.observation.stacks import dump_stacks_plainly
from obsinfra.observation.state import LoopState, is_in_shards, unwrapped
from obsinfra.observation.watchdog import Watchdog
from obsinfra.optimization.reclaim import cuda_in_use

CLOSE_SECONDS = 60.0
"""For what is being committed when the run ends; the writer goes on alone if it takes longer."""

SAVING = (
    catalog_actions.CHECKPOINT.name,
    catalog_actions.EMERGENCY_CHECKPOINT.name,
    catalog_actions.STOP.name,
)
"""Actions that can be done without the loop, from its last snapshot."""


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
    ranks: Ranks | None = None,
    **overrides: Any,
) -> ObservedRun:
    """Give a PyTorch loop metrics, alerts, control and checkpoints.

        run = obsinfra.observe(model, optimizer, run="my-run", resume="auto")
        for epoch in run.epochs(10):
            for batch in run.steps(loader):
                ...
                run.record(loss=loss, grad_norm=norm)

    One iteration of `steps` is one optimizer step: gradients that are still being accumulated at its end are
    in no checkpoint. The end of the loop saves nothing by itself; `run.checkpoint("final")` does.

    Args:
        model: the module being trained; a compiled or DDP-wrapped one is saved under its own names.
        optimizer: its optimizer, saved and restored with it.
        run: name of the run folder; default: model name, time and four random digits.
        model_name: the `model` label; default: the module's class name.
        resume: `auto`, a run name or a checkpoint path (see `Settings.resume`).
        scheduler, scaler, extra: further state to save and restore.
        settings: all settings at once; else environment, obsinfra.toml and defaults. `run`, `resume` and
            `overrides` go on top of either.
        plan: an already decided resume plan.
        device, precision: shown on the page and in build info; the device is the model's by default.
        ranks: the processes of the run; default: those of torch's process group, if there is one.
        overrides: any field of `Settings`, e.g. `checkpoint_seconds=60`.

    Raises:
        ConfigError, CheckpointError, RunBusyError: see each setting's bounds and `plan_run`.
    """
    name = model_name or type(unwrapped(model)).__name__
    given = {**overrides, "run": run, "resume": resume}
    if settings is None:
        settings = resolve({**given, "model_name": name}).settings
    else:
        settings = changed(settings, given)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    first = next(iter(model.parameters()), None)
    ranks = ranks or present_ranks()
    chosen = settings
    return ObservedRun(
        model,
        {part: found for part, found in parts.items() if found is not None},
        extra or {},
        model_name=name,
        settings=settings,
        plan=plan or plan_for_all(ranks, lambda: plan_run(chosen, name)),
        device=device or (str(first.device) if first is not None else "cpu"),
        precision=precision,
        ranks=ranks,
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
        actions: carries out its commands.
        card: what the folder says of it.
        ranks: the processes that train together.
        after_step: called after each step, between two: not part of any step's time. Must be quick.
        cut_short: the epoch under way was left for an earlier one by a rollback: `steps` has ended, and what
            belongs to the end of an epoch, such as a validation, is to be left out. Cleared by `epochs`.
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
        ranks: Ranks,
    ) -> None:
        check_remote(
            settings
        )  # again: a resumed run's own settings may name one that this machine cannot use
        self.settings = settings
        self.ranks = ranks
        self.folder = ranks.folder(plan.folder.root)
        self.stop: StopRequest | None = None
        self.resumed: LoadedCheckpoint | None = None
        self.cut_short = False
        self.after_step: Callable[[], None] = _nothing
        self.position = DataPosition()
        self._acting = threading.RLock()
        self._attention = False
        self._ended = False
        self._signalled: tuple[str, float] | None = None
        self._signal_told = False
        self._moved = False
        self._epochs_counted = 0
        self._epoch_open = False
        self._calls = 0
        self._in_epochs = False
        self._pid = os.getpid()
        revision = git_revision()

        made = not self.folder.root.exists()
        progress = self.folder.read_progress()
        self._last_sign = progress.at if progress is not None else None
        ranks.share("folder", self.folder.create)  # rank 0 makes it; its errors are everyone's
        self.folder.create()
        ranks.share("lock", self.folder.lock)
        self.log = log_beside(
            self.folder.logs,
            level=settings.log_level,
            run=self.folder.id,
            model=model_name,
            rank=ranks.rank,
            context=self._where,
        )
        self._log = get_logger("training")
        self._system_log = get_logger("system")
        self._error_log = get_logger("errors")
        self.channel = ranks.channel(
            self.folder,
            on_garbage=self._on_garbage,
            on_outcome=self._on_outcome,
            on_arrival=self._on_arrival,
        )
        self._duty = AlertDuty(self.folder, self.channel.submit)
        self.monitor = TrainingMonitor(
            model_name,
            run=self.folder.id,
            rank=ranks.rank,
            world_size=ranks.size,
            metrics_host=settings.metrics_host,
            metrics_port=settings.metrics_port,
            sample_seconds=settings.sample_seconds,
            thresholds=settings.thresholds,
            alerts=settings.alerts,
            trace_every=settings.trace_every,
            otlp_endpoint=settings.otlp_endpoint,
            trace_file=self.folder.traces / "spans.jsonl",
            history_file=self.folder.history,
            disk_path=self.folder.root,
            epochs=settings.epochs or 0,
            device=device,
            precision=precision,
            git_revision=revision,
            after_alerts=self._after_alerts,
            alert_mode=self._duty.mode,
            all_runs_page=self._duty.page,
        )
        self.monitor.optimizer = parts.get("optimizer")
        self._recorder = self.monitor.recorder
        self.card = RunCard(self.folder, self.monitor, settings, revision)
        in_shards = not ranks.alone and is_in_shards(model)
        self._recorder.own_time_known &= not in_shards
        if in_shards:
            from obsinfra.observation.shards import ranks_together

            ranks.draws_as = ranks.rank // ranks_together(model)
        self._state = LoopState(
            model, parts, extra, self.position, self._recorder, in_shards=in_shards, keeps=ranks.first
        )
        self.actions = Actions(self, EXECUTORS)
        backup = None
        if not settings.disable_backups and ranks.first:
            backup = create_backup_system(
                self.folder.checkpoints,
                keep_last=settings.keep_checkpoints,
                run=self.folder.id,
                compression=settings.checkpoint_compression,
            )
        self.keeper = Keeper(
            backup,
            self._state,
            self.monitor,
            settings,
            run=self.folder.id,
            log_path=self.folder.logs / "writer.jsonl",
            ask_all=(lambda what: ranks.post("copy", {"what": what})) if in_shards else None,
            shared=self._shared_store(ranks) if in_shards else None,
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
            self._first_snapshot()
            self.channel.start()
            if not settings.disable_monitoring:
                self.monitor.start_monitoring()
            self.card.introduce(plan, ranks)
            ranks.begin(
                seed=settings.seed,
                step=lambda: self._recorder.step,
                on_notice=self._on_notice,
                patience=settings.grace_seconds,
            )
        except BaseException as error:
            ranks.leave(f"{type(error).__name__}: {error}")
            self._close_doors()
            self.keeper.close(CLOSE_SECONDS)
            self.monitor.stop_monitoring()
            self.log.end()
            self.folder.unlock()
            if made:
                shutil.rmtree(self.folder.root, ignore_errors=True)
            raise
        self.log.built()
        self._system_log.info("run_started", resumed_from_step=self.monitor.resumed_from_step)
        atexit.register(self.finish)
        self._previous_excepthook = sys.excepthook
        sys.excepthook = self._excepthook

    def _first_snapshot(self) -> None:
        """Each rank: copy the state, so that what no checkpoint can hold is said before the first step.

        Raises:
            CheckpointError: there is such a thing, on rank 0.
        """
        problem = self.keeper.first_snapshot(self.position.epoch)

        def raise_it() -> None:
            if problem is not None:
                raise CheckpointError(
                    f"this training cannot be saved: {problem.wrong}",
                    problem.expected,
                    f"{problem.fix or 'change it'}; or go without checkpoints (disable_backups)",
                )

        self.ranks.share("first snapshot", raise_it)

    def _shared_store(self, ranks: Ranks) -> SharedStore | None:
        """Where the ranks' writers commit their parts, if they are to; what all ranks call at the start."""
        if self.settings.checkpoint_form != "sharded" or self.settings.disable_backups:
            return None
        launch = ranks.share("checkpoint parts", lambda: secrets.token_hex(4))
        return SharedStore(self.folder.checkpoints, launch, ranks.rank, ranks.size)

    # ---- the loop's side -------------------------------------------------------------------------

    def _where(self) -> dict[str, Any]:
        """Where it stands, for its log; nothing while it is built."""
        monitor = getattr(self, "monitor", None)
        return {} if monitor is None else {"step": monitor.recorder.step, "trace_id": monitor.trace_id}

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
        self._beside()
        while (total is None or self.position.epoch < total) and self.stop is None:
            epoch = self.position.epoch
            self.monitor.begin_epoch(epoch)
            yield epoch
            if self.cut_short:
                self.cut_short = False
                self.monitor.end_epoch()
            elif self.stop is None:
                self._epoch_ended()

    def steps(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Batches of `loader`; each iteration is one step, with the wait for its batch seen as data time.

        Between two steps the run obeys: commands, signals, due snapshots and checkpoints. On a resumed run
        the iteration goes on where the checkpoint was taken. Called outside `epochs`, each call is one
        epoch, and epochs that were complete are passed over. Within `epochs` there may be several calls in
        an epoch, one after the other.

        A loop may leave it early: the step it leaves counts if something was recorded of it, and the next
        call begins the next epoch, or within `epochs` another pass. A run resumed from what was saved in
        between goes on in the epoch it left: count with `position.batches_done`, not from zero.

        After a rollback the batches go on from its checkpoint. Within `epochs`, one into an earlier epoch
        ends the iteration instead (see `cut_short`); outside it, the earlier epochs' batches follow here.

        Raises:
            ConfigError: another loop over `steps` began inside a step of this one.
        """
        position, recorder, keeper, door = self.position, self._recorder, self.keeper, self._door
        self._calls += 1
        call = self._calls
        if not self._in_epochs:
            if self._epoch_open and self.stop is None:
                self._epoch_ended()
            self._epochs_counted += 1
            if self._epochs_counted <= position.epoch:
                return
            self._beside()
            self.monitor.begin_epoch(position.epoch)
            self._epoch_open = True
        if self.stop is None and not position.begin_pass():
            return
        if self.stop is None and self.monitor.state == "starting":
            if (restart := self.ranks.began(self._last_sign)) is not None:
                self._tell_of_restart(restart)
            self.card.show_state("running")
        if (length := getattr(loader, "__len__", None)) is not None:
            self.monitor.steps_per_epoch = length()
        if (telemetry := getattr(loader, "telemetry", None)) is not None:
            self.monitor.add_source(telemetry)
        data = recorder.phase(getattr(loader, "phase", "data"))
        # Of several ranks none may leave a wait on its own: all stop at the same boundary.
        waits = getattr(loader, "num_workers", 0) > 0 and self.ranks.alone
        begin_step = self.ranks.begin_step
        iterator: Iterator[Any] | None = None
        self._moved = False
        begun_in = position.epoch, position.passes
        while self.stop is None:
            if self._moved:
                self._moved, iterator = False, None
                if (position.epoch, position.passes) != begun_in and self._in_epochs:
                    self.cut_short = True
                    return
            recorder.begin_step()
            try:
                with data:
                    if iterator is None:
                        with door.shielding(loader):
                            iterator = position.iterate(loader)
                    door.may_interrupt = "data" if waits else None
                    if waits and self._signalled is not None:
                        raise InterruptedWait
                    begin_step(recorder.step)  # after what `iterate` puts back
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
                if self._in_epochs:
                    return
                self._epoch_ended()
                if self.stop is not None or position.epoch >= self._epochs_counted:
                    return
                self.monitor.begin_epoch(position.epoch)  # one that a rollback has led back to
                self._moved = True
                continue
            try:
                yield batch
            except GeneratorExit:  # by a break, a return, or an error in the loop's body
                if call == self._calls and not self._ended and recorder.leave_step():
                    position.batches_done += 1
                raise
            if call != self._calls:
                raise ConfigError(
                    "steps() was called again inside a step of its own",
                    "one loop over steps() at a time",
                    "let the inner loop go over its data without steps()",
                )
            if recorder._step_started is not None:  # else it was ended within the loop's body
                recorder.end_step()
                position.batches_done += 1
            self.after_step()
            if self._attention or recorder._mark >= keeper.due or recorder.nonfinite != self._nonfinite_seen:
                self._boundary()

    def _tell_of_restart(self, restart: Restart) -> None:
        facts = asdict(restart)
        for cause, count in facts.pop("counts").items():
            self.monitor.instruments.add(catalog.GROUP_RESTARTS, count, cause=cause)
        self.monitor.instruments.set(catalog.GROUP_DOWNTIME_SECONDS, restart.downtime_seconds)
        self._system_log.warning("group_formed_again", ranks=self.ranks.size, at_step=self.step, **facts)

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

        Inside a step it ends the step, if something was recorded of it.
        """
        return Validation(self)

    def log_validation(self, metrics: Mapping[str, float]) -> None:
        """Report validation metrics."""
        self.monitor.log_validation(metrics)
        self._log.info("validation", epoch=self.position.epoch, at_step=self.step, **metrics)

    def checkpoint(
        self, kind: Kind = "regular", reason: str = "asked for by the loop", *, wait: bool = True
    ) -> Path | None:
        """Commit the present state. On the loop's thread, between steps, or as the last thing of one: a step
        of which something was recorded ends here, so that the resumed run does not do it again.

        Args:
            wait: False returns as soon as the state is copied, and has it committed in the background.

        Returns:
            The manifest's path; None without `wait`, when backups are disabled, or when the commit failed
            (counted and logged).
        """
        self._end_recorded_step()
        request, epoch = Request.now(reason), self.position.epoch
        if not wait:
            self.keeper.begin(kind, request, epoch)
            return None
        committed = self.keeper.commit(kind, request, epoch)
        return committed.path if committed else None

    def _end_recorded_step(self) -> None:
        if self._recorder.end_recorded_step():
            self.position.batches_done += 1

    # ---- for the executors of actions ----------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model being trained, without wrappers."""
        return self._state.model

    @property
    def epoch(self) -> int:
        """Epoch under way, or the next one between two."""
        return self.position.epoch

    @property
    def learning_rate(self) -> LearningRateScale:
        """What the learning rates are scaled by from outside."""
        return self._state.learning_rate

    def alerts_act(self) -> str:
        """Who acts on alerts now: `sidecar` or `in-process`."""
        return self._duty.mode()

    def attend(self) -> None:
        """The loop looks around at the next boundary. On any thread."""
        self._attention = True

    def end(self, reason: str) -> None:
        """End the loop at this boundary; everything that must be saved is. On the loop's thread."""
        self.stop = StopRequest(reason, 0)

    def data_ahead(self) -> dict[str, Any]:
        """Where in the data the loop is, for `go_back`; the loop's thread, between two steps."""
        return copy.deepcopy(self.position.state_dict())

    def go_back(self, loaded: LoadedCheckpoint, data: Mapping[str, Any] | None, skip: int) -> None:
        """Put a checkpoint of this run back and go on from there; the loop's thread, between two steps.

        Args:
            data: go on here in the data instead (`data_ahead`).
            skip: pass over so many batches more, within the epoch.

        Raises:
            CheckpointError: it does not fit.
        """
        if cuda_in_use():
            torch.cuda.synchronize()
        recorder = self._recorder
        recorder.fold()  # brings in what was still on a device, so that it does not speak of the new course
        recorder.rework_until_step = max(recorder.rework_until_step, self.step)
        self._state.restore(loaded.state, loaded.info.path)
        if data is not None:
            self.position.load_state_dict(data, loaded.state["rng"])
            recorder.epoch = self.position.epoch
        self.position.skip(skip)
        self.model.zero_grad(set_to_none=True)
        recorder.last_loss = recorder.last_grad_norm = None
        self._nonfinite_seen = recorder.nonfinite
        self._moved = True
        self.keeper.snapshot(self.position.epoch)
        self.card.note_progress(self.step, self.position.epoch)

    def request_stop(self, reason: str, exit_code: int = 0) -> None:
        """Ask the run to end at the next step boundary, with a checkpoint; on the loop's thread."""
        with self._acting:
            if self.stop is None:
                self.card.show_state("stopping", reason)
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
        self.actions.close()
        self.keeper.close(CLOSE_SECONDS)
        self._close_doors()
        self.ranks.leave(reason or state)
        self.card.show_state(state, reason)
        self.monitor.stop_monitoring()
        self.card.note_progress(self.step, self.position.epoch)
        self.log.end()
        self.folder.unlock()
        atexit.unregister(self.finish)
        if sys.excepthook == self._excepthook:
            previous = self._previous_excepthook
            while isinstance(owner := getattr(previous, "__self__", None), ObservedRun) and owner._ended:
                previous = owner._previous_excepthook  # of a run that began earlier and ended earlier
            sys.excepthook = previous

    def fail(self, error: BaseException) -> None:
        """Record `error`, commit the last good state as an emergency checkpoint and end the run as failed."""
        if self._ended or os.getpid() != self._pid:
            return
        self._recorder.abandon_step()
        reason = f"{type(error).__name__}: {error}"[:500]
        # Not on the terminal: whoever catches the error, or Python itself, shows it there.
        self._error_log.error(
            "training_failed", at_step=self.step, error=reason, exc_info=error, terminal=False
        )
        if cause_of([reason]) == "timeout":  # a collective that one of the ranks did not come to
            self._keep_evidence()
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
        """Everything that is not the usual case between two steps, pauses included; the loop's thread."""
        self._look()
        if self.actions.pause is None:
            return
        while self.stop is None and not self._ended:
            if self.actions.pause is not None:
                self.ranks.hold(self.step)
            elif self.ranks.let_go():
                return
            self.actions.wait_while_paused()
            self._look()

    def _beside(self) -> None:
        """A moment between two steps that is not the end of one. One process alone looks around here too; of
        several, each would be somewhere else at the same step, so that they only obey the loop itself."""
        if not self._attention:
            return
        if self.ranks.alone:
            self._boundary()
        elif self._stop_reason_pending is not None and self.stop is None:
            with self._acting:
                self._obey_stop(self._stop_reason_pending)

    def _look(self) -> None:
        with self._acting:
            if self._ended or self.stop is not None:
                return
            self._attention = False
            if self._recorder.nonfinite != self._nonfinite_seen:
                self._on_nonfinite()
            if self._signalled is not None and not self._signal_told:
                self._signal_told = True
                name, at = self._signalled
                self.ranks.post("signal", {"name": name, "at": at})
            for agreed in self.ranks.due(self.step):
                self._heed(agreed)
            if self.stop is None and self._stop_reason_pending is not None:
                self._obey_stop(self._stop_reason_pending)
            self.actions.at_boundary()
            self.ranks.compare()
            pending = self.ranks.pending or (self._signal_told and self.stop is None)
            self._attention = self._attention or self.actions.taking_steps or pending
            if not pending:
                self._watchdog.satisfied()
            if self.stop is None:
                self.keeper.keep_up(self.position.epoch)

    def _heed(self, agreed: Agreed) -> None:
        """Something that this boundary was agreed on for."""
        if self.stop is not None:
            return
        if agreed.kind == "signal":
            self._obey_signal(agreed.body["name"], agreed.body["at"])
        elif agreed.kind == "pause over":
            self.actions.end_pause(agreed.body["why"], agreed.body["holder"])
        elif agreed.kind == "nonfinite":
            self._stop_for_nonfinite(**agreed.body)
        elif agreed.kind == "copy":
            self.keeper.agreed(agreed.body["what"], self.position.epoch)

    def _epoch_ended(self) -> None:
        self._epoch_open = False
        self.position.begin_epoch(self.position.epoch + 1)
        self.monitor.end_epoch()
        self._recorder.epoch = self.position.epoch
        self.keeper.epoch_ended(self.position.epoch)
        self._beside()

    def _obey_signal(self, name: str, at: float) -> None:
        self.card.show_state("stopping", f"signal {name}")
        committed = self.keeper.commit("emergency", Request(f"signal {name}", at), self.position.epoch)
        self._log.warning("stopped_by_signal", signal=name, at_step=self.step, **where(committed))
        self.stop = StopRequest(f"signal {name}", 128 + signal.Signals[name].value)

    def _obey_stop(self, stop: StopRequest) -> None:
        committed = self.keeper.commit("regular", Request.now(stop.reason), self.position.epoch)
        self._log.info("stopped", reason=stop.reason, at_step=self.step, **where(committed))
        self.stop = stop

    def _on_nonfinite(self) -> None:
        self._nonfinite_seen = self._recorder.nonfinite
        loss, norm = self._recorder.last_loss, self._recorder.last_grad_norm
        stops = self.settings.on_nonfinite == "stop"
        self._error_log.error(
            "nonfinite_loss", at_step=self.step, loss=str(loss), grad_norm=str(norm), terminal=not stops
        )
        if stops:
            self.ranks.post(
                "nonfinite",
                {"loss": str(loss), "norm": str(norm), "step": self.step, "rank": self.ranks.rank},
            )

    def _stop_for_nonfinite(self, loss: str, norm: str, step: int, rank: int) -> None:
        committed = self.keeper.commit_snapshot(Request.now(f"non-finite loss before step {step}"))
        saved = f"the last good state (step {committed.step}) was saved" if committed else "nothing saved"
        if not self.ranks.first:
            saved = "rank 0 saves the last good state"
        where_ = "" if self.ranks.alone else f" on rank {rank}"
        raise NonFiniteLossError(
            f"loss {loss}, gradient norm {norm} before step {step}{where_}: not finite; {saved}; lower the "
            "learning rate, or go on through such steps with --on-nonfinite continue"
        )

    # ---- when the loop cannot be reached -------------------------------------------------------------

    def _keep_evidence(self) -> Path | None:
        """What a hang is understood by: all stacks, whose file is returned, and the last collectives."""
        stacks: Path | None = None
        try:
            stacks = dump_stacks_plainly(self.folder.logs)
            record = dump_collectives(self.folder.logs, self.ranks.rank)
            if record is not None:
                self._system_log.warning("collectives_kept", path=str(record.path), last=record.last)
        except OSError as problem:
            self._system_log.error("stacks_not_written", error=str(problem))
        return stacks

    def _overdue(self) -> None:
        """The watchdog's thread: no boundary within the grace. Save what there is and say so."""
        with self._acting:
            if self._ended or self.stop is not None:
                return
            commands = self.channel.overdue(lambda command: command.action in SAVING)
            if self.channel.waiting():  # for the loop; looked at again, so that they expire even if it hangs
                self._watchdog.expect(self._patience())
            if not commands and self._signalled is None:
                return
            started = time.time()
            phase = self._recorder.in_step_phase()
            stacks = self._keep_evidence()
            asked = [f"signal {self._signalled[0]}"] if self._signalled else []
            asked += [Order(command, {}).reason for command in commands]
            reason = f"{'; '.join(asked)}; no step boundary in time (in {phase})"
            self._system_log.error("loop_not_reached", reason=reason, stacks=str(stacks))
            for command in commands:
                self.channel.ack(command.id, "running", step=self.keeper.snapshot_step)
            traced = next((command.traceparent for command in commands if command.traceparent), None)
            at = self._signalled[1] if self._signalled else min(command.issued_at for command in commands)
            committed = self.keeper.commit_snapshot(Request(reason, at, traced))
            failed = committed is None and self.keeper.backup is not None
            for command in commands:
                result = {**where(committed), "stacks": str(stacks) if stacks else None}
                outcome: Literal["failed", "done"] = "failed" if failed else "done"
                error = "no sound snapshot could be committed" if failed else None
                step = committed.step if committed else None
                self.channel.ack(command.id, outcome, step=step, result=result, error=error)
                self.actions.report(command, outcome, step, started, seconds=time.time() - started)
            if self._signalled is not None:
                self._leave(128 + signal.Signals[self._signalled[0]].value, reason)
            elif any(catalog_actions.ACTIONS[command.action].ends_run for command in commands):
                self._leave(0, reason)

    def _leave(self, exit_code: int, reason: str) -> None:
        """End the process from a thread that is not the loop's, after all that must be durable is."""
        try:
            self._ended = True
            self.card.show_state("stopped", reason)
            self.card.note_progress(self.step, self.position.epoch)
            self.keeper.close(CLOSE_SECONDS)
            self.channel.stop()
            self.ranks.leave(reason)
            self.monitor.stop_monitoring()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(exit_code)

    def _patience(self, waiting: Sequence[Command] = ()) -> float:
        """Seconds the loop may take to a boundary, so that a snapshot can be committed within the grace."""
        usual = self.settings.grace_seconds
        grace = min([float(command.args.get("grace_seconds") or usual) for command in waiting] or [usual])
        return grace - min(grace / 2, max(1.0, 3 * self.keeper.last_commit_seconds))

    # ---- doors ---------------------------------------------------------------------------------------

    def _close_doors(self) -> None:
        self._watchdog.stop()
        self._door.uninstall()
        self.channel.stop()

    def _on_arrival(self) -> None:
        self.actions.arrived()
        if waiting := self.channel.waiting():
            self._attention = True
            self._watchdog.expect(self._patience(waiting))

    def _on_notice(self) -> None:
        """All ranks are asked for something."""
        self._attention = True
        self.actions.wake()

    def _on_signal(self, name: str) -> None:
        if self._signalled is None:
            self._signalled = (name, time.time())
        self._attention = True
        self.actions.wake()

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
            self.actions.report(command, ack.state, None, command.issued_at, error=ack.error)

    def _after_alerts(self, alerts: Sequence[AlertStatus]) -> None:
        """The housekeeping thread, once per evaluation."""
        self.card.keep_progress(self.step, self.position.epoch)
        self._duty.consider(alerts)

    # ---- run.json and what was there before ------------------------------------------------------------

    def _restore(self, plan: ResumePlan) -> None:
        assert plan.store is not None
        own = plan.continues and self.keeper.backup is not None
        store = self.keeper.backup if own else create_backup_system(plan.store)
        assert store is not None
        if self.ranks.first:
            loaded = store.load(plan.checkpoint) if plan.checkpoint else load_newest(store, plan.store.parent)
        chosen = self.ranks.share("checkpoint", lambda: str(loaded.info.path))
        if not self.ranks.first:
            loaded = store.load(Path(chosen))
        self._state.restore(loaded.state, loaded.info.path)
        if plan.continues:
            self._recorder.rework_until_step = self.card.steps_reached()
        self.monitor.resumed_from_step = self.step
        self.resumed = loaded

    def _excepthook(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self.fail(error)
        self._previous_excepthook(kind, error, trace)


def _nothing() -> None:
    pass


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
        run._end_recorded_step()
        run.keeper.snapshot(run.position.epoch)
        self._rng = capture_rng_state()
        self._phase.__enter__()
        if not run.ranks.alone:
            return
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
